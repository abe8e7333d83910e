#include "cpu/mask.h"

#include <algorithm>
#include <array>

#include "common/bits.h"

namespace granet::cpu {
namespace {

constexpr int64_t kWordBytes = sizeof(uint64_t);

template <typename Bits>
using Group = std::array<Bits, kWeightsPerByte>;

// Row b: all ones for the weights that are active in the mask byte b, all zeros for the others. Baseline SSE2 and NEON
// turn a row into two or four ANDs; computing it from the byte instead costs 1.3 times as long.
template <typename Bits>
constexpr auto kKeep = [] {
  std::array<Group<Bits>, 256> rows{};
  for (size_t bits = 0; bits < rows.size(); ++bits) {
    for (int64_t i = 0; i < kWeightsPerByte; ++i) {
      if (is_active(static_cast<uint8_t>(bits), i)) rows[bits][i] = static_cast<Bits>(~Bits{0});
    }
  }
  return rows;
}();

template <typename Bits>
void keep_active(Bits* weight, uint8_t bits, int64_t count) {
  const Group<Bits>& keep = kKeep<Bits>[bits];
  for (int64_t i = 0; i < count; ++i) weight[i] &= keep[i];
}

template <typename Bits>  // +0.0 is all zero bits: only the width of a weight matters
bool zero_inactive_bits(Bits* weight, const uint8_t* packed, int64_t numel) {
  const int64_t groups = numel / kWeightsPerByte;
  for (int64_t g = 0; g < groups; ++g) {
    if (packed[g] != kAllActive) keep_active(weight + g * kWeightsPerByte, packed[g], kWeightsPerByte);
  }
  const int64_t done = groups * kWeightsPerByte;
  if (done < numel) keep_active(weight + done, packed[groups], numel - done);
  return true;
}

}  // namespace

void pack_mask(const uint8_t* mask, int64_t numel, uint8_t* packed) {
  const int64_t groups = numel / kWeightsPerByte;
  for (int64_t g = 0; g < groups; ++g) {
    packed[g] = gather_bits(nonzero_bytes(load_word(mask + g * kWeightsPerByte)));
  }
  const int64_t done = groups * kWeightsPerByte;
  if (done == numel) return;
  uint8_t bits = 0;
  for (int64_t i = done; i < numel; ++i) bits |= static_cast<uint8_t>((mask[i] != 0) << (i - done));
  packed[groups] = bits;
}

void unpack_mask(const uint8_t* packed, int64_t numel, uint8_t* mask) {
  const int64_t groups = numel / kWeightsPerByte;
  for (int64_t g = 0; g < groups; ++g) store_word(mask + g * kWeightsPerByte, scatter_bits(packed[g]));
  for (int64_t i = groups * kWeightsPerByte; i < numel; ++i) mask[i] = is_active(packed[groups], i);
}

int64_t count_active(const uint8_t* packed, int64_t bytes) {
  // Byte-wise counts of a run of words are added up before they are summed across: baseline x86-64 has no popcount
  // instruction, and this form vectorises. 31 words of at most 8 ones a byte fit a byte.
  constexpr int64_t kRunWords = 31;
  const int64_t words = bytes / kWordBytes;
  int64_t active = 0;
  for (int64_t begin = 0; begin < words; begin += kRunWords) {
    const int64_t end = std::min(begin + kRunWords, words);
    uint64_t counts = 0;
    for (int64_t w = begin; w < end; ++w) counts += popcount_of_bytes(load_word(packed + w * kWordBytes));
    active += sum_of_bytes(counts);
  }
  for (int64_t b = words * kWordBytes; b < bytes; ++b) active += std::popcount(packed[b]);
  return active;
}

bool zero_inactive(void* weight, size_t item_size, const uint8_t* packed, int64_t numel) {
  switch (item_size) {
    case 1:
      return zero_inactive_bits(static_cast<uint8_t*>(weight), packed, numel);
    case 2:
      return zero_inactive_bits(static_cast<uint16_t*>(weight), packed, numel);
    case 4:
      return zero_inactive_bits(static_cast<uint32_t*>(weight), packed, numel);
    case 8:
      return zero_inactive_bits(static_cast<uint64_t*>(weight), packed, numel);
    default:
      return false;
  }
}

}  // namespace granet::cpu
