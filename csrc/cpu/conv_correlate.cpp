#include "cpu/conv_correlate.h"

#include <optional>

#include "cpu/shifts.h"

namespace granet::cpu {

namespace {

void correlate_tile(const Plan& plan, CorrelateTile tile, int64_t vectors) {
  const auto kernel = tile_kernels(plan).correlate_tile[vectors];
  const Next next = tile.next;
  tile.blocks = plan.blocks;
  for (tile.block = 0; tile.block < plan.blocks; ++tile.block) {
    tile.next = share_of(next, plan, tile.block);
    kernel(tile);
  }
}

void correlate_in_place(const Stencil& s, const Plan& plan, const StencilEntries& entries, const ImageView& source,
                        const Correlated& with, int64_t index, Rows rows) {
  const Unit unit = unit_of(s, plan, index);
  const ScratchScope scratch;
  const FactorsInPlace factors(with, plan, rows, scratch);
  Shifts shifts(s, plan);
  for (int64_t position = 0; position < unit.rows; position += plan.tile * plan.vector) {
    const TileInPlace tile = tile_in_place(plan, unit, position);
    const std::optional<TileInPlace> after = tile_after(s, plan, index, position);
    shifts.find(tile.start);
    correlate_tile(plan,
                   {.entries = entries,
                    .slab = tile.in<const float>(source),
                    .shifts = shifts.data(),
                    .next = planes_of(after, s, plan, source),
                    .factors = factors.of(tile, after),
                    .first_row = rows.first,
                    .last_row = rows.first + rows.count},
                   plan.tile);
  }
}

void correlate_packed(const Stencil& s, const Plan& plan, const StencilEntries& entries, const ImageView& source,
                      const Correlated& with, int64_t index, Rows rows) {
  const Unit unit = unit_of(s, plan, index);
  const ScratchScope scratch;
  float* slab = take_floats(scratch, s.channels * s.phases() * plan.plane);
  pack_source(s, plan, unit, source, slab);
  const Factors factors = packed_factors(s, plan, with, unit, rows, scratch);
  for (int64_t position = 0; position < unit.positions; position += plan.tile * plan.vector) {
    correlate_tile(plan,
                   {.entries = entries,
                    .slab = slab + position,
                    .factors = factors.from(position),
                    .first_row = rows.first,
                    .last_row = rows.first + rows.count},
                   vectors_left(plan, unit, position));
  }
}

}  // namespace

void correlate_unit(const Stencil& s, const Plan& plan, const StencilEntries& entries, const ImageView& source,
                    const Correlated& with, int64_t unit, Rows rows) {
  (plan.in_place ? correlate_in_place : correlate_packed)(s, plan, entries, source, with, unit, rows);
}

}  // namespace granet::cpu
