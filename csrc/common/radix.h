// Keys: floating numbers as integers of the same order, so that selection by rank is radix work on integers.
//
// A key is signed because AVX2 compares only signed integers. It holds the number in fp32 (32 bits) or in fp64
// (64 bits): fp32, bf16 and fp16 share the first, and all four formats the second, so keys of tensors of different
// formats compare as the numbers do. All work is on integers, so that a mode of the processor that flushes
// subnormal numbers to zero changes nothing.
//
// Every function here is inlined without exception: the file is included under several instruction sets, and a copy
// that is compiled for the widest must not serve the others. For the same reason it includes nothing but <cstdint>.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GRANET_INLINE __host__ __device__ __forceinline__
#else
#define GRANET_INLINE inline __attribute__((always_inline))
#endif

namespace granet {

enum class FloatType : uint8_t { kFloat32, kBFloat16, kFloat16, kFloat64 };
constexpr int kFloatTypes = 4;

// What ranks high. Equal numbers have equal keys, +0.0 and -0.0 among them, and so have all NaN.
enum class Rank : uint8_t {
  kMagnitude,  // |x|, NaN above infinity
  kGain,       // |x|, NaN below zero
  kSigned,     // x, NaN below -infinity
};
constexpr int kRanks = 3;

struct Float32 {
  using Bits = uint32_t;
  using Native = float;
  static constexpr int kMantissa = 23, kBias = 127;
};
struct BFloat16 {
  using Bits = uint16_t;
  static constexpr int kMantissa = 7, kBias = 127;
};
struct Float16 {
  using Bits = uint16_t;
  static constexpr int kMantissa = 10, kBias = 15;
};
struct Float64 {
  using Bits = uint64_t;
  using Native = double;
  static constexpr int kMantissa = 52, kBias = 1023;
};

template <typename Format>
constexpr typename Format::Bits kInfinity =
    static_cast<typename Format::Bits>(typename Format::Bits{2 * Format::kBias + 1} << Format::kMantissa);

template <typename Key>
struct KeyTraits;
template <>
struct KeyTraits<int32_t> {
  using Format = Float32;
  using Unsigned = uint32_t;
  static constexpr int32_t kLowest = INT32_MIN;
};
template <>
struct KeyTraits<int64_t> {
  using Format = Float64;
  using Unsigned = uint64_t;
  static constexpr int64_t kLowest = INT64_MIN;
};

// The bits of a magnitude (no sign) in a wider format, exactly. What is NaN stays above infinity.
template <typename From, typename To>
GRANET_INLINE constexpr typename To::Bits widen(typename From::Bits magnitude) {
  using Bits = typename To::Bits;
  const Bits shifted = static_cast<Bits>(Bits{magnitude} << (To::kMantissa - From::kMantissa));
  if constexpr (From::kBias == To::kBias) {
    return shifted;
  } else {
    constexpr Bits kRebias = Bits{To::kBias - From::kBias} << To::kMantissa;
    using Native = typename To::Native;
    constexpr Native kLeast =  // the smallest subnormal number: 2^(1 - bias - mantissa)
        __builtin_bit_cast(Native, Bits{To::kBias + 1 - From::kBias - From::kMantissa} << To::kMantissa);
    const Bits bits = magnitude;
    const Bits subnormal =
        __builtin_bit_cast(Bits, static_cast<Native>(static_cast<int32_t>(magnitude)) * kLeast);  // exact
    const Bits normal = shifted + kRebias;
    const Bits number = bits < (Bits{1} << From::kMantissa) ? subnormal : normal;
    return bits < Bits{kInfinity<From>} ? number : normal + kRebias;  // the exponent that is all ones
  }
}

template <typename Format, Rank rank, typename Key>
GRANET_INLINE constexpr Key key_of(typename Format::Bits bits) {
  using To = typename KeyTraits<Key>::Format;
  constexpr int kSign = static_cast<int>(8 * sizeof bits) - 1;
  constexpr auto kLargest = static_cast<Key>(kInfinity<To>);
  const auto magnitude = static_cast<typename Format::Bits>(bits & ((typename Format::Bits{1} << kSign) - 1));
  const auto key = static_cast<Key>(widen<Format, To>(magnitude));
  if constexpr (rank == Rank::kMagnitude) return key > kLargest ? kLargest + 1 : key;
  if constexpr (rank == Rank::kGain) return key > kLargest ? Key{-1} : key;
  const Key number = bits >> kSign != 0 ? -key : key;
  return key > kLargest ? KeyTraits<Key>::kLowest : number;
}

// A range of keys, both ends included.
template <typename Key>
struct KeyRange {
  Key low;
  Key high;

  GRANET_INLINE constexpr bool is_single() const { return low == high; }
};

template <typename Key>
GRANET_INLINE constexpr KeyRange<Key> all_keys(Rank rank) {
  constexpr auto kLargest = static_cast<Key>(kInfinity<typename KeyTraits<Key>::Format>);
  if (rank == Rank::kMagnitude) return {0, kLargest + 1};
  return {rank == Rank::kGain ? Key{-1} : KeyTraits<Key>::kLowest, kLargest};
}

// A digit is the place of a key in a range that is cut into at most kDigits parts of 2^shift keys. Over all magnitudes
// of fp32 (31 bits), then inside one part, and again, digits take 12, 12 and 7 bits. 4096 counters of four bytes fill
// half of a first-level cache of 32 KiB.
constexpr int kDigitBits = 12;
constexpr int64_t kDigits = int64_t{1} << kDigitBits;

template <typename Key>
struct Digits {
  using Unsigned = typename KeyTraits<Key>::Unsigned;
  KeyRange<Key> range;
  int shift;

  GRANET_INLINE constexpr explicit Digits(KeyRange<Key> keys) : range(keys), shift(0) {
    while (span() >> shift >= static_cast<Unsigned>(kDigits)) ++shift;
  }

  GRANET_INLINE constexpr Unsigned span() const { return offset(range.high); }

  // Above span() for a key outside the range.
  GRANET_INLINE constexpr Unsigned offset(Key key) const {
    return static_cast<Unsigned>(key) - static_cast<Unsigned>(range.low);
  }

  // Of a key inside the range.
  GRANET_INLINE constexpr int64_t digit(Key key) const { return static_cast<int64_t>(offset(key) >> shift); }

  // The keys that have this digit.
  GRANET_INLINE constexpr KeyRange<Key> part(int64_t digit) const {
    const Unsigned first = static_cast<Unsigned>(digit) << shift;
    const Unsigned last = first + ((Unsigned{1} << shift) - 1);
    const auto low = static_cast<Unsigned>(range.low);
    return {static_cast<Key>(low + first), static_cast<Key>(low + (last < span() ? last : span()))};
  }
};

}  // namespace granet
