#include "cpu/conv_sums.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/shifts.h"

namespace granet::cpu {

namespace {

// The pieces of the tile [position, position + count) in the target of a row.
void find_segments(const Runs& runs, int64_t position, int64_t count, std::vector<Segment>& segments) {
  segments.clear();
  for (const Run& run : runs.runs) {
    const int64_t begin = std::max(run.position, position);
    const int64_t end = std::min(run.position + run.length, position + count);
    if (begin < end) segments.push_back({begin - position, end - begin, run.origin + begin - run.position});
  }
}

// Whether rows are finished by the kernel: the target's pixels are next to one another, as positions are.
bool is_direct(const Stencil& s, const Plan& plan, const ImageView& target) {
  const int64_t step = target.pixels != 0 ? target.y_stride : target.x_stride;
  return target.element == Element::kFloat32 && plan.lanes == 1 && s.spread.h * s.spread.w == 1 &&
         (step == 1 || s.grid.h * s.grid.w == 1);
}

// Whether a target is written past the caches: it is too large for who reads it next to find much of it there, and the
// processor need not fetch what will be overwritten. 64 -> 256 channels at 56 x 56, 98 % sparse, with a sum over the
// output behind it: 2.1 ms for 4.4 at batch 8, 25.7 MB; at batch 4 less on one thread, more on two; at batch 2 more. On
// a Xeon 64 -> 64 channels at 32 x 32, batch 64, 16 MiB, take 0.89 to 0.95 of the time on one thread and 0.87 to 1.0 on
// two, in a training step.
bool is_larger_than_caches(const Stencil& s) {
  constexpr int64_t kLargeTarget = int64_t{16} << 20;  // bytes
  return s.batch * s.targets * s.target.h * s.target.w * 4 >= kLargeTarget;
}

DirectTarget direct_target(const Stencil& s, const ImageView& target, const Finish& finish,
                           const std::vector<Segment>& segments) {
  DirectTarget direct{.target = static_cast<float*>(target.data),
                      .residual = static_cast<const float*>(finish.residual),
                      .plane = target.channel_stride,
                      .segments = segments.data(),
                      .count = static_cast<int64_t>(segments.size()),
                      .relu = finish.relu,
                      .streams = is_larger_than_caches(s) && segments.size() == 1,  // pieces are not (finish_row)
                      .is_one_piece = !segments.empty(),
                      .held = {}};
  for (size_t i = 0; i < segments.size(); ++i) {
    const auto& [position, length, at] = segments[i];
    direct.is_one_piece &= i == 0 || at == segments[i - 1].target + segments[i - 1].length;
    for (int64_t p = position; p < position + length;) {  // vector by vector
      const int64_t lane = p % kWidestVector, lanes = std::min(kWidestVector - lane, position + length - p);
      uint16_t& held = direct.held[p / kWidestVector];
      held = static_cast<uint16_t>(held | ((1u << lanes) - 1) << lane);
      p += lanes;
    }
  }
  return direct;
}

// All blocks of one tile. Without a direct target the sums are left in `tile.sums`, row by row.
void sum_tile(const Plan& plan, SumTile tile, int64_t vectors) {
  const TileKernels& kernels = tile_kernels(plan);
  const auto kernel = (tile.factors.data == nullptr ? kernels.sum_tile : kernels.sum_with_factors)[vectors];
  const Next next = tile.next;
  tile.blocks = plan.blocks;
  for (tile.block = 0; tile.block < plan.blocks; ++tile.block) {
    tile.next = share_of(next, plan, tile.block);
    kernel(tile);
  }
}

void sum_in_place(const Sums& what, const Correlated& with, int64_t index, Rows rows) {
  const Plan& plan = what.plan;
  const Stencil& s = what.stencil;
  const int64_t width = plan.tile * plan.vector;
  const Unit unit = unit_of(s, plan, index);
  const ScratchScope scratch;
  float* sums = take_floats(scratch, rows.count * width);
  const FactorsInPlace factors(with, plan, rows, scratch);
  Shifts shifts(s, plan);
  std::vector<Segment> segments(1);
  for (int64_t position = 0; position < unit.rows; position += width) {
    const TileInPlace tile = tile_in_place(plan, unit, position);
    const std::optional<TileInPlace> after = tile_after(s, plan, index, position);
    const int64_t first = tile.image * what.target.image_stride + tile.start + tile.repeated;
    segments[0] = {tile.repeated, width - tile.repeated, first};  // what is repeated may be another thread's
    shifts.find(tile.start);
    sum_tile(plan,
             {.entries = what.entries,
              .slab = tile.in<const float>(what.source),
              .shifts = shifts.data(),
              .next = planes_of(after, s, plan, what.source),
              .factors = factors.of(tile, after),
              .first_row = rows.first,
              .last_row = rows.first + rows.count,
              .bias = what.bias,
              .rows_per_bias = 1,
              .sums = sums,
              .direct = direct_target(s, what.target, what.finish, segments)},
             plan.tile);
  }
}

void sum_packed(const Sums& what, const Correlated& with, int64_t index, Rows rows) {
  const Plan& plan = what.plan;
  const Stencil& s = what.stencil;
  const Unit unit = unit_of(s, plan, index);
  const int64_t phases = s.spread.h * s.spread.w;
  const int64_t width = plan.tile * plan.vector;
  const ScratchScope scratch;
  float* slab = take_floats(scratch, s.channels * s.phases() * plan.plane);
  float* sums = take_floats(scratch, rows.count * phases * width);
  pack_source(s, plan, unit, what.source, slab);
  const Factors factors = packed_factors(s, plan, with, unit, rows, scratch);
  std::vector<Runs> runs;
  for (int64_t p = 0; p < phases; ++p) {
    runs.push_back(target_runs(s, plan, unit, {p / s.spread.w, p % s.spread.w}, unit.positions, what.target));
  }
  const bool direct = is_direct(s, plan, what.target);
  std::vector<Segment> segments;
  for (int64_t position = 0; position < unit.positions; position += width) {
    const int64_t vectors = vectors_left(plan, unit, position);
    const int64_t count = vectors * plan.vector;
    if (direct) find_segments(runs[0], position, count, segments);
    sum_tile(plan,
             {.entries = what.entries,
              .slab = slab + position,
              .factors = factors.from(position),
              .first_row = rows.first * phases,
              .last_row = (rows.first + rows.count) * phases,
              .bias = what.bias,
              .rows_per_bias = phases,
              .sums = sums,
              .direct = direct ? direct_target(s, what.target, what.finish, segments) : DirectTarget{}},
             vectors);
    if (!direct) unpack_phases(s, runs, what.target, what.finish, sums, position, count, rows);
  }
}

}  // namespace

void sum_unit(const Sums& what, const Correlated& with, int64_t unit, Rows rows) {
  (what.plan.in_place ? sum_in_place : sum_packed)(what, with, unit, rows);
}

}  // namespace granet::cpu
