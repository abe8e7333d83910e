// Sparse convolution and linear layers, namespace granet_cpp: adaptors from tensors to the stencils of cpu/conv.h.
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "cpu/conv.h"
#include "torch/checks.h"
#include "torch/conv_operands.h"
#include "torch/conv_work.h"
#include "torch/large_pages.h"
#include "torch/parallel.h"

namespace granet {
namespace {

// target = conv(input, values) + bias + residual, max 0 where relu. The residual has the target's dtype and strides.
void convolve(const Tensor& target, const Tensor& input, const float* values, const std::vector<Tensor>& index,
              const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, bool relu,
              const ConvShape& shape, bool in_place) {
  check_in_place(shape, in_place);
  const Work work = work_of(shape, Direction::kForward, entries_in(index), in_place);
  const cpu::StencilEntries entries = entries_of(index, work, values);
  check_size(input, "input", shape.batch, shape.channels, shape.input);
  check_size(target, "target", shape.batch, shape.out_channels, shape.output());
  const ImageView source = view_for(input, "input", shape, in_place);
  const ImageView result = view_for(target, "target", shape, in_place);
  const float* biases = nullptr;
  if (bias.has_value()) {
    check_contiguous(*bias, ScalarType::Float, "bias", "float32");
    STD_TORCH_CHECK(bias->numel() == shape.out_channels, "bias: expected ", shape.out_channels, " elements");
    biases = static_cast<const float*>(bias->const_data_ptr());
  }
  if (residual.has_value()) {
    STD_TORCH_CHECK(residual->scalar_type() == target.scalar_type() && residual->dim() == target.dim(),
                    "residual: expected the target's dtype and shape");
    for (int64_t d = 0; d < target.dim(); ++d) {
      STD_TORCH_CHECK(residual->size(d) == target.size(d) && residual->stride(d) == target.stride(d),
                      "residual: expected the target's shape and strides");
    }
  }
  const cpu::Finish finish{residual.has_value() ? residual->const_data_ptr() : nullptr, relu};
  prefer_large_pages(target);
  cpu::run_stencil(work.stencil, work.plan, entries, source, biases, finish, result,
                   TorchThreads(time_of(shape, entries_in(index))));
}

// With the values of the entries at hand, in their order.
void sparse_conv_(Tensor target, Tensor input, Tensor values, std::vector<Tensor> index, std::optional<Tensor> bias,
                  std::optional<Tensor> residual, bool relu, std::vector<int64_t> numbers, bool in_place) {
  check_contiguous(values, ScalarType::Float, "values", "float32");
  STD_TORCH_CHECK(values.numel() == entries_in(index), "values: expected ", entries_in(index), " elements, got ",
                  values.numel());
  convolve(target, input, static_cast<const float*>(values.const_data_ptr()), index, bias, residual, relu,
           shape_of(numbers), in_place);
}

// In the input's dtype; (rows, channels) of rows, else contiguous or channels_last. In `memory`, where there is some.
Tensor new_output(const Tensor& input, const std::optional<Tensor>& memory, const ConvShape& shape,
                  bool channels_last) {
  if (memory.has_value()) {
    STD_TORCH_CHECK(memory->scalar_type() == input.scalar_type(), "memory: expected the input's dtype");
    return *memory;
  }
  if (input.dim() == 2) return torch::stable::new_empty(input, {shape.batch, shape.out_channels});
  const Pair size = shape.output();
  using torch::headeronly::MemoryFormat;
  return torch::stable::empty({shape.batch, shape.out_channels, size.h, size.w}, input.scalar_type(), std::nullopt,
                              std::nullopt, std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// With a weight and its mask: the output, and the values of the active weights in storage order. Nothing where the mask
// has other bits than the index was built from.
std::vector<Tensor> masked_conv(Tensor input, Tensor weight, Tensor mask, std::vector<Tensor> known_tensors,
                                std::vector<Tensor> index, std::optional<Tensor> bias, std::optional<Tensor> memory,
                                std::vector<int64_t> numbers, bool in_place, bool channels_last) {
  const ConvShape shape = shape_of(numbers);
  check_weight(weight, shape, "weight");
  const Known known = known_of(known_tensors, shape.weights());
  if (!are_those_of(known.bits, mask)) return {};
  const Tensor stored = fetched(weight, known, rounds_to_bfloat16(input));
  const Tensor values = ordered(stored, known, index);
  const Tensor output = new_output(input, memory, shape, channels_last);
  convolve(output, input, static_cast<const float*>(values.const_data_ptr()), index, bias, std::nullopt, false, shape,
           in_place);
  return {output, stored};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(granet_cpp, m) {
  m.def(
      "sparse_conv_(Tensor(a!) target, Tensor input, Tensor values, Tensor[] index, Tensor? bias, Tensor? residual, "
      "bool relu, int[] shape, bool in_place) -> ()");
  m.def(
      "masked_conv(Tensor input, Tensor weight, Tensor mask, Tensor[] known, Tensor[] index, Tensor? bias, "
      "Tensor(a!)? memory, int[] shape, bool in_place, bool channels_last) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(granet_cpp, CPU, m) {
  m.impl("sparse_conv_", TORCH_BOX(&sparse_conv_));
  m.impl("masked_conv", TORCH_BOX(&masked_conv));
}

}  // namespace granet
