// The index of a sparse layer, namespace granet_cpp: adaptors from tensors to cpu/stencil_index.h and cpu/active.h.
#include <cstdint>
#include <limits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "cpu/active.h"
#include "cpu/stencil_index.h"
#include "torch/checks.h"
#include "torch/conv_work.h"
#include "torch/parallel.h"

namespace granet {
namespace {

// Whether the source is best read where it is, if its planes and the target's are contiguous: with so many active
// weights.
bool reads_in_place(std::vector<int64_t> numbers, int64_t active, bool input_gradient) {
  const ConvShape shape = shape_of(numbers);
  const int64_t planes = input_gradient ? shape.out_channels : shape.channels;
  return cpu::can_read_in_place(shape) && cpu::is_faster_in_place(shape, planes, active);
}

std::vector<Tensor> stencil_index(Tensor mask, std::vector<int64_t> numbers, bool channels_last, bool input_gradient,
                                  bool in_place) {
  const ConvShape shape = shape_of(numbers);
  check_in_place(shape, in_place);
  check_packed(mask, shape.weights(), "mask");
  const int64_t active = cpu::count_weights(static_cast<const uint8_t*>(mask.const_data_ptr()), shape.weights());
  const Work work = work_of(shape, direction_of(input_gradient), active, in_place);
  STD_TORCH_CHECK(cpu::offsets_fit(work.stencil, work.plan), "shape: too large for the sparse convolution");
  Tensor begin = torch::stable::new_empty(mask, {work.plan.blocks * work.stencil.rows() + 1}, ScalarType::Long);
  const auto* bits = static_cast<const uint8_t*>(mask.const_data_ptr());
  auto* begins = static_cast<int64_t*>(begin.mutable_data_ptr());
  const cpu::WeightOrder order = order_of(channels_last);
  const Direction direction = direction_of(input_gradient);
  const int64_t entries = cpu::count_entries(bits, work.shape, order, direction, work.plan, begins);
  Tensor offset = torch::stable::new_empty(mask, {entries}, ScalarType::Int);
  const bool in_runs = cpu::entries_in_runs(order, direction, work.plan, begin.numel() - 1, entries);
  Tensor rank = torch::stable::new_empty(mask, {in_runs ? 0 : entries}, ScalarType::Int);
  Tensor first = torch::stable::new_empty(mask, {in_runs ? begin.numel() - 1 : 0}, ScalarType::Long);
  cpu::fill_entries(bits, work.shape, order, direction, work.plan,
                    {begins, static_cast<int32_t*>(offset.mutable_data_ptr()),
                     in_runs ? nullptr : static_cast<int32_t*>(rank.mutable_data_ptr()),
                     in_runs ? static_cast<int64_t*>(first.mutable_data_ptr()) : nullptr});
  return {begin, offset, rank, first};
}

// Where the active weights are, in storage order.
Tensor active_positions(Tensor mask, int64_t weights) {
  check_packed(mask, weights, "mask");
  STD_TORCH_CHECK(weights <= std::numeric_limits<int32_t>::max(), "weights: too many for 32-bit positions");
  const auto* bits = static_cast<const uint8_t*>(mask.const_data_ptr());
  Tensor positions = torch::stable::new_empty(mask, {cpu::count_weights(bits, weights)}, ScalarType::Int);
  cpu::list_active(bits, weights, static_cast<int32_t*>(positions.mutable_data_ptr()));
  return positions;
}

// source[at] in float32, rounded to bfloat16 first if asked; `rising` as in cpu/active.h.
Tensor gather(Tensor source, Tensor at, bool to_bfloat16, bool rising) {
  check_contiguous(at, ScalarType::Int, "at", "int32");
  Tensor values = torch::stable::new_empty(at, {at.numel()}, ScalarType::Float);
  const double nanoseconds = static_cast<double>(at.numel()) * (rising ? cpu::kFetchNanoseconds : 1);
  cpu::gather(source.const_data_ptr(), element_of(source, "source"),
              {static_cast<const int32_t*>(at.const_data_ptr()), at.numel(), rising}, to_bfloat16,
              static_cast<float*>(values.mutable_data_ptr()), TorchThreads(nanoseconds));
  return values;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(granet_cpp, m) {
  m.def("reads_in_place(int[] shape, int active, bool input_gradient) -> bool");
  m.def("stencil_index(Tensor mask, int[] shape, bool channels_last, bool input_gradient, bool in_place) -> Tensor[]");
  m.def("active_positions(Tensor mask, int weights) -> Tensor");
  m.def("gather(Tensor source, Tensor at, bool to_bfloat16, bool rising) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(granet_cpp, CompositeExplicitAutograd, m) {
  m.impl("reads_in_place", TORCH_BOX(&reads_in_place));
}

STABLE_TORCH_LIBRARY_IMPL(granet_cpp, CPU, m) {
  m.impl("stencil_index", TORCH_BOX(&stencil_index));
  m.impl("active_positions", TORCH_BOX(&active_positions));
  m.impl("gather", TORCH_BOX(&gather));
}

}  // namespace granet
