// Sparse convolution and linear layers, namespace granet_cpp: adaptors from tensors to the stencils of cpu/conv.h.
//
// The public operators (namespace granet) have checked every argument, and backends/cpp/conv.py has built the index for
// the shapes at hand. What is checked again here is what keeps a direct call from reading or writing out of bounds.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common/bfloat16.h"
#include "common/bits.h"
#include "cpu/active.h"
#include "cpu/conv.h"
#include "cpu/stencil_index.h"
#include "torch/checks.h"
#include "torch/conv_work.h"
#include "torch/large_pages.h"
#include "torch/parallel.h"

namespace granet {
namespace {

// Nanoseconds that one thread takes, about: the rates of backends/cpp/cost.py.
double time_of(const ConvShape& shape, int64_t entries) {
  const auto pixels = [](const Pair& size) { return static_cast<double>(size.h * size.w); };
  const double products = pixels(shape.output()) * static_cast<double>(shape.batch * entries);
  const double elements =
      static_cast<double>(shape.batch) * (static_cast<double>(shape.channels) * pixels(shape.input) +
                                          static_cast<double>(shape.out_channels) * pixels(shape.output()));
  return products / 40 + elements * 0.36;
}

int64_t entries_in(const std::vector<Tensor>& index) { return index.size() == 4 ? index[1].numel() : 0; }

// Whether pixels lie evenly spaced in memory, as the kernels want those of a pointwise convolution.
bool is_evenly_spaced(const Tensor& tensor) {
  return tensor.dim() == 2 || tensor.size(2) <= 1 || tensor.size(3) <= 1 ||
         tensor.stride(2) == tensor.size(3) * tensor.stride(3);
}

// (batch, channels, h, w), or (pixels, channels) for a linear layer.
ImageView view_of(const Tensor& tensor, const char* name, bool pointwise) {
  ImageView view{tensor.mutable_data_ptr(), element_of(tensor, name), 0, 0, 0, 0, 0};
  if (tensor.dim() == 2) {
    view.channel_stride = tensor.stride(1);
    view.y_stride = tensor.stride(0);
    view.pixels = std::max<int64_t>(1, tensor.size(0));
    return view;
  }
  STD_TORCH_CHECK(tensor.dim() == 4, name, ": expected 2 or 4 dimensions, got ", tensor.dim());
  view.image_stride = tensor.stride(0);
  view.channel_stride = tensor.stride(1);
  view.y_stride = tensor.stride(2);
  view.x_stride = tensor.stride(3);
  if (pointwise) {
    STD_TORCH_CHECK(is_evenly_spaced(tensor), name, ": expected pixels that are evenly spaced in memory");
    view.pixels = std::max<int64_t>(1, tensor.size(2) * tensor.size(3));
    view.y_stride = tensor.size(3) == 1 ? view.y_stride : view.x_stride;
  }
  return view;
}

void check_planes(const ImageView& view, const ConvShape& shape, bool in_place, const char* name) {
  STD_TORCH_CHECK(!in_place || (view.element == cpu::Element::kFloat32 && view.y_stride == 1 &&
                                view.channel_stride == shape.input.h * shape.input.w),
                  name, ": expected contiguous float32 planes, to be read in place");
}

void check_size(const Tensor& tensor, const char* name, int64_t batch, int64_t channels, Pair size) {
  const bool matches = tensor.dim() == 2 ? tensor.size(0) == batch * size.h * size.w && tensor.size(1) == channels
                                         : tensor.dim() == 4 && tensor.size(0) == batch && tensor.size(1) == channels &&
                                               tensor.size(2) == size.h && tensor.size(3) == size.w;
  STD_TORCH_CHECK(matches, name, ": its shape is not the one that the index was built for");
}

// Whether the entries of an index are in runs (cpu/stencil_index.h): it has their first ranks then, else all of them.
bool is_in_runs(const std::vector<Tensor>& index) { return index[3].numel() != 0; }

const int32_t* ranks_of(const std::vector<Tensor>& index) {
  return is_in_runs(index) ? nullptr : static_cast<const int32_t*>(index[2].const_data_ptr());
}

// The entries of an index, with their values where those are needed.
cpu::StencilEntries entries_of(const std::vector<Tensor>& index, const Work& work, const float* values) {
  STD_TORCH_CHECK(index.size() == 4, "index: expected 4 tensors, got ", index.size());
  check_contiguous(index[0], ScalarType::Long, "index[0]", "int64");
  check_contiguous(index[1], ScalarType::Int, "index[1]", "int32");
  check_contiguous(index[2], ScalarType::Int, "index[2]", "int32");
  check_contiguous(index[3], ScalarType::Long, "index[3]", "int64");
  const int64_t groups = work.plan.blocks * work.stencil.rows();
  STD_TORCH_CHECK(index[0].numel() == groups + 1 && index[2].numel() == (is_in_runs(index) ? 0 : index[1].numel()) &&
                      index[3].numel() == (is_in_runs(index) ? groups : 0),
                  "index: not one that was built for these shapes");
  const auto* begin = static_cast<const int64_t*>(index[0].const_data_ptr());
  return {work.stencil.rows(), begin, static_cast<const int32_t*>(index[1].const_data_ptr()),
          is_in_runs(index) ? static_cast<const int64_t*>(index[3].const_data_ptr()) : begin, values};
}

// The active weights of a layer, as backends/cpp/index.py keeps them: the bits of the mask, and where they are set.
struct Known {
  Tensor bits;
  Tensor positions;
};

Known known_of(const std::vector<Tensor>& known, int64_t weights) {
  STD_TORCH_CHECK(known.size() == 2, "known: expected 2 tensors, got ", known.size());
  check_packed(known[0], weights, "known[0]");
  check_contiguous(known[1], ScalarType::Int, "known[1]", "int32");
  return {known[0], known[1]};
}

// Whether a mask still has the bits that an index was built from; whoever wrote to it, by whatever way.
bool are_those_of(const Tensor& bits, const Tensor& mask) {
  check_packed(mask, 0, "mask");
  const auto size = static_cast<size_t>(bits.numel());
  return bits.numel() == mask.numel() && std::memcmp(bits.const_data_ptr(), mask.const_data_ptr(), size) == 0;
}

// The values of the active weights in storage order, in float32: what takes time is the cache lines of the weight.
Tensor fetched(const Tensor& weight, const Known& known, bool to_bfloat16) {
  const int64_t count = known.positions.numel();
  Tensor values = torch::stable::new_empty(known.positions, {count}, ScalarType::Float);
  cpu::gather(weight.const_data_ptr(), element_of(weight, "weight"),
              {static_cast<const int32_t*>(known.positions.const_data_ptr()), count, true}, to_bfloat16,
              static_cast<float*>(values.mutable_data_ptr()),
              TorchThreads(static_cast<double>(count) * cpu::kFetchNanoseconds));
  return values;
}

// The same as an index wants them (cpu/stencil_tables.h).
Tensor ordered(const Tensor& stored, const Known& known, const std::vector<Tensor>& index) {
  const int64_t count = known.positions.numel();
  STD_TORCH_CHECK(index.size() == 4 && entries_in(index) == count, "index: expected 4 tensors and ", count, " entries");
  check_contiguous(index[2], ScalarType::Int, "index[2]", "int32");
  check_contiguous(stored, ScalarType::Float, "stored", "float32");
  STD_TORCH_CHECK(stored.numel() == count, "stored: expected ", count, " elements, got ", stored.numel());
  if (is_in_runs(index)) return stored;
  STD_TORCH_CHECK(index[2].numel() == count, "index[2]: expected ", count, " elements, got ", index[2].numel());
  Tensor values = torch::stable::new_empty(stored, {count}, ScalarType::Float);
  cpu::gather(stored.const_data_ptr(), cpu::Element::kFloat32, {ranks_of(index), count, false}, false,
              static_cast<float*>(values.mutable_data_ptr()), TorchThreads(static_cast<double>(count)));
  return values;
}

// Computed in the input's dtype, whatever the weight's.
bool rounds_to_bfloat16(const Tensor& input) { return input.scalar_type() == ScalarType::BFloat16; }

void check_weight(const Tensor& weight, const ConvShape& shape, const char* name) {
  STD_TORCH_CHECK(is_dense(weight) && weight.numel() == shape.weights(), name, ": expected a dense tensor of ",
                  shape.weights(), " elements, got ", weight.numel());
}

// target = conv(input, values) + bias + residual, max 0 where relu. The residual has the target's dtype and strides.
void convolve(const Tensor& target, const Tensor& input, const float* values, const std::vector<Tensor>& index,
              const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, bool relu,
              const ConvShape& shape, bool in_place) {
  check_in_place(shape, in_place);
  const Work work = work_of(shape, Direction::kForward, entries_in(index), in_place);
  const cpu::StencilEntries entries = entries_of(index, work, values);
  check_size(input, "input", shape.batch, shape.channels, shape.input);
  check_size(target, "target", shape.batch, shape.out_channels, shape.output());
  const ImageView source = view_of(input, "input", in_place || is_pointwise(shape));
  const ImageView result = view_of(target, "target", in_place || is_pointwise(shape));
  check_planes(source, shape, in_place, "input");
  check_planes(result, shape, in_place, "target");
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

// In the input's dtype; (rows, channels) of rows, else contiguous or channels_last.
Tensor new_output(const Tensor& input, const ConvShape& shape, bool channels_last) {
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
                                std::vector<Tensor> index, std::optional<Tensor> bias, std::vector<int64_t> numbers,
                                bool in_place, bool channels_last) {
  const ConvShape shape = shape_of(numbers);
  check_weight(weight, shape, "weight");
  const Known known = known_of(known_tensors, shape.weights());
  if (!are_those_of(known.bits, mask)) return {};
  const Tensor stored = fetched(weight, known, rounds_to_bfloat16(input));
  const Tensor values = ordered(stored, known, index);
  const Tensor output = new_output(input, shape, channels_last);
  convolve(output, input, static_cast<const float*>(values.const_data_ptr()), index, bias, std::nullopt, false, shape,
           in_place);
  return {output, stored};
}

// The transpose of conv(., values), of grad_output, in the layout of the input.
Tensor input_gradient(const Tensor& input, const Tensor& grad_output, const float* values,
                      const std::vector<Tensor>& index, const ConvShape& shape, bool in_place) {
  check_in_place(shape, in_place);
  const Work work = work_of(shape, Direction::kInputGradient, entries_in(index), in_place);
  const cpu::StencilEntries entries = entries_of(index, work, values);
  check_size(input, "input", shape.batch, shape.channels, shape.input);
  const Tensor gradient = torch::stable::empty_like(input);
  const Tensor written =
      is_evenly_spaced(gradient)
          ? gradient
          : torch::stable::new_empty(input, {shape.batch, shape.channels, shape.input.h, shape.input.w});
  const ImageView source = view_of(grad_output, "grad_output", in_place || is_pointwise(shape));
  const ImageView target = view_of(written, "gradient", in_place || is_pointwise(shape));
  check_planes(source, shape, in_place, "grad_output");
  check_planes(target, shape, in_place, "gradient");
  prefer_large_pages(written);
  cpu::run_stencil(work.stencil, work.plan, entries, source, nullptr, {nullptr, false}, target,
                   TorchThreads(time_of(shape, entries_in(index))));
  if (written.const_data_ptr() == gradient.const_data_ptr()) return gradient;
  Tensor result = gradient;
  return torch::stable::copy_(result, written);
}

// In the layout of the weight: zero but for the active weights. In `memory`, where there is some.
Tensor weight_gradient(const Tensor& weight, const Tensor& grad_output, const Tensor& input,
                       const std::optional<Tensor>& memory, const Known& known, const std::vector<Tensor>& index,
                       const ConvShape& shape, bool in_place) {
  check_in_place(shape, in_place);
  const Work work = work_of(shape, Direction::kForward, entries_in(index), in_place);
  const cpu::StencilEntries entries = entries_of(index, work, nullptr);
  check_size(input, "input", shape.batch, shape.channels, shape.input);
  const ImageView source = view_of(input, "input", in_place || is_pointwise(shape));
  const ImageView factor = view_of(grad_output, "grad_output", in_place || is_pointwise(shape));
  check_planes(source, shape, in_place, "input");
  check_planes(factor, shape, in_place, "grad_output");
  const int64_t count = known.positions.numel();
  STD_TORCH_CHECK(entries_in(index) == count, "index: expected ", count, " entries");
  const int64_t parts = cpu::gradient_parts(work.plan);
  Tensor partial = torch::stable::new_empty(known.positions, {count * (parts + 1)}, ScalarType::Float);
  auto* partials = static_cast<float*>(partial.mutable_data_ptr());
  float* sums = partials + count * parts;
  cpu::correlate_stencil(work.stencil, work.plan, entries, ranks_of(index), count, source, factor, partials, sums,
                         TorchThreads(time_of(shape, count)));
  if (source.element == cpu::Element::kBFloat16) {  // computed in the input's dtype, as autocast does
    for (int64_t i = 0; i < count; ++i) sums[i] = round_to_bfloat16(sums[i]);
  }
  const Tensor gradient = memory.has_value() ? *memory : torch::stable::empty_like(weight);
  prefer_large_pages(gradient);
  cpu::spread(sums, static_cast<const int32_t*>(known.positions.const_data_ptr()), count, gradient.mutable_data_ptr(),
              element_of(gradient, "gradient"), shape.weights(),
              TorchThreads(static_cast<double>(shape.weights()) * 0.2 + static_cast<double>(count)));
  return gradient;
}

// The gradients that are needed, of the input and of the weight; `stored` as above, if it is at hand; `memory` for the
// weight's, if there is some: of its dtype and layout. Nothing where the mask has other bits.
std::vector<Tensor> masked_conv_backward(Tensor grad_output, Tensor input, Tensor weight, std::optional<Tensor> stored,
                                         Tensor mask, std::vector<Tensor> known_tensors,
                                         std::vector<Tensor> input_index, std::vector<Tensor> weight_index,
                                         std::vector<int64_t> numbers, bool input_in_place, bool weight_in_place,
                                         std::optional<Tensor> memory, bool needs_input, bool needs_weight) {
  const ConvShape shape = shape_of(numbers);
  check_weight(weight, shape, "weight");
  if (memory.has_value()) {
    check_weight(*memory, shape, "memory");
    STD_TORCH_CHECK(memory->scalar_type() == weight.scalar_type(), "memory: expected the weight's dtype");
  }
  check_size(grad_output, "grad_output", shape.batch, shape.out_channels, shape.output());
  const Known known = known_of(known_tensors, shape.weights());
  std::vector<Tensor> gradients;
  if (!are_those_of(known.bits, mask)) return gradients;
  if (needs_input) {
    const Tensor values =
        ordered(stored.has_value() ? *stored : fetched(weight, known, rounds_to_bfloat16(input)), known, input_index);
    gradients.push_back(input_gradient(input, grad_output, static_cast<const float*>(values.const_data_ptr()),
                                       input_index, shape, input_in_place));
  }
  if (needs_weight) {
    gradients.push_back(
        weight_gradient(weight, grad_output, input, memory, known, weight_index, shape, weight_in_place));
  }
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(granet_cpp, m) {
  m.def(
      "sparse_conv_(Tensor(a!) target, Tensor input, Tensor values, Tensor[] index, Tensor? bias, Tensor? residual, "
      "bool relu, int[] shape, bool in_place) -> ()");
  m.def(
      "masked_conv(Tensor input, Tensor weight, Tensor mask, Tensor[] known, Tensor[] index, Tensor? bias, "
      "int[] shape, bool in_place, bool channels_last) -> Tensor[]");
  m.def(
      "masked_conv_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? stored, Tensor mask, "
      "Tensor[] known, Tensor[] input_index, Tensor[] weight_index, int[] shape, bool input_in_place, "
      "bool weight_in_place, Tensor(a!)? memory, bool needs_input, bool needs_weight) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(granet_cpp, CPU, m) {
  m.impl("sparse_conv_", TORCH_BOX(&sparse_conv_));
  m.impl("masked_conv", TORCH_BOX(&masked_conv));
  m.impl("masked_conv_backward", TORCH_BOX(&masked_conv_backward));
}

}  // namespace granet
