// A convolution in the numbers that operators are called with, and the stencil and plan that these lead to: for whoever
// builds an index and whoever uses it.
#pragma once

#include <cstddef>
#include <vector>

#include "cpu/slab.h"
#include "cpu/stencil.h"
#include "cpu/stencil_index.h"
#include "torch/checks.h"

namespace granet {

using cpu::ConvShape;
using cpu::Direction;
using cpu::ImageView;
using cpu::Pair;
using cpu::Plan;
using cpu::Stencil;

constexpr size_t kShapeNumbers = 14;

inline ConvShape shape_of(const std::vector<int64_t>& n) {
  STD_TORCH_CHECK(n.size() == kShapeNumbers, "shape: expected ", kShapeNumbers, " numbers, got ", n.size());
  return {n[0], n[1], n[4], {n[2], n[3]}, {n[5], n[6]}, {n[7], n[8]}, {n[9], n[10]}, {n[11], n[12]}, n[13]};
}

// A convolution that looks at one pixel at a time sees one column of all pixels.
inline bool is_pointwise(const ConvShape& s) {
  return s.kernel.h == 1 && s.kernel.w == 1 && s.stride.h == 1 && s.stride.w == 1 && s.padding.h == 0 &&
         s.padding.w == 0;
}

inline ConvShape flattened(const ConvShape& s) {
  if (!is_pointwise(s)) return s;
  ConvShape flat = s;
  flat.batch = 1;
  flat.input = {s.batch * s.input.h * s.input.w, 1};
  return flat;
}

struct Work {
  ConvShape shape;
  Stencil stencil;
  Plan plan;
};

inline Work work_of(const ConvShape& shape, Direction direction, int64_t entries, bool in_place) {
  const ConvShape flat = in_place ? shape : flattened(shape);
  const Stencil stencil =
      direction == Direction::kForward ? cpu::forward_stencil(flat) : cpu::input_gradient_stencil(flat);
  return {flat, stencil, cpu::plan_for(stencil, entries, in_place)};
}

inline void check_in_place(const ConvShape& shape, bool in_place) {
  STD_TORCH_CHECK(!in_place || cpu::can_read_in_place(shape),
                  "in_place: expected a convolution whose source the kernels can read where it is");
}

inline cpu::WeightOrder order_of(bool channels_last) {
  return channels_last ? cpu::WeightOrder::kChannelsLast : cpu::WeightOrder::kContiguous;
}

inline Direction direction_of(bool input_gradient) {
  return input_gradient ? Direction::kInputGradient : Direction::kForward;
}

inline cpu::Element element_of(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(tensor.is_cpu() && (type == ScalarType::Float || type == ScalarType::BFloat16), name,
                  ": expected a float32 or bfloat16 tensor on the CPU");
  return type == ScalarType::Float ? cpu::Element::kFloat32 : cpu::Element::kBFloat16;
}

}  // namespace granet
