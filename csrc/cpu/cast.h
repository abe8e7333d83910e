// The masked copy of weights in another dtype, for the CPU.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace granet::cpu {

// to[i] = from[i] in the other dtype where bit i of `mask` is set, else +0.0. Rounds to nearest, ties to even; fp64
// becomes bf16 and fp16 by way of fp32, as in PyTorch. Bits are copied where the dtypes are equal.
//
// Runs on the calling thread. Reads from[0, numel) and mask[0, mask_bytes(numel)); writes to[0, numel). A caller that
// wants threads cuts the weights into slices that begin at a multiple of eight.
void mask_cast(const void* from, Dtype from_dtype, const uint8_t* mask, int64_t numel, void* to, Dtype to_dtype);

}  // namespace granet::cpu
