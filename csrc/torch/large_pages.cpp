// Large pages for tensors that stay, namespace granet_cpp: an adaptor from tensors to cpu/large_pages.h.
#include "torch/large_pages.h"

#include <cstdint>
#include <utility>
#include <vector>

#include "torch/checks.h"

namespace granet {
namespace {

void gather_in_large_pages(std::vector<Tensor> tensors) {
  std::vector<cpu::MemoryRange> ranges;
  for (const Tensor& tensor : tensors) {
    if (!tensor.is_cpu() || !is_dense(tensor)) continue;  // a hint finds no fault
    const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    ranges.push_back({begin, begin + static_cast<size_t>(tensor.numel()) * tensor.element_size()});
  }
  cpu::gather_in_large_pages(std::move(ranges));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(granet_cpp, m) { m.def("gather_in_large_pages(Tensor[] tensors) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(granet_cpp, CPU, m) { m.impl("gather_in_large_pages", TORCH_BOX(&gather_in_large_pages)); }

}  // namespace granet
