// The kernels of selection that are compiled once for each instruction set (select_kernel.h).
#pragma once

#include <cstdint>

#include "common/radix.h"

namespace granet::cpu {

// Elements are handled in blocks of one word of the mask.
constexpr int64_t kBlock = 64;

// Two candidates, because a block has about one.
constexpr int64_t kGatherAhead = 2;

// The elements [first, first + count) of a tensor, some of which are eligible. `first` is a multiple of kBlock.
struct Slice {
  const void* values;
  const uint8_t* bits;  // a packed mask of the whole tensor; null: no bit is set
  uint64_t flip;        // 0: eligible where the bit is 1; all ones: where it is 0
  int64_t first;
  int64_t count;
};

struct Split {
  int64_t above;
  int64_t within;
};

// Where a split is, and packed masks for the keys above the range and within it. Bit 0 of each is element slice.first;
// whole words are written.
template <typename Key>
struct Marks {
  KeyRange<Key> range;
  uint8_t* above;
  uint8_t* within;
};

template <typename Key>
struct KeyKernels {
  // keys[i] = the key of values[first + i], for i in [0, 8).
  void (*keys)(const void* values, int64_t first, Key* keys);

  // Marks the eligible keys and counts them: split[0] by one range, split[1] by two, each with its marks and its
  // counts. Blocks without an eligible element are not read.
  void (*split[2])(const Slice& slice, const Marks<Key>* marks, Split* counts);

  // Keys and places (element - slice.first) where `within`, as split writes it, is set; in order. Up to kGatherAhead
  // places behind them are written too.
  void (*gather)(const Slice& slice, const uint8_t* within, Key* keys, uint16_t* places);

  // Adds the eligible keys inside digits.range to counts[digit].
  void (*count)(const Slice& slice, const Digits<Key>& digits, uint32_t* counts);
};

struct SelectTable {
  KeyKernels<int32_t> narrow[kRanks][kFloatTypes];  // none for fp64
  KeyKernels<int64_t> wide[kRanks][kFloatTypes];

  // By the logarithm of the item size (1 to 3 for 2 to 8 bytes): element i = +0.0 where bit i of `keep` is 0, for i in
  // [first, first + count). Cache lines that are so already are not written.
  void (*zero[4])(void* values, int64_t first, int64_t count, const uint8_t* keep);
};

extern const SelectTable select_portable;
extern const SelectTable select_avx2;
extern const SelectTable select_avx512;

}  // namespace granet::cpu
