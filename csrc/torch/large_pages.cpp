// Large pages for tensors that stay, namespace granet_cpp: an adaptor from tensors to cpu/large_pages.h.
#include "torch/large_pages.h"

#include <vector>

#include "torch/checks.h"

namespace granet {
namespace {

void gather_in_large_pages(std::vector<Tensor> tensors) {
  std::vector<cpu::MemoryRange> ranges;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t numel = tensors[i].numel();
    check_dense(tensors[i], numel, element("tensors", i));
    const auto first = reinterpret_cast<uintptr_t>(tensors[i].const_data_ptr());
    ranges.push_back({first, first + static_cast<size_t>(numel) * tensors[i].element_size()});
  }
  cpu::gather_in_large_pages(std::move(ranges));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(granet_cpp, m) { m.def("gather_in_large_pages(Tensor[] tensors) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(granet_cpp, CPU, m) { m.impl("gather_in_large_pages", TORCH_BOX(&gather_in_large_pages)); }

}  // namespace granet
