// The gradients of sparse convolution and linear layers, namespace granet_cpp (conv.cpp).
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common/bfloat16.h"
#include "cpu/active.h"
#include "cpu/conv.h"
#include "torch/checks.h"
#include "torch/conv_operands.h"
#include "torch/conv_work.h"
#include "torch/large_pages.h"
#include "torch/parallel.h"

namespace granet {
namespace {

// A gradient in the layout of the input, in `memory`, where there is some; and where the kernels write it, whose pixels
// are evenly spaced.
struct InputGradient {
  Tensor gradient;
  Tensor written;

  InputGradient(const Tensor& input, const std::optional<Tensor>& memory, const ConvShape& shape)
      : gradient(memory.has_value() ? *memory : torch::stable::empty_like(input)),
        written(is_evenly_spaced(gradient)
                    ? gradient
                    : torch::stable::new_empty(input, {shape.batch, shape.channels, shape.input.h, shape.input.w})) {
    prefer_large_pages(written);
  }

  Tensor finished() {
    if (written.const_data_ptr() == gradient.const_data_ptr()) return gradient;
    return torch::stable::copy_(gradient, written);
  }
};

// The transpose of conv(., values), of grad_output, in the layout of the input.
Tensor input_gradient(const Tensor& input, const Tensor& grad_output, const std::optional<Tensor>& memory,
                      const float* values, const std::vector<Tensor>& index, const ConvShape& shape, bool in_place) {
  check_in_place(shape, in_place);
  const Work work = work_of(shape, Direction::kInputGradient, entries_in(index), in_place);
  const cpu::StencilEntries entries = entries_of(index, work, values);
  check_size(input, "input", shape.batch, shape.channels, shape.input);
  InputGradient result(input, memory, shape);
  const ImageView source = view_for(grad_output, "grad_output", shape, in_place);
  const ImageView target = view_for(result.written, "gradient", shape, in_place);
  cpu::run_stencil(work.stencil, work.plan, entries, source, nullptr, {nullptr, false}, target,
                   TorchThreads(time_of(shape, entries_in(index))));
  return result.finished();
}

// Sums over pixels for the active weights, in storage order, after room for those of the parts that they are added up
// from.
struct WeightSums {
  Tensor memory;
  float* partial;
  float* sums;

  WeightSums(const Known& known, const Plan& plan) {
    const int64_t count = known.positions.numel(), parts = cpu::gradient_parts(plan);
    memory = torch::stable::new_empty(known.positions, {count * (parts + 1)}, ScalarType::Float);
    partial = static_cast<float*>(memory.mutable_data_ptr());
    sums = partial + count * parts;
  }
};

// As a gradient in the layout of the weight: zero but for the active weights. In `memory`, where there is some.
Tensor spread_sums(const WeightSums& found, const Tensor& weight, const Tensor& input,
                   const std::optional<Tensor>& memory, const Known& known, const ConvShape& shape) {
  const int64_t count = known.positions.numel();
  if (rounds_to_bfloat16(input)) {  // computed in the input's dtype, as autocast does
    for (int64_t i = 0; i < count; ++i) found.sums[i] = round_to_bfloat16(found.sums[i]);
  }
  const Tensor gradient = memory.has_value() ? *memory : torch::stable::empty_like(weight);
  prefer_large_pages(gradient);
  const cpu::Active active = {static_cast<const uint8_t*>(known.bits.const_data_ptr()), shape.weights(),
                              static_cast<const int32_t*>(known.positions.const_data_ptr()), count};
  cpu::spread(found.sums, active, gradient.mutable_data_ptr(), element_of(gradient, "gradient"),
              TorchThreads(static_cast<double>(shape.weights()) * 0.3));
  return gradient;
}

void check_entries(const std::vector<Tensor>& index, const Known& known) {
  STD_TORCH_CHECK(entries_in(index) == known.positions.numel(), "index: expected ", known.positions.numel(),
                  " entries");
}

Tensor weight_gradient(const Tensor& weight, const Tensor& grad_output, const Tensor& input,
                       const std::optional<Tensor>& memory, const Known& known, const std::vector<Tensor>& index,
                       const ConvShape& shape, bool in_place) {
  check_in_place(shape, in_place);
  const Work work = work_of(shape, Direction::kForward, entries_in(index), in_place);
  const cpu::StencilEntries entries = entries_of(index, work, nullptr);
  check_size(input, "input", shape.batch, shape.channels, shape.input);
  const ImageView source = view_for(input, "input", shape, in_place);
  const ImageView factor = view_for(grad_output, "grad_output", shape, in_place);
  check_entries(index, known);
  const int64_t count = known.positions.numel();
  const WeightSums found(known, work.plan);
  cpu::correlate_stencil(work.stencil, work.plan, entries, ranks_of(index), count, source, factor, found.partial,
                         found.sums, TorchThreads(time_of(shape, count)));
  return spread_sums(found, weight, input, memory, known, shape);
}

// For the gradients, of the dtype and layout of what they are of; where there is some.
struct Memory {
  std::optional<Tensor> input, weight;
};

// Whether both gradients are computed at once. Few pixels, as a linear layer's 32 rows, gain less than it takes to put
// the products into the order of the weights.
bool are_computed_at_once(const ConvShape& shape, const Tensor& input, bool in_place) {
  constexpr int64_t kFewPixels = 64;
  if (shape.batch * shape.input.h * shape.input.w < kFewPixels) return false;
  return !in_place || (is_evenly_spaced(input) && has_planes(input, view_of(input, "input", true), shape));
}

// Those of the input and of the weight, from an index for the input's and its values.
std::vector<Tensor> both_gradients(const Tensor& weight, const Tensor& grad_output, const Tensor& input,
                                   const Memory& memory, const float* values, const Known& known,
                                   const std::vector<Tensor>& index, const ConvShape& shape, bool in_place) {
  check_in_place(shape, in_place);
  const Work work = work_of(shape, Direction::kInputGradient, entries_in(index), in_place);
  const cpu::StencilEntries entries = entries_of(index, work, values);
  check_size(input, "input", shape.batch, shape.channels, shape.input);
  check_entries(index, known);
  InputGradient result(input, memory.input, shape);
  const ImageView source = view_for(grad_output, "grad_output", shape, in_place);
  const ImageView factor = view_for(input, "input", shape, in_place);
  const ImageView target = view_for(result.written, "gradient", shape, in_place);
  const int64_t count = known.positions.numel();
  const WeightSums found(known, work.plan);
  cpu::differentiate_stencil(work.stencil, work.plan, entries, ranks_of(index), count, source, factor, target,
                             found.partial, found.sums, TorchThreads(2 * time_of(shape, count)));
  return {result.finished(), spread_sums(found, weight, input, memory.weight, known, shape)};
}

void check_alike(const std::optional<Tensor>& memory, const Tensor& tensor, const char* name) {
  if (!memory.has_value()) return;
  STD_TORCH_CHECK(memory->scalar_type() == tensor.scalar_type() && memory->dim() == tensor.dim(), name,
                  ": expected the dtype and shape of what its gradient is of");
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    STD_TORCH_CHECK(memory->size(d) == tensor.size(d) && memory->stride(d) == tensor.stride(d), name,
                    ": expected the shape and strides of what its gradient is of");
  }
}

// The gradients that are needed, of the input and of the weight; `stored` as above, if it is at hand. Nothing where the
// mask has other bits.
std::vector<Tensor> masked_conv_backward(Tensor grad_output, Tensor input, Tensor weight, std::optional<Tensor> stored,
                                         Tensor mask, std::vector<Tensor> known_tensors,
                                         std::vector<Tensor> input_index, std::vector<Tensor> weight_index,
                                         std::vector<int64_t> numbers, bool input_in_place, bool weight_in_place,
                                         std::optional<Tensor> input_memory, std::optional<Tensor> weight_memory,
                                         bool needs_input, bool needs_weight) {
  const ConvShape shape = shape_of(numbers);
  check_weight(weight, shape, "weight");
  check_alike(input_memory, input, "input_memory");
  check_alike(weight_memory, weight, "weight_memory");
  const Memory memory{input_memory, weight_memory};
  check_size(grad_output, "grad_output", shape.batch, shape.out_channels, shape.output());
  const Known known = known_of(known_tensors, shape.weights());
  std::vector<Tensor> gradients;
  if (!are_those_of(known.bits, mask)) return gradients;
  if (needs_input) {
    const Tensor ordered_values =
        ordered(stored.has_value() ? *stored : fetched(weight, known, rounds_to_bfloat16(input)), known, input_index);
    const auto* values = static_cast<const float*>(ordered_values.const_data_ptr());
    if (needs_weight && are_computed_at_once(shape, input, input_in_place)) {
      return both_gradients(weight, grad_output, input, memory, values, known, input_index, shape, input_in_place);
    }
    gradients.push_back(input_gradient(input, grad_output, memory.input, values, input_index, shape, input_in_place));
  }
  if (needs_weight) {
    gradients.push_back(
        weight_gradient(weight, grad_output, input, memory.weight, known, weight_index, shape, weight_in_place));
  }
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(granet_cpp, m) {
  m.def(
      "masked_conv_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? stored, Tensor mask, "
      "Tensor[] known, Tensor[] input_index, Tensor[] weight_index, int[] shape, bool input_in_place, "
      "bool weight_in_place, Tensor(a!)? input_memory, Tensor(b!)? weight_memory, bool needs_input, "
      "bool needs_weight) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(granet_cpp, CPU, m) { m.impl("masked_conv_backward", TORCH_BOX(&masked_conv_backward)); }

}  // namespace granet
