// The groups of a chunk that have an active weight, for the kernel that passes over the others: compiled once for each
// instruction set. Without an instruction that counts bits the lists took a third of a step at 98 % sparsity.
#pragma once

#include "common/bits.h"
#include "cpu/sgd_chunk.h"

namespace granet::cpu {

// Row b: the places of the ones of b, in order.
struct Ones {
  uint8_t rows[256][8];
};
constexpr Ones kOnes = [] {
  Ones ones{};
  for (int bits = 0; bits < 256; ++bits) {
    int count = 0;
    for (uint8_t i = 0; i < 8; ++i) {
      if ((bits >> i & 1) != 0) ones.rows[bits][count++] = i;
    }
  }
  return ones;
}();

}  // namespace granet::cpu

namespace granet::cpu::GRANET_ISA {

// A list jumps over so many words of the mask at a time, two pages of weights and a little, so that the hardware sees
// no stream to run ahead of: in the order of memory it fetches the lines that are passed over as well. At 98 % random
// sparsity, in large pages, a Zen 4 takes 0.93 of the time of 17 words, a page, on one thread, 0.9 on two (29 to 37
// alike, 9 and 49 slower); in pages of 4 KiB the same.
constexpr int64_t kStride = 33;

class GroupList {
 public:
  // Of the words `first`, `first` + kStride, … of so many.
  void take(const uint8_t* mask, int64_t words, int64_t first) {
    size_ = 0;
    for (int64_t w = first; w < words; w += kStride) append(w * kWordGroups, load_word(mask + w * kWordGroups));
  }

  int64_t size() const { return size_; }
  int64_t operator[](int64_t i) const { return groups_[i]; }

 private:
  void append(int64_t first, uint64_t word) {  // no branch: which bytes are zero cannot be foreseen
    const uint8_t nonzero = gather_bits(nonzero_bytes(word));
    const uint8_t* places = kOnes.rows[nonzero];
    for (int64_t i = 0; i < kWordGroups; ++i) groups_[size_ + i] = static_cast<uint16_t>(first + places[i]);
    size_ += __builtin_popcount(nonzero);
  }

  uint16_t groups_[(kChunkGroups / kWordGroups / kStride + 2) * kWordGroups];  // a whole row of kOnes behind the last
  int64_t size_ = 0;
};

}  // namespace granet::cpu::GRANET_ISA
