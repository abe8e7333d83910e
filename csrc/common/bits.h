// The 1-bit mask and the word tricks its kernels share.
//
// Weight i, in storage order, is bit (i & 7) of byte (i >> 3): least significant bit first, 1 means active. Bits past
// the last weight are zero, and a packed mask is padded with zero bytes to a multiple of 16.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace granet {

static_assert(std::endian::native == std::endian::little, "eight mask bytes are read as one little-endian word");

constexpr int64_t kWeightsPerByte = 8;
constexpr int64_t kMaskAlignment = 16;  // bytes
constexpr uint8_t kAllActive = 0xff;

constexpr int64_t ceil_div(int64_t numerator, int64_t denominator) {
  return numerator / denominator + (numerator % denominator != 0);
}

constexpr int64_t floor_div(int64_t numerator, int64_t denominator) {
  return numerator / denominator - (numerator % denominator < 0);
}

// Bytes of a mask of `numel` weights that hold bits.
constexpr int64_t mask_bytes(int64_t numel) { return ceil_div(numel, kWeightsPerByte); }

// Bytes of a packed mask of `numel` weights, padding included.
constexpr int64_t packed_bytes(int64_t numel) { return ceil_div(mask_bytes(numel), kMaskAlignment) * kMaskAlignment; }

constexpr bool is_active(uint8_t bits, int64_t weight) { return (bits >> (weight & 7) & 1) != 0; }

// A word below is eight bytes; "byte i" is bits 8i to 8i + 7.

constexpr uint64_t kOneInEachByte = 0x0101'0101'0101'0101;

// Byte i is 1 where byte i of `word` is not zero, else 0.
constexpr uint64_t nonzero_bytes(uint64_t word) {
  constexpr uint64_t kLow7 = 0x7f * kOneInEachByte;  // a carry out of seven bits stays inside its byte
  return ((((word & kLow7) + kLow7) | word) >> 7) & kOneInEachByte;
}

// Bit i is byte i of `ones`, each of which is 0 or 1. The 64 partial products fall on 64 different bits, so nothing
// carries, and those of the top byte are exactly byte i * 2^(56 - 7i).
constexpr uint8_t gather_bits(uint64_t ones) { return static_cast<uint8_t>(ones * 0x0102'0408'1020'4080 >> 56); }

// Byte i is bit i of `bits`: the inverse of gather_bits.
constexpr uint64_t scatter_bits(uint8_t bits) {
  constexpr uint64_t kBitIInByteI = 0x8040'2010'0804'0201;
  return nonzero_bytes((bits * kOneInEachByte) & kBitIInByteI);
}

// Byte i is the number of ones in byte i of `word`.
constexpr uint64_t popcount_of_bytes(uint64_t word) {
  word -= (word >> 1) & 0x5555'5555'5555'5555;
  word = (word & 0x3333'3333'3333'3333) + ((word >> 2) & 0x3333'3333'3333'3333);
  return (word + (word >> 4)) & 0x0f0f'0f0f'0f0f'0f0f;
}

// The sum of the eight bytes of `word`, at most 8 * 255.
constexpr int64_t sum_of_bytes(uint64_t word) {
  constexpr uint64_t kEvenBytes = 0x00ff'00ff'00ff'00ff;
  const uint64_t pairs = (word & kEvenBytes) + ((word >> 8) & kEvenBytes);
  return static_cast<int64_t>(pairs * 0x0001'0001'0001'0001 >> 48);
}

inline uint64_t load_word(const void* address) {
  uint64_t word;
  std::memcpy(&word, address, sizeof word);
  return word;
}

inline void store_word(void* address, uint64_t word) { std::memcpy(address, &word, sizeof word); }

}  // namespace granet
