// Operators on masks, namespace granet_cpp: adaptors from tensors to the kernels of cpu/mask.h.
//
// The public operators (namespace granet) have checked every argument before these run. What is checked again here is
// what keeps a direct call from reading or writing out of bounds.
#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/bits.h"
#include "cpu/mask.h"
#include "torch/checks.h"

namespace granet {
namespace {

Tensor pack_mask(Tensor mask) {
  check_contiguous(mask, ScalarType::Bool, "mask", "bool");
  const int64_t numel = mask.numel();
  Tensor packed = torch::stable::new_empty(mask, {packed_bytes(numel)}, ScalarType::Byte);
  const auto* from = static_cast<const uint8_t*>(mask.const_data_ptr());
  auto* to = static_cast<uint8_t*>(packed.mutable_data_ptr());
  for_each_slice(
      numel, [=](int64_t first, int64_t count) { cpu::pack_mask(from + first, count, to + first / kWeightsPerByte); });
  std::fill(to + mask_bytes(numel), to + packed_bytes(numel), uint8_t{0});
  return packed;
}

Tensor unpack_mask(Tensor packed, int64_t numel) {
  STD_TORCH_CHECK(numel >= 0, "numel: expected a number >= 0, got ", numel);
  check_packed(packed, numel, "packed");
  Tensor mask = torch::stable::new_empty(packed, {numel}, ScalarType::Bool);
  const auto* from = static_cast<const uint8_t*>(packed.const_data_ptr());
  auto* to = static_cast<uint8_t*>(mask.mutable_data_ptr());
  for_each_slice(numel, [=](int64_t first, int64_t count) {
    cpu::unpack_mask(from + first / kWeightsPerByte, count, to + first);
  });
  return mask;
}

Tensor count_active(std::vector<Tensor> masks) {
  STD_TORCH_CHECK(!masks.empty(), "masks: expected at least one tensor, got none");
  for (size_t i = 0; i < masks.size(); ++i) check_packed(masks[i], 0, "masks[" + std::to_string(i) + "]");
  Tensor counts = torch::stable::new_empty(masks[0], {static_cast<int64_t>(masks.size())}, ScalarType::Long);
  auto* count = static_cast<int64_t*>(counts.mutable_data_ptr());
  for (const Tensor& mask : masks) {
    const auto* packed = static_cast<const uint8_t*>(mask.const_data_ptr());
    std::atomic<int64_t> active = 0;
    for_each_slice(mask.numel() * kWeightsPerByte, [&](int64_t first, int64_t weights) {
      active += cpu::count_active(packed + first / kWeightsPerByte, weights / kWeightsPerByte);
    });
    *count++ = active;
  }
  return counts;
}

void zero_inactive_(std::vector<Tensor> tensors, std::vector<Tensor> masks) {
  STD_TORCH_CHECK(tensors.size() == masks.size(), "masks: expected one for each of the ", tensors.size(),
                  " tensors, got ", masks.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    STD_TORCH_CHECK(tensors[i].is_cpu() && is_dense(tensors[i]), "tensors[", i,
                    "]: expected a dense tensor on the CPU");
    STD_TORCH_CHECK(std::has_single_bit(tensors[i].element_size()) && tensors[i].element_size() <= 8, "tensors[", i,
                    "]: expected elements of 1, 2, 4 or 8 bytes, got ", tensors[i].element_size());
    check_packed(masks[i], tensors[i].numel(), "masks[" + std::to_string(i) + "]");
  }
  for (size_t i = 0; i < tensors.size(); ++i) {
    auto* weight = static_cast<std::byte*>(tensors[i].mutable_data_ptr());
    const auto* packed = static_cast<const uint8_t*>(masks[i].const_data_ptr());
    const size_t item_size = tensors[i].element_size();
    for_each_slice(tensors[i].numel(), [=](int64_t first, int64_t count) {
      cpu::zero_inactive(weight + first * static_cast<int64_t>(item_size), item_size, packed + first / kWeightsPerByte,
                         count);
    });
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(granet_cpp, m) {
  m.def("pack_mask(Tensor mask) -> Tensor");
  m.def("unpack_mask(Tensor packed, int numel) -> Tensor");
  m.def("count_active(Tensor[] masks) -> Tensor");
  m.def("zero_inactive_(Tensor(a!)[] tensors, Tensor[] masks) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(granet_cpp, CPU, m) {
  m.impl("pack_mask", TORCH_BOX(&pack_mask));
  m.impl("unpack_mask", TORCH_BOX(&unpack_mask));
  m.impl("count_active", TORCH_BOX(&count_active));
  m.impl("zero_inactive_", TORCH_BOX(&zero_inactive_));
}

}  // namespace granet
