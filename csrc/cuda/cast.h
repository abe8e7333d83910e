// The masked weight in another dtype, and the gradient's way back, each in one pass.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cuda/launch.h"

namespace granet::cuda {

constexpr int kMostDims = 8;

// Where the source's elements are, for the target's in the order of its memory: dimension 0 is the fastest. Sizes of
// the dimensions in use are those of the target; none in use means that the source is in the target's order.
struct SourceOrder {
  int dims = 0;
  int64_t size[kMostDims];
  int64_t stride[kMostDims];
};

// target[i] = source[i] in the target's dtype where bit i is 1, or everywhere where *keep_all is; +0.0 elsewhere.
// `keep_all` lies on the device, or is null. Only what is kept is read, 16 bytes at a time or, of a source in another
// order, element by element.
struct MaskCast {
  const void* source;
  Dtype source_dtype;
  SourceOrder order;
  const uint8_t* mask;
  const bool* keep_all;
  void* target;
  Dtype target_dtype;
  int64_t numel;
};

cudaError_t launch_mask_cast(const MaskCast& cast, cudaStream_t stream);

}  // namespace granet::cuda
