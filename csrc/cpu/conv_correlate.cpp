#include "cpu/conv_correlate.h"

#include <algorithm>
#include <optional>

#include "common/bits.h"
#include "cpu/shifts.h"

namespace granet::cpu {

namespace {

void correlate_tile(const Plan& plan, const StencilEntries& entries, const float* slab, const Shift* shifts,
                    const float* factors, const Next& next, const float* next_target, int64_t plane, int64_t vectors,
                    Rows rows, float* sums) {
  for (int64_t block = 0; block < plan.blocks; ++block) {
    tile_kernels(plan).correlate_tile[vectors]({.entries = entries,
                                                .slab = slab,
                                                .target = factors,
                                                .shifts = shifts,
                                                .next = share_of(next, plan, block),
                                                .next_target = block + 1 == plan.blocks ? next_target : nullptr,
                                                .plane = plane,
                                                .block = block,
                                                .first_row = rows.first,
                                                .last_row = rows.first + rows.count,
                                                .gradient = sums});
  }
}

void correlate_in_place(const Stencil& s, const Plan& plan, const StencilEntries& entries, const ImageView& source,
                        const ImageView& target, int64_t index, Rows rows, float* sums) {
  const int64_t width = plan.tile * plan.vector;
  const Unit unit = unit_of(s, plan, index);
  const ImageView factors = from_channel(target, rows.first);
  Shifts shifts(s, plan);
  for (int64_t position = 0; position < unit.rows; position += width) {
    const TileInPlace tile = tile_in_place(plan, unit, position);
    const std::optional<TileInPlace> after = tile_after(s, plan, index, position);
    const auto* slab = tile.in<const float>(source);
    const auto* own = tile.in<const float>(factors);
    const Next next = planes_of(after, s, plan, source);
    shifts.find(tile.start);
    const float* next_own = after.has_value() ? after->in<const float>(factors) : nullptr;
    if (tile.repeated == 0) {
      correlate_tile(plan, entries, slab, shifts.data(), own, next, next_own, plan.plane, plan.tile, rows, sums);
      continue;
    }
    const ScratchScope scratch;
    float* rest = take_floats(scratch, rows.count * width);  // without what the tile before has counted
    for (int64_t row = 0; row < rows.count; ++row) {
      std::fill_n(rest + row * width, tile.repeated, 0.0f);
      std::copy_n(own + row * plan.plane + tile.repeated, width - tile.repeated, rest + row * width + tile.repeated);
    }
    correlate_tile(plan, entries, slab, shifts.data(), rest, next, next_own, width, plan.tile, rows, sums);
  }
}

void correlate_packed(const Stencil& s, const Plan& plan, const StencilEntries& entries, const ImageView& source,
                      const ImageView& target, int64_t index, Rows rows, float* sums) {
  const int64_t width = plan.tile * plan.vector;
  const Unit unit = unit_of(s, plan, index);
  const int64_t plane = (ceil_div(plan.positions(), kLine) | 1) * kLine;
  const ScratchScope scratch;
  float* slab = take_floats(scratch, s.channels * s.phases() * plan.plane);
  float* factors = take_floats(scratch, rows.count * plane);
  pack_source(s, plan, unit, source, slab);
  pack({{target_runs(s, plan, unit, {0, 0}, plane, target), 0}}, from_channel(target, rows.first), rows.count, plane,
       factors);
  for (int64_t position = 0; position < unit.positions; position += width) {
    correlate_tile(plan, entries, slab + position, nullptr, factors + position, Next{}, nullptr, plane,
                   vectors_left(plan, unit, position), rows, sums);
  }
}

}  // namespace

void correlate_unit(const Stencil& s, const Plan& plan, const StencilEntries& entries, const ImageView& source,
                    const ImageView& target, int64_t unit, Rows rows, float* sums) {
  (plan.in_place ? correlate_in_place : correlate_packed)(s, plan, entries, source, target, unit, rows, sums);
}

}  // namespace granet::cpu
