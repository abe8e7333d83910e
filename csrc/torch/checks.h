// What adaptors check again, since a direct call must not read or write out of bounds, and how they cut tensors.
#pragma once

#include <algorithm>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common/bits.h"
#include "common/dtype.h"

namespace granet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kSliceBytes = 64;  // of the mask: threads meet at its cache lines, 512 weights apart
constexpr int64_t kSliceWeights = kSliceBytes * kWeightsPerByte;
constexpr int64_t kGrainSlices = 64;  // 32 768 weights: some 10 microseconds, about what waking a thread costs

// kernel(first, count) over weights [first, first + count), from PyTorch's thread pool; first is a multiple of 512.
template <typename Kernel>
void for_each_slice(int64_t numel, const Kernel& kernel) {
  torch::stable::parallel_for(0, ceil_div(numel, kSliceWeights), kGrainSlices, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kSliceWeights;
    kernel(first, std::min(end * kSliceWeights, numel) - first);
  });
}

// "masks[3]": how errors name an element of a list.
inline std::string element(const char* list, size_t i) { return list + ("[" + std::to_string(i) + "]"); }

inline void check_contiguous(const Tensor& tensor, ScalarType dtype, const std::string& argument,
                             const char* expected) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == dtype && tensor.is_contiguous(), argument,
                  ": expected a contiguous ", expected, " tensor on the CPU");
}

inline void check_packed(const Tensor& packed, int64_t numel, const std::string& argument) {
  check_contiguous(packed, ScalarType::Byte, argument, "uint8");
  STD_TORCH_CHECK(packed.numel() >= mask_bytes(numel), argument, ": expected at least ", mask_bytes(numel),
                  " bytes for ", numel, " weights, got ", packed.numel());
}

// Whether the elements of `tensor`, whatever their order, lie within the numel() places from data_ptr() on.
inline bool is_dense(const Tensor& tensor) {
  if (tensor.numel() == 0) return true;
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  return last == tensor.numel() - 1;
}

// A tensor that a kernel walks by one index, together with others of as many elements.
inline void check_dense(const Tensor& tensor, int64_t numel, const std::string& argument) {
  STD_TORCH_CHECK(tensor.is_cpu() && is_dense(tensor) && tensor.numel() == numel, argument,
                  ": expected a dense tensor on the CPU with ", numel, " elements, got ", tensor.numel());
}

inline Dtype floating_dtype(ScalarType dtype, const std::string& argument) {
  switch (dtype) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBfloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(dtype == ScalarType::Double, argument, ": expected float32, bfloat16, float16 or float64");
      return Dtype::kFloat64;
  }
}

}  // namespace granet
