// Sparse convolution and linear layers, namespace granet_cpp: adaptors from tensors to the stencils of cpu/conv.h.
//
// The public operators (namespace granet) have checked every argument, and backends/cpp/conv.py has built the index for
// the shapes at hand. What is checked again here is what keeps a direct call from reading or writing out of bounds.
#include <bit>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common/bits.h"
#include "cpu/conv.h"
#include "cpu/mask.h"
#include "cpu/stencil_index.h"
#include "torch/parallel.h"

namespace granet {
namespace {

using cpu::ConvShape;
using cpu::Direction;
using cpu::ImageView;
using cpu::Pair;
using cpu::Plan;
using cpu::Stencil;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr size_t kShapeNumbers = 14;

ConvShape shape_of(const std::vector<int64_t>& n) {
  STD_TORCH_CHECK(n.size() == kShapeNumbers, "shape: expected ", kShapeNumbers, " numbers, got ", n.size());
  return {n[0], n[1], n[4], {n[2], n[3]}, {n[5], n[6]}, {n[7], n[8]}, {n[9], n[10]}, {n[11], n[12]}, n[13]};
}

// A convolution that looks at one pixel at a time sees one column of all pixels.
bool is_pointwise(const ConvShape& s) {
  return s.kernel.h == 1 && s.kernel.w == 1 && s.stride.h == 1 && s.stride.w == 1 && s.padding.h == 0 &&
         s.padding.w == 0;
}

ConvShape flattened(const ConvShape& s, bool in_place) {
  if (!is_pointwise(s)) return s;
  ConvShape flat = s;
  flat.batch = in_place ? s.batch : 1;
  flat.input = {(in_place ? 1 : s.batch) * s.input.h * s.input.w, 1};
  return flat;
}

struct Work {
  ConvShape shape;
  Stencil stencil;
  Plan plan;
};

Work work_of(const ConvShape& shape, Direction direction, int64_t entries, bool in_place) {
  const ConvShape flat = flattened(shape, in_place);
  const Stencil stencil =
      direction == Direction::kForward ? cpu::forward_stencil(flat) : cpu::input_gradient_stencil(flat);
  return {flat, stencil, cpu::plan_for(stencil, entries, in_place)};
}

// A source may be read where it is if each of its planes is a run of floats at least as long as a tile.
void check_in_place(const ConvShape& shape, bool in_place) {
  constexpr int64_t kLongestTile = cpu::kMostVectors * 16;
  STD_TORCH_CHECK(!in_place || (is_pointwise(shape) && shape.input.h * shape.input.w >= kLongestTile),
                  "in_place: expected a pointwise convolution of ", kLongestTile, " pixels or more");
}

int64_t entries_in(const std::vector<Tensor>& index) { return index.size() == 3 ? index[2].numel() : 0; }

cpu::Element element_of(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(tensor.is_cpu() && (type == ScalarType::Float || type == ScalarType::BFloat16), name,
                  ": expected a float32 or bfloat16 tensor on the CPU");
  return type == ScalarType::Float ? cpu::Element::kFloat32 : cpu::Element::kBFloat16;
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
    STD_TORCH_CHECK(tensor.size(2) <= 1 || tensor.size(3) == 0 || view.y_stride == tensor.size(3) * view.x_stride, name,
                    ": expected pixels that are evenly spaced in memory");
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

cpu::WeightOrder order_of(bool channels_last) {
  return channels_last ? cpu::WeightOrder::kChannelsLast : cpu::WeightOrder::kContiguous;
}

Direction direction_of(bool input_gradient) { return input_gradient ? Direction::kInputGradient : Direction::kForward; }

std::vector<Tensor> stencil_index(Tensor mask, std::vector<int64_t> numbers, bool channels_last, bool input_gradient,
                                  bool ranked, bool in_place) {
  const ConvShape shape = shape_of(numbers);
  check_in_place(shape, in_place);
  STD_TORCH_CHECK(mask.is_cpu() && mask.scalar_type() == ScalarType::Byte && mask.is_contiguous() &&
                      mask.numel() >= mask_bytes(shape.weights()),
                  "mask: expected a contiguous uint8 tensor on the CPU with a bit for each weight");
  const int64_t active =
      cpu::count_active(static_cast<const uint8_t*>(mask.const_data_ptr()), mask_bytes(shape.weights()));
  const Work work = work_of(shape, direction_of(input_gradient), active, in_place);
  STD_TORCH_CHECK(cpu::offsets_fit(work.stencil, work.plan), "shape: too large for the sparse convolution");
  Tensor begin = torch::stable::new_empty(mask, {work.plan.blocks * work.stencil.rows() + 1}, ScalarType::Long);
  const auto* bits = static_cast<const uint8_t*>(mask.const_data_ptr());
  auto* begins = static_cast<int64_t*>(begin.mutable_data_ptr());
  const cpu::WeightOrder order = order_of(channels_last);
  const Direction direction = direction_of(input_gradient);
  const int64_t entries = cpu::count_entries(bits, work.shape, order, direction, work.plan, begins);
  Tensor offset = torch::stable::new_empty(mask, {entries}, ScalarType::Int);
  Tensor source = torch::stable::new_empty(mask, {entries}, ScalarType::Int);
  cpu::fill_entries(
      bits, work.shape, order, direction, ranked, work.plan,
      {begins, static_cast<int32_t*>(offset.mutable_data_ptr()), static_cast<int32_t*>(source.mutable_data_ptr())});
  return {begin, offset, source};
}

float round_to_bfloat16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if (value != value) return value;
  return std::bit_cast<float>((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u);
}

float bfloat16_to_float(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// values[e] = weight[source[e]], rounded to bfloat16 where the input is.
void gather_values(const Tensor& weight, const Tensor& source, cpu::Element compute, float* values) {
  constexpr int64_t kChunk = 16384;
  const auto* from = static_cast<const int32_t*>(source.const_data_ptr());
  const int64_t count = source.numel();
  const bool bfloat16 = element_of(weight, "weight") == cpu::Element::kBFloat16;
  const void* data = weight.const_data_ptr();
  const bool rounds = !bfloat16 && compute == cpu::Element::kBFloat16;
  TorchThreads().for_each(ceil_div(count, kChunk), [&](int64_t chunk) {
    const int64_t end = std::min(count, (chunk + 1) * kChunk);
    if (bfloat16) {
      for (int64_t e = chunk * kChunk; e < end; ++e) {
        values[e] = bfloat16_to_float(static_cast<const uint16_t*>(data)[from[e]]);
      }
    } else {
      for (int64_t e = chunk * kChunk; e < end; ++e) values[e] = static_cast<const float*>(data)[from[e]];
      if (rounds) {
        for (int64_t e = chunk * kChunk; e < end; ++e) values[e] = round_to_bfloat16(values[e]);
      }
    }
  });
}

// The calling thread's own, kept between calls: the values of one layer at a time.
float* value_scratch(int64_t count) {
  thread_local std::vector<float> values;
  if (static_cast<int64_t>(values.size()) < count) values.resize(static_cast<size_t>(count));
  return values.data();
}

struct Index {
  Tensor begin;
  Tensor offset;
  Tensor source;
};

Index checked_index(const std::vector<Tensor>& index, const Work& work) {
  STD_TORCH_CHECK(index.size() == 3 && index[0].numel() == work.plan.blocks * work.stencil.rows() + 1 &&
                      index[1].numel() == index[2].numel(),
                  "index: not one that was built for these shapes");
  return {index[0], index[1], index[2]};
}

cpu::StencilEntries entries_of(const Index& index, const Work& work, const float* values) {
  return {work.stencil.rows(), static_cast<const int64_t*>(index.begin.const_data_ptr()),
          static_cast<const int32_t*>(index.offset.const_data_ptr()), values};
}

// target = conv(input, weight) + bias + residual, max 0 where relu.
void sparse_conv_(Tensor target, Tensor input, Tensor weight, std::vector<Tensor> index_parts,
                  std::optional<Tensor> bias, std::optional<Tensor> residual, bool relu, std::vector<int64_t> numbers,
                  bool in_place) {
  const ConvShape shape = shape_of(numbers);
  const Work work = work_of(shape, Direction::kForward, entries_in(index_parts), in_place);
  const Index index = checked_index(index_parts, work);
  check_in_place(shape, in_place);
  check_size(input, "input", shape.batch, shape.channels, shape.input);
  check_size(target, "target", shape.batch, shape.out_channels, shape.output());
  float* values = value_scratch(index.source.numel());
  const bool pointwise = is_pointwise(shape);
  const ImageView source = view_of(input, "input", pointwise);
  gather_values(weight, index.source, source.element, values);
  std::vector<float> biases;
  if (bias.has_value()) {
    const bool bfloat16 = element_of(*bias, "bias") == cpu::Element::kBFloat16;
    STD_TORCH_CHECK(bias->numel() == shape.out_channels, "bias: expected ", shape.out_channels, " elements");
    for (int64_t i = 0; i < bias->numel(); ++i) {
      const int64_t at = i * bias->stride(0);
      const float value = bfloat16 ? bfloat16_to_float(static_cast<const uint16_t*>(bias->const_data_ptr())[at])
                                   : static_cast<const float*>(bias->const_data_ptr())[at];
      biases.push_back(source.element == cpu::Element::kBFloat16 ? round_to_bfloat16(value) : value);
    }
  }
  const ImageView result = view_of(target, "target", pointwise);
  check_planes(source, shape, in_place, "input");
  check_planes(result, shape, in_place, "target");
  const cpu::Finish finish{residual.has_value() ? residual->const_data_ptr() : nullptr, relu};
  cpu::run_stencil(work.stencil, work.plan, entries_of(index, work, values), source,
                   biases.empty() ? nullptr : biases.data(), finish, result, TorchThreads());
}

void sparse_conv_input_gradient_(Tensor gradient, Tensor grad_output, Tensor weight, std::vector<Tensor> index_parts,
                                 std::vector<int64_t> numbers, bool in_place) {
  const ConvShape shape = shape_of(numbers);
  const Work work = work_of(shape, Direction::kInputGradient, entries_in(index_parts), in_place);
  const Index index = checked_index(index_parts, work);
  check_in_place(shape, in_place);
  check_size(grad_output, "grad_output", shape.batch, shape.out_channels, shape.output());
  check_size(gradient, "gradient", shape.batch, shape.channels, shape.input);
  float* values = value_scratch(index.source.numel());
  const bool pointwise = is_pointwise(shape);
  const ImageView source = view_of(grad_output, "grad_output", pointwise);
  const ImageView target = view_of(gradient, "gradient", pointwise);
  check_planes(source, shape, in_place, "grad_output");
  check_planes(target, shape, in_place, "gradient");
  gather_values(weight, index.source, source.element, values);
  cpu::run_stencil(work.stencil, work.plan, entries_of(index, work, values), source, nullptr, {nullptr, false}, target,
                   TorchThreads());
}

// gradient, whose storage order is the weight's: zero but for the active weights.
void sparse_conv_weight_gradient_(Tensor gradient, Tensor grad_output, Tensor input, std::vector<Tensor> index_parts,
                                  std::vector<int64_t> numbers, bool in_place) {
  const ConvShape shape = shape_of(numbers);
  const Work work = work_of(shape, Direction::kForward, entries_in(index_parts), in_place);
  const Index index = checked_index(index_parts, work);
  check_in_place(shape, in_place);
  check_size(grad_output, "grad_output", shape.batch, shape.out_channels, shape.output());
  check_size(input, "input", shape.batch, shape.channels, shape.input);
  STD_TORCH_CHECK(gradient.numel() == shape.weights(), "gradient: expected ", shape.weights(), " elements");
  const bool pointwise = is_pointwise(shape);
  const int64_t count = index.source.numel();
  const int64_t parts = cpu::gradient_parts(work.plan);
  float* scratch = value_scratch(count * (parts + 1));
  float* sums = scratch + count * parts;
  const ImageView from = view_of(input, "input", pointwise);
  const ImageView factor = view_of(grad_output, "grad_output", pointwise);
  check_planes(from, shape, in_place, "input");
  check_planes(factor, shape, in_place, "grad_output");
  cpu::correlate_stencil(work.stencil, work.plan, entries_of(index, work, nullptr), count, from, factor, scratch, sums,
                         TorchThreads());
  if (element_of(input, "input") == cpu::Element::kBFloat16) {  // computed in the input's dtype, as autocast does
    for (int64_t e = 0; e < count; ++e) sums[e] = round_to_bfloat16(sums[e]);
  }
  const auto* source = static_cast<const int32_t*>(index.source.const_data_ptr());
  void* data = gradient.mutable_data_ptr();
  const bool bfloat16 = element_of(gradient, "gradient") == cpu::Element::kBFloat16;
  std::memset(data, 0, static_cast<size_t>(gradient.numel()) * (bfloat16 ? 2 : 4));
  for (int64_t e = 0; e < count; ++e) {
    if (bfloat16) {
      static_cast<uint16_t*>(data)[source[e]] =
          static_cast<uint16_t>(std::bit_cast<uint32_t>(round_to_bfloat16(sums[e])) >> 16);
    } else {
      static_cast<float*>(data)[source[e]] = sums[e];
    }
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(granet_cpp, m) {
  m.def(
      "stencil_index(Tensor mask, int[] shape, bool channels_last, bool input_gradient, bool ranked, bool in_place) -> "
      "Tensor[]");
  m.def(
      "sparse_conv_(Tensor(a!) target, Tensor input, Tensor weight, Tensor[] index, Tensor? bias, Tensor? residual, "
      "bool relu, int[] shape, bool in_place) -> ()");
  m.def(
      "sparse_conv_input_gradient_(Tensor(a!) gradient, Tensor grad_output, Tensor weight, Tensor[] index, int[] "
      "shape, bool in_place) -> ()");
  m.def(
      "sparse_conv_weight_gradient_(Tensor(a!) gradient, Tensor grad_output, Tensor input, Tensor[] index, int[] "
      "shape, bool in_place) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(granet_cpp, CPU, m) {
  m.impl("stencil_index", TORCH_BOX(&stencil_index));
  m.impl("sparse_conv_", TORCH_BOX(&sparse_conv_));
  m.impl("sparse_conv_input_gradient_", TORCH_BOX(&sparse_conv_input_gradient_));
  m.impl("sparse_conv_weight_gradient_", TORCH_BOX(&sparse_conv_weight_gradient_));
}

}  // namespace granet
