#include "cpu/conv.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "common/bits.h"
#include "common/isa.h"

namespace granet::cpu {

extern const StencilKernels kStencilKernels_portable;
#if GRANET_X86
extern const StencilKernels kStencilKernels_avx2;
extern const StencilKernels kStencilKernels_avx512;
#endif

namespace {

const StencilKernels& kernels() {
#if GRANET_X86
  return *for_isa(&kStencilKernels_portable, &kStencilKernels_avx2, &kStencilKernels_avx512);
#else
  return kStencilKernels_portable;
#endif
}

// Memory that a thread keeps from one call to the next: fresh pages cost as much as what is computed in them.
class Scratch {
 public:
  float* floats(int64_t count) {
    if (count > capacity_) {
      data_.reset(static_cast<float*>(
          std::aligned_alloc(kAlignment, static_cast<size_t>(ceil_div(count * 4, kAlignment)) * kAlignment)));
      capacity_ = count;
    }
    return data_.get();
  }

 private:
  static constexpr int64_t kAlignment = 64;
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t capacity_ = 0;
};

thread_local Scratch slab_scratch;
thread_local Scratch sums_scratch;

int64_t pad_line(int64_t floats) { return ceil_div(floats, 16) * 16; }

struct Unit {  // of work: a band of a group of images
  int64_t first_image;
  int64_t first_row;
  int64_t rows;
  int64_t positions;
};

Unit unit_of(const Stencil& s, const Plan& plan, int64_t index) {
  const int64_t first_row = index % plan.bands * plan.band;
  const int64_t rows = std::min(plan.band, s.grid.h - first_row);
  return {index / plan.bands * plan.lanes, first_row, rows, rows * plan.row * plan.lanes};
}

void pack_source(const Stencil& s, const Plan& plan, const Unit& unit, const ImageView& view, float* slab) {
  for (int64_t a = 0; a < s.split.h; ++a) {
    for (int64_t b = 0; b < s.split.w; ++b) {
      const Runs runs = make_runs({.size = s.source,
                                   .scale = s.split,
                                   .phase = {a, b},
                                   .before = s.before,
                                   .first_row = unit.first_row,
                                   .rows = unit.rows + s.reach.h,
                                   .columns = plan.row,
                                   .row = plan.row,
                                   .lanes = plan.lanes,
                                   .first_image = unit.first_image,
                                   .images = s.batch},
                                  view);
      pack(runs, view, 0, s.channels, s.phases() * plan.plane, plan.plane, slab + (a * s.split.w + b) * plan.plane);
    }
  }
}

Runs target_runs(const Stencil& s, const Plan& plan, const Unit& unit, Pair phase, const ImageView& view) {
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
                    .images = s.batch},
                   view);
}

// Rows are split over tasks only where there are too few units for the threads: each part packs the slab again.
int64_t row_parts(const Stencil& s, const Plan& plan, const Parallel& parallel) {
  const int64_t wanted = ceil_div(parallel.threads(), std::max<int64_t>(1, plan.units()));
  return std::clamp<int64_t>(wanted, 1, s.targets);
}

// Vectors in the tile at `position`: tiles are as even as they can be.
int64_t vectors_left(const Plan& plan, const Unit& unit, int64_t position) {
  return std::min(plan.tile, ceil_div(unit.positions - position, plan.vector));
}

}  // namespace

void run_stencil(const Stencil& s, const Plan& plan, const StencilEntries& entries, const ImageView& source,
                 const float* bias, const Finish& finish, const ImageView& target, const Parallel& parallel) {
  const int64_t parts = row_parts(s, plan, parallel);
  const int64_t phases = s.spread.h * s.spread.w;
  const int64_t targets_each = ceil_div(s.targets, parts);
  const int64_t width = plan.tile * plan.vector;
  parallel.for_each(plan.units() * parts, [&](int64_t index) {
    const Unit unit = unit_of(s, plan, index / parts);
    const int64_t first = index % parts * targets_each;
    const int64_t targets = std::min(targets_each, s.targets - first);
    if (targets <= 0) return;
    float* slab = slab_scratch.floats(s.channels * s.phases() * plan.plane);
    float* sums = sums_scratch.floats(targets * phases * width);
    pack_source(s, plan, unit, source, slab);
    std::vector<Runs> runs;
    for (int64_t p = 0; p < phases; ++p) {
      runs.push_back(target_runs(s, plan, unit, {p / s.spread.w, p % s.spread.w}, target));
    }
    for (int64_t position = 0; position < unit.positions; position += width) {
      const int64_t vectors = vectors_left(plan, unit, position);
      const int64_t count = vectors * plan.vector;
      for (int64_t block = 0; block < plan.blocks; ++block) {
        kernels().sum_tile[vectors]({.entries = entries,
                                     .slab = slab + position,
                                     .block = block,
                                     .first_row = first * phases,
                                     .last_row = (first + targets) * phases,
                                     .bias = bias,
                                     .rows_per_bias = phases,
                                     .sums = sums});
      }
      for (int64_t p = 0; p < phases; ++p) {
        unpack(runs[static_cast<size_t>(p)], target, finish, sums + p * count, phases * count, position, count, first,
               targets, 1);
      }
    }
  });
}

int64_t gradient_parts(const Plan& plan) { return std::min<int64_t>(plan.units(), 16); }

void correlate_stencil(const Stencil& s, const Plan& plan, const StencilEntries& entries, int64_t count,
                       const ImageView& source, const ImageView& target, float* partial, float* gradient,
                       const Parallel& parallel) {
  const int64_t parts = gradient_parts(plan);
  const int64_t plane = pad_line(plan.positions() + plan.tile * plan.vector) + 16;
  parallel.for_each(parts, [&](int64_t part) {
    float* sums = partial + part * count;
    std::fill_n(sums, count, 0.0f);
    float* slab = slab_scratch.floats(s.channels * s.phases() * plan.plane);
    float* factors = sums_scratch.floats(entries.rows * plane);
    for (int64_t u = plan.units() * part / parts; u < plan.units() * (part + 1) / parts; ++u) {
      const Unit unit = unit_of(s, plan, u);
      pack_source(s, plan, unit, source, slab);
      pack(target_runs(s, plan, unit, {0, 0}, target), target, 0, entries.rows, plane, plane, factors);
      for (int64_t position = 0; position < unit.positions; position += plan.tile * plan.vector) {
        for (int64_t block = 0; block < plan.blocks; ++block) {
          kernels().correlate_tile[vectors_left(plan, unit, position)]({.entries = entries,
                                                                        .slab = slab + position,
                                                                        .target = factors + position,
                                                                        .plane = plane,
                                                                        .block = block,
                                                                        .first_row = 0,
                                                                        .last_row = entries.rows,
                                                                        .gradient = sums});
        }
      }
    }
  });
  constexpr int64_t kChunk = 4096;
  parallel.for_each(ceil_div(count, kChunk), [&](int64_t chunk) {
    const int64_t end = std::min(count, (chunk + 1) * kChunk);
    for (int64_t e = chunk * kChunk; e < end; ++e) {
      float sum = partial[e];
      for (int64_t part = 1; part < parts; ++part) sum += partial[part * count + e];
      gradient[e] = sum;
    }
  });
}

}  // namespace granet::cpu
