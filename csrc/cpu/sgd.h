// The update of torch.optim.SGD on active weights, for the CPU.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "cpu/parallel.h"
#include "cpu/sgd_chunk.h"

namespace granet::cpu {

// A parameter and what its update reads: all in the same order in memory, without gaps.
struct SgdTensor {
  void* param;
  const void* grad;     // of the parameter's dtype
  void* momentum;       // ignored where options.momentum is 0
  const uint8_t* mask;  // mask_bytes(numel) bytes
  int64_t numel;
  void* average = nullptr;  // in fp32 (fp64 where the parameter is), where there is one
};

// For every active weight w with gradient g and momentum v, in fp32 (fp64 where w or v is):
//     g = ±g / grad_scale + weight_decay * w;  v = momentum * v + (1 - dampening) * g;  w -= lr * (v, or g + momentum *
//     v)
// with v = g where `first`; then average += (1 - average_decay) * (w - average), of w as it was stored. Inactive
// weights, their momenta and averages keep their bits, NaN payloads included; where 64 weights, counted from the first,
// are inactive, none of them is read or written.
//
// Every sum of a product is rounded once where the instruction set has a fused multiply-add, like torch.optim.SGD's,
// and twice elsewhere; results do not depend on threads, sizes or alignment.
void masked_sgd(const std::vector<SgdTensor>& tensors, Dtype param, Dtype momentum, const SgdOptions& options,
                const Parallel& parallel);

}  // namespace granet::cpu
