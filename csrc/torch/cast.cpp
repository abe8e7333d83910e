// The masked cast, namespace granet_cpp: an adaptor from tensors to cpu/cast.h.
#include "cpu/cast.h"

#include "torch/checks.h"
#include "torch/large_pages.h"

namespace granet {
namespace {

void mask_cast_out(Tensor from, Tensor mask, Tensor to) {
  const int64_t numel = from.numel();
  check_dense(from, numel, "from");
  check_dense(to, numel, "to");
  check_packed(mask, numel, "mask");
  const Dtype from_dtype = floating_dtype(from.scalar_type(), "from");
  const Dtype to_dtype = floating_dtype(to.scalar_type(), "to");
  const auto* source = static_cast<const std::byte*>(from.const_data_ptr());
  const auto* packed = static_cast<const uint8_t*>(mask.const_data_ptr());
  prefer_large_pages(to);
  auto* target = static_cast<std::byte*>(to.mutable_data_ptr());
  for_each_slice(numel, [=](int64_t first, int64_t count) {
    cpu::mask_cast(source + first * item_size(from_dtype), from_dtype, packed + first / kWeightsPerByte, count,
                   target + first * item_size(to_dtype), to_dtype);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(granet_cpp, m) { m.def("mask_cast_out(Tensor from, Tensor mask, Tensor(a!) to) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(granet_cpp, CPU, m) { m.impl("mask_cast_out", TORCH_BOX(&mask_cast_out)); }

}  // namespace granet
