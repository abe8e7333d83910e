// Operators on masks, namespace granet_cuda: adaptors from tensors to the launchers of cuda/mask.h.
//
// The public operators (namespace granet) have checked every argument before these run. What is checked again here is
// what keeps a direct call from reading or writing out of bounds.
#include "cuda/mask.h"

#include <vector>

#include "torch/cuda/table.h"

namespace granet {
namespace {

Tensor pack_mask(Tensor mask) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.is_contiguous(),
                  "mask: expected a contiguous bool tensor");
  const OnDeviceOf device(mask);
  Tensor packed = torch::stable::new_empty(mask, {packed_bytes(mask.numel())}, ScalarType::Byte);
  check_cuda(cuda::launch_pack_mask(static_cast<const uint8_t*>(mask.const_data_ptr()), mask.numel(),
                                    static_cast<uint8_t*>(packed.mutable_data_ptr()), device.stream()),
             "pack_mask");
  return packed;
}

Tensor unpack_mask(Tensor packed, int64_t numel) {
  STD_TORCH_CHECK(numel >= 0, "numel: expected a number >= 0, got ", numel);
  check_packed_beside(packed, numel, packed, "packed");
  const OnDeviceOf device(packed);
  Tensor mask = torch::stable::new_empty(packed, {numel}, ScalarType::Bool);
  check_cuda(cuda::launch_unpack_mask(static_cast<const uint8_t*>(packed.const_data_ptr()), numel,
                                      static_cast<uint8_t*>(mask.mutable_data_ptr()), device.stream()),
             "unpack_mask");
  return mask;
}

Tensor count_active(std::vector<Tensor> masks) {
  STD_TORCH_CHECK(!masks.empty(), "masks: expected at least one tensor, got none");
  cuda::TableRows rows(/*lists=*/1, /*further=*/0, cuda::kCountChunk);
  for (size_t i = 0; i < masks.size(); ++i) {
    check_packed_beside(masks[i], 0, masks[0], element("masks", i));
    rows.begin_row(masks[i].numel());
    rows.add(masks[i].const_data_ptr());
  }
  const OnDeviceOf device(masks[0]);
  Tensor counts = torch::stable::new_zeros(masks[0], {static_cast<int64_t>(masks.size())}, ScalarType::Long);
  const DeviceTable table = device_table(rows, masks[0], device.stream());
  auto* ones = static_cast<unsigned long long*>(counts.mutable_data_ptr());
  check_cuda(cuda::launch_count_active(table.table, ones, device.stream()), "count_active");
  return counts;
}

void zero_inactive_(std::vector<Tensor> tensors, std::vector<Tensor> masks) {
  STD_TORCH_CHECK(!tensors.empty(), "tensors: expected at least one tensor, got none");
  STD_TORCH_CHECK(tensors.size() == masks.size(), "masks: expected one for each of the ", tensors.size(),
                  " tensors, got ", masks.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t numel = tensors[i].numel();
    check_dense_beside(tensors[i], numel, tensors[0], element("tensors", i));
    check_packed_beside(masks[i], numel, tensors[0], element("masks", i));
    const size_t size = tensors[i].element_size();
    STD_TORCH_CHECK(size == 2 || size == 4 || size == 8, element("tensors", i),
                    ": expected elements of 2, 4 or 8 bytes, got ", size);
  }
  const OnDeviceOf device(tensors[0]);
  for (const size_t size : {2, 4, 8}) {
    cuda::TableRows rows(/*lists=*/2, /*further=*/0, cuda::kZeroChunk);
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (static_cast<size_t>(tensors[i].element_size()) != size) continue;
      rows.begin_row(tensors[i].numel());
      rows.add(tensors[i].mutable_data_ptr());
      rows.add(masks[i].const_data_ptr());
    }
    if (rows.chunks() == 0) continue;
    const DeviceTable table = device_table(rows, tensors[0], device.stream());
    check_cuda(cuda::launch_zero_inactive(table.table, size, device.stream()), "zero_inactive_");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(granet_cuda, m) {
  m.def("pack_mask(Tensor mask) -> Tensor");
  m.def("unpack_mask(Tensor packed, int numel) -> Tensor");
  m.def("count_active(Tensor[] masks) -> Tensor");
  m.def("zero_inactive_(Tensor(a!)[] tensors, Tensor[] masks) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(granet_cuda, GRANET_CUDA_KEY, m) {
  m.impl("pack_mask", TORCH_BOX(&pack_mask));
  m.impl("unpack_mask", TORCH_BOX(&unpack_mask));
  m.impl("count_active", TORCH_BOX(&count_active));
  m.impl("zero_inactive_", TORCH_BOX(&zero_inactive_));
}

}  // namespace granet
