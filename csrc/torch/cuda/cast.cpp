// The masked cast, namespace granet_cuda: an adaptor from tensors to cuda/cast.h.
#include "cuda/cast.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "torch/cuda/device.h"

namespace granet {
namespace {

// The dimensions of `target` that have more than one element, the fastest in its memory first.
std::vector<int64_t> dims_by_stride(const Tensor& target) {
  std::vector<int64_t> dims;
  for (int64_t d = target.dim() - 1; d >= 0; --d) {
    if (target.size(d) != 1) dims.push_back(d);
  }
  std::stable_sort(dims.begin(), dims.end(), [&](int64_t a, int64_t b) { return target.stride(a) < target.stride(b); });
  return dims;
}

// Neighbours that one stride of the source runs through are one dimension.
cuda::SourceOrder order_of(const Tensor& source, const Tensor& target) {
  cuda::SourceOrder order;
  for (const int64_t d : dims_by_stride(target)) {
    const int64_t size = source.size(d), stride = source.stride(d), last = order.dims - 1;
    if (order.dims > 0 && stride == order.size[last] * order.stride[last]) {
      order.size[last] *= size;
      continue;
    }
    STD_TORCH_CHECK(order.dims < cuda::kMostDims, "from: expected at most ", cuda::kMostDims,
                    " dimensions whose elements are not in the order of the target's");
    order.size[order.dims] = size;
    order.stride[order.dims++] = stride;
  }
  if (order.dims == 1 && order.stride[0] == 1) order.dims = 0;  // as in the target
  return order;
}

void mask_cast_out(Tensor from, Tensor mask, std::optional<Tensor> keep_all, Tensor to) {
  const int64_t numel = to.numel();
  check_dense_beside(to, numel, to, "to");
  check_packed_beside(mask, numel, to, "mask");
  check_beside(from, to, "from");
  bool is_same_shape = from.dim() == to.dim();
  for (int64_t d = 0; is_same_shape && d < to.dim(); ++d) is_same_shape = from.size(d) == to.size(d);
  STD_TORCH_CHECK(is_same_shape, "from: expected the shape of the target");
  if (keep_all.has_value()) {
    check_beside(*keep_all, to, "keep_all");
    STD_TORCH_CHECK(keep_all->scalar_type() == ScalarType::Bool && keep_all->numel() == 1,
                    "keep_all: expected a bool tensor of one element");
  }
  if (numel == 0) return;
  const OnDeviceOf device(to);
  const cuda::MaskCast cast = {
      .source = from.const_data_ptr(),
      .source_dtype = floating_dtype(from.scalar_type(), "from"),
      .order = order_of(from, to),
      .mask = static_cast<const uint8_t*>(mask.const_data_ptr()),
      .keep_all = keep_all.has_value() ? static_cast<const bool*>(keep_all->const_data_ptr()) : nullptr,
      .target = to.mutable_data_ptr(),
      .target_dtype = floating_dtype(to.scalar_type(), "to"),
      .numel = numel};
  check_cuda(cuda::launch_mask_cast(cast, device.stream()), "mask_cast");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(granet_cuda, m) {
  m.def("mask_cast_out(Tensor from, Tensor mask, Tensor? keep_all, Tensor(a!) to) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(granet_cuda, GRANET_CUDA_KEY, m) { m.impl("mask_cast_out", TORCH_BOX(&mask_cast_out)); }

}  // namespace granet
