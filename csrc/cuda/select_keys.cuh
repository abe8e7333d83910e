// Keys of elements, and groups of eight elements as they are loaded: a mask byte's worth, by 16 bytes an access.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/radix.h"
#include "cuda/tile.cuh"

namespace granet::cuda {

constexpr int kGroup = 8;  // elements of a mask byte

// A number's key: unsigned, larger for what ranks before, equal where numbers are (see common/radix.h).
//
// `unit` bits are zero at the end of every pattern that can occur, and are left out: 16 where all numbers are bf16.
template <typename Format, Rank rank, typename Key>
__device__ __forceinline__ Key key_of(typename Format::Bits bits, int unit) {
  using SignedKey = std::conditional_t<sizeof(Key) == 8, int64_t, int32_t>;
  using To = typename KeyTraits<SignedKey>::Format;
  constexpr Key kLargest = kInfinity<To>;
  constexpr int kSign = 8 * static_cast<int>(sizeof bits) - 1;
  const auto magnitude = static_cast<typename Format::Bits>(bits & ((typename Format::Bits{1} << kSign) - 1));
  const Key wide = widen<Format, To>(magnitude);
  const Key key = wide >> unit;
  if constexpr (rank == Rank::kMagnitude) return wide > kLargest ? (kLargest >> unit) + 1 : key;
  if constexpr (rank == Rank::kGain) return wide > kLargest ? 0 : key + 1;
  const Key zero = Key{1} << (8 * sizeof(Key) - 1) >> unit;
  if (wide > kLargest) return 0;
  return bits >> kSign != 0 ? zero - key : zero + key;
}

// Bits of a key.
template <typename Key>
constexpr int key_bits(Rank rank, int unit) {
  return static_cast<int>(8 * sizeof(Key)) - (rank == Rank::kSigned ? 0 : 1) - unit;
}

template <typename Bits>
struct alignas(16) Group {
  Bits bits[kGroup];
};

// At an address that is a multiple of 16.
template <typename Bits>
__device__ __forceinline__ Group<Bits> load_group(const Bits* elements) {
  Group<Bits> group;
  constexpr int kWords = sizeof group / sizeof(uint4);
  uint4 words[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const uint4*>(elements)[i];
  __builtin_memcpy(&group, words, sizeof group);
  return group;
}

// visit(format) for the format of numbers that may be ranked by this kind of key: fp64 only by the wide one.
template <typename Key, typename Visit>
__device__ __forceinline__ void with_format(int64_t type, const Visit& visit) {
  switch (static_cast<FloatType>(type & 0xff)) {
    case FloatType::kFloat32:
      return visit(Float32{});
    case FloatType::kBFloat16:
      return visit(BFloat16{});
    case FloatType::kFloat16:
      return visit(Float16{});
    case FloatType::kFloat64:
      if constexpr (sizeof(Key) == 8) return visit(Float64{});
  }
}

// visit(Bits{}) for the width of a format: what moves numbers need not know more.
template <typename Visit>
__device__ __forceinline__ void with_bits(int64_t type, const Visit& visit) {
  switch (static_cast<FloatType>(type & 0xff)) {
    case FloatType::kFloat32:
      return visit(uint32_t{0});
    case FloatType::kBFloat16:
    case FloatType::kFloat16:
      return visit(uint16_t{0});
    case FloatType::kFloat64:
      return visit(uint64_t{0});
  }
}

}  // namespace granet::cuda
