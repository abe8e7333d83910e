#include "cpu/stencil.h"

#include <algorithm>
#include <limits>

#include "common/bits.h"
#include "common/isa.h"
#include "cpu/stencil_tables.h"

namespace granet::cpu {

namespace {

// Whether an image has pixels for the largest tile, or at least for a tile of a few vectors, all of them full. On a
// Xeon 1 x 1 layers took 0.6 to 0.95 of the time in place with 8 x 8 pixels, up to 1.4 with 10 x 10 (AVX-512; 0.65
// to 1.06 with AVX2) and up to 2 with 7 x 7.
bool fill_vectors(int64_t pixels) {
  constexpr int64_t kFewestVectors = 4;
  return pixels >= kMostVectors * kWidestVector ||
         (pixels >= kFewestVectors * kWidestVector && pixels % kWidestVector == 0);
}

}  // namespace

bool can_read_in_place(const ConvShape& s) {
  constexpr int64_t kMostOffset = std::numeric_limits<int32_t>::max();
  if (s.stride.h != 1 || s.stride.w != 1) return false;
  const Pair output = s.output();
  const int64_t pixels = s.input.h * s.input.w;
  const int64_t floats = std::max(s.channels, s.out_channels) * pixels;
  const int64_t filter = s.kernel.h * s.kernel.w;
  if (output.h != s.input.h || output.w != s.input.w || !fill_vectors(pixels)) return false;
  if (filter == 1) return floats <= kMostOffset;
  return isa() == Isa::kAvx512 && filter <= kMostShifts && floats <= kMostOffset >> kShiftBits;
}

// A product with a masked load takes 1.2 to 1.35 of the time of one from the slab, for the mask is loaded too. So
// packing is worth its time from so many products on that each element of the source takes part in. On a Zen 4, in
// place took 0.85 to 1.0 of the time with 12 and 17 of them, 1.05 with 23 and 1.08 with 24; where a row is several
// vectors, whose ends are then rare, 0.8 with 12, 0.88 with 17 and as long with 23 and 29. On a Xeon, where a row is a
// vector or half of one, 0.64 to 0.87 with 12, 0.55 to 0.99 with 23, 0.84 to 1.03 with 46 and 0.92 to 1.18 with 81;
// such rows were not measured on a Zen 4.
bool is_faster_in_place(const ConvShape& s, int64_t planes, int64_t entries) {
  constexpr int64_t kMostProducts = 20, kMostInLongRows = 32, kMostInVectorRows = 48, kLongRow = 48;
  if (s.kernel.h * s.kernel.w == 1) return true;
  const bool vector_rows = s.input.w == kWidestVector || 2 * s.input.w == kWidestVector;
  return entries <= planes * (vector_rows ? kMostInVectorRows : s.input.w < kLongRow ? kMostProducts : kMostInLongRows);
}

Stencil forward_stencil(const ConvShape& shape) {
  const auto reach = [](int64_t kernel, int64_t dilation, int64_t stride) { return (kernel - 1) * dilation / stride; };
  return {.batch = shape.batch,
          .channels = shape.channels,
          .source = shape.input,
          .split = shape.stride,
          .before = shape.padding,
          .grid = shape.output(),
          .reach = {reach(shape.kernel.h, shape.dilation.h, shape.stride.h),
                    reach(shape.kernel.w, shape.dilation.w, shape.stride.w)},
          .targets = shape.out_channels,
          .target = shape.output(),
          .spread = {1, 1},
          .filter = shape.kernel,
          .first = {-shape.padding.h, -shape.padding.w},
          .step = shape.dilation,
          .products = 1};
}

// Input row h = stride * q + a takes output row q + (a + padding - dilation * k) / stride for each filter row k that
// divides: between -before and -before + reach rows away from q.
Stencil input_gradient_stencil(const ConvShape& shape) {
  const auto before = [](int64_t kernel, int64_t dilation, int64_t stride, int64_t padding) {
    return std::max<int64_t>(0, -floor_div(padding - (kernel - 1) * dilation, stride));
  };
  const auto after = [](int64_t stride, int64_t padding) { return (stride - 1 + padding) / stride; };
  const Pair above = {before(shape.kernel.h, shape.dilation.h, shape.stride.h, shape.padding.h),
                      before(shape.kernel.w, shape.dilation.w, shape.stride.w, shape.padding.w)};
  return {.batch = shape.batch,
          .channels = shape.out_channels,
          .source = shape.output(),
          .split = {1, 1},
          .before = above,
          .grid = {ceil_div(shape.input.h, shape.stride.h), ceil_div(shape.input.w, shape.stride.w)},
          .reach = {above.h + after(shape.stride.h, shape.padding.h), above.w + after(shape.stride.w, shape.padding.w)},
          .targets = shape.channels,
          .target = shape.input,
          .spread = shape.stride,
          .filter = shape.kernel,
          .first = shape.padding,
          .step = {-shape.dilation.h, -shape.dilation.w},
          .products = 2};
}

namespace {

constexpr int64_t kSlabBytes = int64_t{1} << 19;    // a packed band, half of a second-level cache
constexpr int64_t kBlockBytes = int64_t{24} << 10;  // of a first-level cache of 32 KiB
constexpr int64_t kRowProducts = 96;                // vectors that a row multiplies in a block
constexpr int64_t kBandTiles = 4;                   // that a thread takes at once, in place

int64_t vector_floats() { return isa() == Isa::kAvx512 ? 16 : isa() == Isa::kAvx2 ? 8 : 4; }

// Columns of a slab row. The zeros behind a row are the zeros before the next, so only the wider of the two is stored.
int64_t row_length(const Stencil& s) {
  const int64_t last = (s.grid.w - 1 + s.reach.w + 1) * s.split.w - 1 - s.before.w;  // source column
  const int64_t behind = std::max<int64_t>(0, last - (s.source.w - 1));
  const int64_t columns = ceil_div(s.source.w + std::max(s.before.w, behind), s.split.w);
  return std::max(columns, s.grid.w);
}

// Channels are taken in blocks so that a block's part of a tile stays in the first-level cache while all rows pass over
// it. Sums are stored and loaded again between blocks, and factors loaded, so a row should have some entries in each:
// linear layers of 256 rows, 95 % sparse, took 0.88 to 0.96 of the time of their backward pass with half the blocks
// once it had factors.
void choose_blocks(const Stencil& s, int64_t entries, int64_t window, Plan& plan) {
  const int64_t fitting = std::max<int64_t>(1, kBlockBytes / 4 / window);
  const int64_t worthwhile = entries * plan.tile / (s.rows() * kRowProducts * s.products);
  plan.blocks = std::clamp<int64_t>(ceil_div(s.channels, fitting), 1, std::max<int64_t>(1, worthwhile));
  plan.block = ceil_div(s.channels, plan.blocks);
  plan.blocks = ceil_div(s.channels, plan.block);
}

// The number of vectors to a tile, at most kMostVectors, that covers `floats` with the fewest.
int64_t best_tile(int64_t floats, int64_t vector) {
  const int64_t most = std::min(kMostVectors, floats / vector);
  int64_t best = most;
  const auto computed = [&](int64_t tile) { return ceil_div(floats, tile * vector) * tile; };
  for (int64_t tile = most; 2 * tile > most; --tile) {
    if (computed(tile) < computed(best)) best = tile;
  }
  return best;
}

Plan plan_in_place(const Stencil& s, int64_t entries) {
  const int64_t pixels = s.grid.h * s.grid.w;
  Plan plan{};
  plan.in_place = true;
  plan.shifted = s.filter.h * s.filter.w > 1;
  plan.vector = vector_floats();
  plan.lanes = 1;
  plan.row = 1;
  plan.plane = pixels;
  plan.tile = best_tile(pixels, plan.vector);
  plan.image_groups = s.batch;
  plan.band = std::min(pixels, kBandTiles * plan.tile * plan.vector);
  plan.bands = ceil_div(pixels, plan.band);
  choose_blocks(s, entries, plan.tile * plan.vector + s.reach.h * s.grid.w + s.reach.w, plan);
  return plan;
}

// Whether as many images as a vector has lanes are interleaved. Loads are of whole lines then, which take 0.7 of the
// time of those that cross one, and the short rows of small images fill vectors; but packing and unpacking transpose,
// and the slab is too large for the second-level cache. On a Zen 4 with AVX-512, images of 14 x 14 to 28 x 28 pixels
// one by one took 0.7 to 0.83 of the time with up to 46 products for each element of the source, 0.9 with 58, as long
// with 115 and 1.15 with 230; of 8 x 8 as long with 46 and twice as long of 4 x 4. With AVX2 it hardly matters: 0.97
// with 46 products and 1.03 with 230.
//
// With a stride of 2, even and odd columns are packed apart and unpacked in pairs (slab.h), so that those of a single
// image fill vectors too. Image by image, 14 columns of a grid took 0.7 to 0.9 of the time, 28 of them 0.5 to 0.9. On a
// Xeon with AVX-512, 8 columns of 3 x 3 layers took 0.65 to 0.85 forward and 0.6 to 0.8 backward with up to 57
// products, as long with 115, and of 1 x 1 layers half as long; 4 columns of 3 x 3 layers 1.4 to 2.5 times as long.
// With AVX2, whose slabs of interleaved images are half as large, 8 columns took 0.75 to 1.2 forward and 0.8 to 1.1
// backward. On a Zen 4, 8 and 4 columns were measured only while interleaved ones were unpacked element by element.
bool interleaves(const Stencil& s, int64_t entries, int64_t vector) {
  constexpr int64_t kWide = 12;          // columns of an image that is large enough to be taken alone
  constexpr int64_t kWideStrided = 8;    // columns of its grid, with a stride of 2
  constexpr int64_t kMostProducts = 96;  // for each element of the source
  if (s.batch < vector || s.source.w == 1 || s.grid.w >= 2 * vector) return false;
  const bool spreads = s.spread.w == 2, splits = s.split.w == 2 && vector == kWidestVector;
  if (s.grid.w < (spreads || splits ? kWideStrided : kWide)) return true;
  if (spreads && s.grid.w >= kWide) return false;
  return entries * s.grid.h * s.grid.w > kMostProducts * s.channels * s.source.h * s.source.w;
}

}  // namespace

Plan plan_for(const Stencil& s, int64_t entries, bool in_place) {
  if (in_place) return plan_in_place(s, entries);
  Plan plan{};
  plan.vector = vector_floats();
  plan.row = row_length(s);
  plan.lanes = interleaves(s, entries, plan.vector) ? plan.vector : 1;
  plan.image_groups = ceil_div(s.batch, plan.lanes);
  const int64_t planes = s.channels * s.phases();
  const int64_t row_floats = plan.row * plan.lanes;
  const int64_t most_rows =
      std::max<int64_t>(1, kSlabBytes / 4 / std::max<int64_t>(1, planes * row_floats) - s.reach.h);
  const int64_t enough = ceil_div(kMostVectors * plan.vector, row_floats);
  plan.bands = ceil_div(s.grid.h, std::min(std::max({most_rows, enough, 4 * s.reach.h}), s.grid.h));
  plan.band = ceil_div(s.grid.h, plan.bands);
  plan.bands = ceil_div(s.grid.h, plan.band);
  const int64_t vectors = ceil_div(plan.positions(), plan.vector);
  plan.tile = ceil_div(vectors, ceil_div(vectors, kMostVectors));
  const int64_t floats = vectors * plan.vector + s.reach.h * row_floats + s.reach.w * plan.lanes;
  const int64_t lines = ceil_div(floats, kLine);
  plan.plane = (lines | 1) * kLine;  // an odd number of lines: planes spread over all sets of a cache
  const int64_t window = (plan.tile * plan.vector + s.reach.h * row_floats + s.reach.w * plan.lanes) * s.phases();
  choose_blocks(s, entries, window, plan);
  return plan;
}

}  // namespace granet::cpu
