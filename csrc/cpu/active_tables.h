// What the kernels of active.h take, compiled once for each instruction set (active_kernel.h).
#pragma once

#include <cstdint>

namespace granet::cpu {

constexpr int64_t kWordWeights = 64;      // that a word of a mask tells of
constexpr int64_t kStreamAlignment = 64;  // of what is written past the caches, bytes

struct SpreadTask {
  const float* values;  // of the weights that are active, in turn
  const float* end;     // of the values: none behind them is read, should the mask have more bits
  const uint8_t* mask;
  int64_t words;  // whole ones of the mask
  void* target;   // their weights
  bool streams;   // past the caches, in which nobody will look for them: the target is kStreamAlignment bytes aligned
};

struct ActiveKernels {
  // The next value for every weight whose bit is set, and 0 for every other.
  void (*spread_to_float)(const SpreadTask&);
  void (*spread_to_bfloat16)(const SpreadTask&);
};
extern const ActiveKernels active_kernels_portable;
extern const ActiveKernels active_kernels_avx2;
extern const ActiveKernels active_kernels_avx512;

}  // namespace granet::cpu
