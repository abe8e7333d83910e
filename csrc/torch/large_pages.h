// Large pages for a tensor that is about to be filled (cpu/large_pages.h).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "cpu/large_pages.h"

namespace granet {

inline void prefer_large_pages(const torch::stable::Tensor& tensor) {
  cpu::prefer_large_pages(tensor.mutable_data_ptr(), static_cast<size_t>(tensor.numel()) * tensor.element_size());
}

}  // namespace granet
