#include "cpu/conv_factors.h"

#include <algorithm>
#include <vector>

#include "common/bits.h"

namespace granet::cpu {

FactorsInPlace::FactorsInPlace(const Correlated& with, const Plan& plan, Rows rows, const ScratchScope& scratch)
    : view_(from_channel(with.factor, rows.first)), gradient_(with.gradient), plan_(plan), rows_(rows) {
  if (gradient_ != nullptr) rest_ = take_floats(scratch, rows.count * plan.tile * plan.vector);
}

Factors FactorsInPlace::of(const TileInPlace& tile, const std::optional<TileInPlace>& after) const {
  if (gradient_ == nullptr) return {};
  const float* next = after.has_value() ? after->in<const float>(view_) : nullptr;
  const auto* own = tile.in<const float>(view_);
  if (tile.repeated == 0) return {own, plan_.plane, gradient_, next, plan_.plane};
  const int64_t width = plan_.tile * plan_.vector;
  for (int64_t row = 0; row < rows_.count; ++row) {  // without what the tile before has counted
    std::fill_n(rest_ + row * width, tile.repeated, 0.0f);
    std::copy_n(own + row * plan_.plane + tile.repeated, width - tile.repeated, rest_ + row * width + tile.repeated);
  }
  return {rest_, width, gradient_, next, plan_.plane};
}

Factors packed_factors(const Stencil& s, const Plan& plan, const Correlated& with, const Unit& unit, Rows rows,
                       const ScratchScope& scratch) {
  if (with.gradient == nullptr) return {};
  const Pair spread = s.spread;
  const int64_t plane = (ceil_div(unit.positions, kLine) | 1) * kLine;
  std::vector<Phase> phases;
  for (int64_t p = 0; p < spread.h * spread.w; ++p) {
    const Pair phase = {p / spread.w, p % spread.w};
    phases.push_back({target_runs(s, plan, unit, phase, plane, with.factor), p * plane});
  }
  float* factors = take_floats(scratch, rows.count * spread.h * spread.w * plane);
  pack(phases, from_channel(with.factor, rows.first), rows.count, spread.h * spread.w * plane, factors);
  return {factors, plane, with.gradient, nullptr, 0};
}

}  // namespace granet::cpu
