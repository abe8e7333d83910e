// What csrc/cpu/sgd.cpp hands to its kernels: plain data, shared by all instruction sets.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace granet::cpu {

// Hyperparameters of masked_sgd.
struct SgdOptions {
  double lr = 0;
  double momentum = 0;  // 0: there is none, and none is read or written
  double dampening = 0;
  double weight_decay = 0;
  double grad_scale = 1;
  bool nesterov = false;
  bool maximize = false;
  bool first = false;        // the momentum is created: it is written, not read
  double average_decay = 0;  // of averages, where there are any
};

// A run of weights in groups of eight, whole ones.
struct SgdChunk {
  void* param;
  const void* grad;
  void* momentum;       // without momentum the parameter, and not touched
  const uint8_t* mask;  // of group g: mask[g]
  int64_t group_count;
  bool is_listed;      // few groups have an active weight: they are listed, and the others passed over
  bool fetches_ahead;  // unless it is listed: what is used next
};

using SgdKernel = void (*)(const SgdChunk& chunk, const SgdOptions& options);

// The averages of a run of weights that have just been updated.
struct AverageChunk {
  void* average;  // in the dtype that the parameter is computed in
  const void* param;
  const uint8_t* mask;
  int64_t group_count;
  bool is_listed;
  bool fetches_ahead;
};

using AverageKernel = void (*)(const AverageChunk& chunk, double decay);

// 65 536 weights: some 30 microseconds. With a quarter of it two threads took 1.02 times as long at 50 to 95 %
// sparsity. Threads meet between cache lines if the tensors begin at one.
constexpr int64_t kChunkGroups = 8192;
constexpr int64_t kWordGroups = 8;  // mask bytes that are looked at together

}  // namespace granet::cpu
