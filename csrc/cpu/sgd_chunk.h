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
  bool first = false;  // the momentum is created: it is written, not read
};

// A run of weights in groups of eight, whole ones.
struct SgdChunk {
  void* param;
  const void* grad;
  void* momentum;          // without momentum the parameter, and not touched
  const uint8_t* mask;     // of group g: mask[g]
  const uint16_t* groups;  // those with an active weight, in the order of a visit; or null: look at each
  int64_t group_count;     // of `groups`, or of all
  bool fetches_ahead;      // without `groups`: what is used next
};

using SgdKernel = void (*)(const SgdChunk& chunk, const SgdOptions& options);

}  // namespace granet::cpu
