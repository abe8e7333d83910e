#include "cpu/conv.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "common/bits.h"
#include "common/isa.h"
#include "cpu/scratch.h"
#include "cpu/shifts.h"

namespace granet::cpu {

namespace {

const TileKernels& kernels(const Plan& plan) {
  const StencilKernels& all =
      *GRANET_FOR_ISA(&stencil_kernels_portable, &stencil_kernels_avx2, &stencil_kernels_avx512);
  return plan.shifted ? all.shifted : all.slab;
}

float* take_floats(const ScratchScope& scratch, int64_t count) {
  return (*scratch).take<float>(static_cast<size_t>(count));
}

struct Unit {  // of work: a band of a group of images
  int64_t first_image;
  int64_t first_row;
  int64_t rows;
  int64_t positions;
};

Unit unit_of(const Stencil& s, const Plan& plan, int64_t index) {
  const int64_t first_row = index % plan.bands * plan.band;
  const int64_t grid_rows = plan.in_place ? s.grid.h * s.grid.w : s.grid.h;
  const int64_t rows = std::min(plan.band, grid_rows - first_row);
  return {index / plan.bands * plan.lanes, first_row, rows, rows * plan.row * plan.lanes};
}

// Whether an element of the filter looks at a phase of the source.
bool is_read(int64_t phase, int64_t filter, int64_t step, int64_t split) {
  for (int64_t i = 0; i < filter; ++i) {
    if (i * step % split == phase) return true;
  }
  return split == 1;
}

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

struct Rows {
  int64_t first;  // target planes
  int64_t count;
};

// Rows are split over tasks only where there are too few other tasks for the threads: each part packs the slab again.
int64_t row_parts(int64_t tasks, const Stencil& s, const Parallel& parallel) {
  const int64_t wanted = ceil_div(parallel.threads(), std::max<int64_t>(1, tasks));
  return std::clamp<int64_t>(wanted, 1, s.targets);
}

Rows rows_of_part(const Stencil& s, int64_t parts, int64_t part) {
  const int64_t each = ceil_div(s.targets, parts);
  return {part * each, std::min(each, s.targets - part * each)};
}

// Vectors in the tile at `position`.
int64_t vectors_left(const Plan& plan, const Unit& unit, int64_t position) {
  return std::min(plan.tile, ceil_div(unit.positions - position, plan.vector));
}

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
// output behind it: 2.1 ms for 4.4 at batch 8, 25.7 MB; at batch 4 less on one thread, more on two; at batch 2 more.
bool is_larger_than_caches(const Stencil& s) {
  constexpr int64_t kLargeTarget = int64_t{16} << 20;  // bytes
  return s.batch * s.targets * s.target.h * s.target.w * 4 > kLargeTarget;
}

DirectTarget direct_target(const Stencil& s, const ImageView& target, const Finish& finish,
                           const std::vector<Segment>& segments) {
  DirectTarget direct{.target = static_cast<float*>(target.data),
                      .residual = static_cast<const float*>(finish.residual),
                      .plane = target.channel_stride,
                      .segments = segments.data(),
                      .count = static_cast<int64_t>(segments.size()),
                      .relu = finish.relu,
                      .streams = is_larger_than_caches(s),
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

// The share of its planes that is fetched with a block.
Next share_of(const Next& next, const Plan& plan, int64_t block) {
  const int64_t first = next.planes * block / plan.blocks;
  return {next.source + first * next.plane, next.plane, next.planes * (block + 1) / plan.blocks - first};
}

// All blocks of one tile. Without a direct target the sums are left in `sums`, row by row.
void sum_tile(const Plan& plan, const StencilEntries& entries, const float* slab, const Shift* shifts, const Next& next,
              int64_t vectors, int64_t first_row, int64_t last_row, const float* bias, int64_t rows_per_bias,
              const DirectTarget& direct, float* sums) {
  for (int64_t block = 0; block < plan.blocks; ++block) {
    kernels(plan).sum_tile[vectors]({.entries = entries,
                                     .slab = slab,
                                     .shifts = shifts,
                                     .next = share_of(next, plan, block),
                                     .block = block,
                                     .blocks = plan.blocks,
                                     .first_row = first_row,
                                     .last_row = last_row,
                                     .bias = bias,
                                     .rows_per_bias = rows_per_bias,
                                     .sums = sums,
                                     .direct = direct});
  }
}

// A tile of a source that is read in place.
struct TileInPlace {
  int64_t image;
  int64_t start;     // pixel
  int64_t repeated;  // so many of its pixels are those of the tile before: the last one is moved back to end with the
                     // image, where it would read past it

  template <typename Float>
  Float* in(const ImageView& view) const {
    return static_cast<Float*>(view.data) + image * view.image_stride + start;
  }
};

TileInPlace tile_in_place(const Plan& plan, const Unit& unit, int64_t position) {
  const int64_t wanted = unit.first_row + position;
  const int64_t start = std::min(wanted, plan.plane - plan.tile * plan.vector);
  return {unit.first_image, start, wanted - start};
}

// The tile after that at `position` of a unit; as a rule the thread's own next one.
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

void run_in_place(const Stencil& s, const Plan& plan, const StencilEntries& entries, const ImageView& source,
                  const float* bias, const Finish& finish, const ImageView& target, int64_t index, Rows rows) {
  const int64_t width = plan.tile * plan.vector;
  const Unit unit = unit_of(s, plan, index);
  const ScratchScope scratch;
  float* sums = take_floats(scratch, rows.count * width);
  Shifts shifts(s, plan);
  std::vector<Segment> segments(1);
  for (int64_t position = 0; position < unit.rows; position += width) {
    const TileInPlace tile = tile_in_place(plan, unit, position);
    const int64_t first = tile.image * target.image_stride + tile.start + tile.repeated;
    segments[0] = {tile.repeated, width - tile.repeated, first};  // what is repeated may be another thread's
    shifts.find(tile.start);
    sum_tile(plan, entries, tile.in<const float>(source), shifts.data(),
             planes_of(tile_after(s, plan, index, position), s, plan, source), plan.tile, rows.first,
             rows.first + rows.count, bias, 1, direct_target(s, target, finish, segments), sums);
  }
}

// A tile's sums, which for each row are those of all phases.
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

void run_packed(const Stencil& s, const Plan& plan, const StencilEntries& entries, const ImageView& source,
                const float* bias, const Finish& finish, const ImageView& target, int64_t index, Rows rows) {
  const Unit unit = unit_of(s, plan, index);
  const int64_t phases = s.spread.h * s.spread.w;
  const int64_t width = plan.tile * plan.vector;
  const ScratchScope scratch;
  float* slab = take_floats(scratch, s.channels * s.phases() * plan.plane);
  float* sums = take_floats(scratch, rows.count * phases * width);
  pack_source(s, plan, unit, source, slab);
  std::vector<Runs> runs;
  for (int64_t p = 0; p < phases; ++p) {
    runs.push_back(target_runs(s, plan, unit, {p / s.spread.w, p % s.spread.w}, unit.positions, target));
  }
  const bool direct = is_direct(s, plan, target);
  std::vector<Segment> segments;
  for (int64_t position = 0; position < unit.positions; position += width) {
    const int64_t vectors = vectors_left(plan, unit, position);
    const int64_t count = vectors * plan.vector;
    if (direct) find_segments(runs[0], position, count, segments);
    sum_tile(plan, entries, slab + position, nullptr, Next{}, vectors, rows.first * phases,
             (rows.first + rows.count) * phases, bias, phases,
             direct ? direct_target(s, target, finish, segments) : DirectTarget{}, sums);
    if (!direct) unpack_phases(s, runs, target, finish, sums, position, count, rows);
  }
}

}  // namespace

void run_stencil(const Stencil& s, const Plan& plan, const StencilEntries& entries, const ImageView& source,
                 const float* bias, const Finish& finish, const ImageView& target, const Parallel& parallel) {
  const int64_t parts = row_parts(plan.units(), s, parallel);
  parallel.for_each(plan.units() * parts, [&](int64_t index) {
    const Rows rows = rows_of_part(s, parts, index % parts);
    if (rows.count <= 0) return;
    (plan.in_place ? run_in_place : run_packed)(s, plan, entries, source, bias, finish, target, index / parts, rows);
  });
}

namespace {

ImageView from_channel(ImageView view, int64_t channel) {
  const int64_t bytes = view.element == Element::kFloat32 ? 4 : 2;
  view.data = static_cast<char*>(view.data) + channel * view.channel_stride * bytes;
  return view;
}

void correlate_tile(const Plan& plan, const StencilEntries& entries, const float* slab, const Shift* shifts,
                    const float* factors, const Next& next, const float* next_target, int64_t plane, int64_t vectors,
                    Rows rows, float* sums) {
  for (int64_t block = 0; block < plan.blocks; ++block) {
    kernels(plan).correlate_tile[vectors]({.entries = entries,
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

int64_t gradient_parts(const Plan& plan) { return std::min<int64_t>(plan.units(), 16); }

void correlate_stencil(const Stencil& s, const Plan& plan, const StencilEntries& entries, const int32_t* rank,
                       int64_t count, const ImageView& source, const ImageView& target, float* partial, float* gradient,
                       const Parallel& parallel) {
  const int64_t parts = gradient_parts(plan);
  const bool is_whole = parts == 1 && rank == nullptr;
  float* sums = is_whole ? gradient : partial;
  parallel.for_each(parts, [&](int64_t part) { std::fill_n(sums + part * count, count, 0.0f); });
  const int64_t splits = row_parts(parts, s, parallel);
  parallel.for_each(parts * splits, [&](int64_t task) {
    const int64_t part = task / splits;
    const Rows rows = rows_of_part(s, splits, task % splits);
    if (rows.count <= 0) return;
    for (int64_t u = plan.units() * part / parts; u < plan.units() * (part + 1) / parts; ++u) {
      (plan.in_place ? correlate_in_place : correlate_packed)(s, plan, entries, source, target, u, rows,
                                                              sums + part * count);
    }
  });
  if (is_whole) return;
  constexpr int64_t kChunk = 4096;
  parallel.for_each(ceil_div(count, kChunk), [&](int64_t chunk) {
    const int64_t end = std::min(count, (chunk + 1) * kChunk);
    for (int64_t e = chunk * kChunk; e < end; ++e) {
      float sum = partial[e];
      for (int64_t part = 1; part < parts; ++part) sum += partial[part * count + e];
      gradient[rank == nullptr ? e : rank[e]] = sum;
    }
  });
}

}  // namespace granet::cpu
