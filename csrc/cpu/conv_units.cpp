#include "cpu/conv_units.h"

#include <algorithm>

#include "common/bits.h"
#include "common/isa.h"

namespace granet::cpu {

const TileKernels& tile_kernels(const Plan& plan) {
  const StencilKernels& all =
      *GRANET_FOR_ISA(&stencil_kernels_portable, &stencil_kernels_avx2, &stencil_kernels_avx512);
  return plan.shifted ? all.shifted : all.slab;
}

Unit unit_of(const Stencil& s, const Plan& plan, int64_t index) {
  const int64_t first_row = index % plan.bands * plan.band;
  const int64_t grid_rows = plan.in_place ? s.grid.h * s.grid.w : s.grid.h;
  const int64_t rows = std::min(plan.band, grid_rows - first_row);
  return {index / plan.bands * plan.lanes, first_row, rows, rows * plan.row * plan.lanes};
}

namespace {

// Whether an element of the filter looks at a phase of the source.
bool is_read(int64_t phase, int64_t filter, int64_t step, int64_t split) {
  for (int64_t i = 0; i < filter; ++i) {
    if (i * step % split == phase) return true;
  }
  return split == 1;
}

}  // namespace

void pack_source(const Stencil& s, const Plan& plan, const Unit& unit, const ImageView& view, float* slab) {
  std::vector<Phase> phases;
  for (int64_t a = 0; a < s.split.h; ++a) {
    for (int64_t b = 0; b < s.split.w; ++b) {
      if (!is_read(a, s.filter.h, s.step.h, s.split.h) || !is_read(b, s.filter.w, s.step.w, s.split.w)) continue;
      phases.push_back({make_runs({.size = s.source,
                                   .scale = s.split,
                                   .phase = {a, b},
                                   .before = s.before,
                                   .first_row = unit.first_row,
                                   .rows = unit.rows + s.reach.h,
                                   .columns = plan.row,
                                   .row = plan.row,
                                   .lanes = plan.lanes,
                                   .first_image = unit.first_image,
                                   .images = s.batch,
                                   .floats = plan.plane},
                                  view),
                        (a * s.split.w + b) * plan.plane});
    }
  }
  pack(phases, view, s.channels, s.phases() * plan.plane, slab);
}

Runs target_runs(const Stencil& s, const Plan& plan, const Unit& unit, Pair phase, int64_t floats,
                 const ImageView& view) {
  return make_runs({.size = s.target,
                    .scale = s.spread,
                    .phase = phase,
                    .before = {0, 0},
                    .first_row = unit.first_row,
                    .rows = unit.rows,
                    .columns = s.grid.w,
                    .row = plan.row,
                    .lanes = plan.lanes,
                    .first_image = unit.first_image,
                    .images = s.batch,
                    .floats = floats},
                   view);
}

int64_t row_parts(int64_t tasks, const Stencil& s, const Parallel& parallel) {
  const int64_t wanted = ceil_div(parallel.threads(), std::max<int64_t>(1, tasks));
  return std::clamp<int64_t>(wanted, 1, s.targets);
}

Rows rows_of_part(const Stencil& s, int64_t parts, int64_t part) {
  const int64_t each = ceil_div(s.targets, parts);
  return {part * each, std::min(each, s.targets - part * each)};
}

int64_t vectors_left(const Plan& plan, const Unit& unit, int64_t position) {
  return std::min(plan.tile, ceil_div(unit.positions - position, plan.vector));
}

ImageView from_channel(ImageView view, int64_t channel) {
  const int64_t bytes = view.element == Element::kFloat32 ? 4 : 2;
  view.data = static_cast<char*>(view.data) + channel * view.channel_stride * bytes;
  return view;
}

void unpack_phases(const Stencil& s, const std::vector<Runs>& phases, const ImageView& target, const Finish& finish,
                   float* sums, int64_t position, int64_t count, Rows rows) {
  const auto width = static_cast<int64_t>(phases.size()) * count;
  const size_t together = s.spread.w == 2 ? 2 : 1;  // even and odd columns
  for (size_t p = 0; p < phases.size(); p += together, sums += static_cast<int64_t>(together) * count) {
    if (together == 2) {
      unpack_columns(phases[p], phases[p + 1], target, finish, sums, count, width, position, count, rows.first,
                     rows.count);
    } else {
      unpack(phases[p], target, finish, sums, width, position, count, rows.first, rows.count);
    }
  }
}

TileInPlace tile_in_place(const Plan& plan, const Unit& unit, int64_t position) {
  const int64_t wanted = unit.first_row + position;
  const int64_t start = std::min(wanted, plan.plane - plan.tile * plan.vector);
  return {unit.first_image, start, wanted - start};
}

std::optional<TileInPlace> tile_after(const Stencil& s, const Plan& plan, int64_t unit, int64_t position) {
  const int64_t next = position + plan.tile * plan.vector;
  if (const Unit same = unit_of(s, plan, unit); next < same.rows) return tile_in_place(plan, same, next);
  if (unit + 1 == plan.units()) return std::nullopt;
  return tile_in_place(plan, unit_of(s, plan, unit + 1), 0);
}

Next planes_of(const std::optional<TileInPlace>& tile, const Stencil& s, const Plan& plan, const ImageView& source) {
  if (!tile.has_value()) return {};
  const Pair last = {s.first.h + (s.filter.h - 1) * s.step.h, s.first.w + (s.filter.w - 1) * s.step.w};
  const int64_t farthest = std::max(s.first.h, last.h) * s.grid.w + std::max(s.first.w, last.w);
  return {tile->in<const float>(source) + farthest, plan.plane, s.channels};  // what is before it has been read
}

Next share_of(const Next& next, const Plan& plan, int64_t block) {
  const int64_t first = next.planes * block / plan.blocks;
  return {next.source + first * next.plane, next.plane, next.planes * (block + 1) / plan.blocks - first};
}

}  // namespace granet::cpu
