// The kernels of a stencil (stencil.h), compiled once for each instruction set.

#include "common/prefetch.h"
#include "common/simd.h"
#include "common/simd_rows.h"
#include "cpu/stencil_tables.h"

namespace granet::cpu::GRANET_ISA {

template <typename Value>  // a float, or a vector of them
inline Value finish(Value value, const float* residual, bool relu) {
  if (residual != nullptr) {
    Value added;
    __builtin_memcpy(&added, residual, sizeof added);
    value += added;
  }
  return relu ? (value < 0.0f ? Value{} : value) : value;  // a NaN stays
}

#if GRANET_AVX512
// Segments that adjoin in the target: what each vector holds of them, closed up. A whole vector is stored as long as
// that stays within the piece, for the next one overwrites the rest.
template <int kTile>
void finish_one_piece(const Floats (&sum)[kTile], const DirectTarget& direct, float* target, const float* residual) {
  const Segment& last = direct.segments[direct.count - 1];
  const int64_t end = last.target + last.length;
  int64_t at = direct.segments->target;
  for (int t = 0; t < kTile; ++t) {
    const Floats held = Floats(_mm512_maskz_compress_ps(direct.held[t], sum[t]));
    const int64_t count = __builtin_popcount(direct.held[t]);
    if (end - at >= kLanes) {
      store(target + at, finish(held, residual == nullptr ? nullptr : residual + at, direct.relu));
    } else if (count > 0) {
      const Floats added = residual == nullptr ? Floats{} : load_first(residual + at, count);
      store_first(target + at, finish(residual == nullptr ? held : held + added, nullptr, direct.relu), count);
    }
    at += count;
  }
}
#endif

template <int kTile>
void finish_row(const Floats (&sum)[kTile], const DirectTarget& direct, int64_t row) {
  float* target = direct.target + row * direct.plane;
  const float* residual = direct.residual == nullptr ? nullptr : direct.residual + row * direct.plane;
  const auto residual_at = [&](int64_t at) { return residual == nullptr ? nullptr : residual + at; };
  if (direct.count == 1 && direct.segments->length == kTile * kLanes) {
    const int64_t first = direct.segments->target;
    if (direct.streams && reinterpret_cast<uintptr_t>(target + first) % kVectorBytes == 0) {
      for (int t = 0; t < kTile; ++t) {
        const int64_t at = first + t * kLanes;
        stream(target + at, finish(sum[t], residual_at(at), direct.relu));
      }
      return;
    }
    for (int t = 0; t < kTile; ++t) {
      const int64_t at = first + t * kLanes;
      store(target + at, finish(sum[t], residual_at(at), direct.relu));
    }
    return;
  }
#if GRANET_AVX512
  if (direct.is_one_piece) return finish_one_piece(sum, direct, target, residual);
#endif
  alignas(kVectorBytes) float sums[kTile * kLanes];
  for (int t = 0; t < kTile; ++t) store(sums + t * kLanes, sum[t]);
  for (const Segment* s = direct.segments; s != direct.segments + direct.count; ++s) {
    const float* source = sums + s->position;
    int64_t i = 0;
    for (; i + kLanes <= s->length; i += kLanes) {
      const int64_t at = s->target + i;
      store(target + at, finish(load(source + i), residual_at(at), direct.relu));
    }
    for (; i + 4 <= s->length; i += 4) {
      const int64_t at = s->target + i;
      store_four(target + at, finish(load_four(source + i), residual_at(at), direct.relu));
    }
    for (; i < s->length; ++i) {
      const int64_t at = s->target + i;
      target[at] = finish(source[i], residual_at(at), direct.relu);
    }
  }
}

// A tile's worth of floats, into the second level, which does not set off the first level's prefetchers.
template <int kTile>
void prefetch_tile(const float* source) {
  constexpr int kFloats = kTile * kLanes;
  for (int i = 0; i < kFloats; i += kLine) __builtin_prefetch(source + i, kToRead, kSecondLevel);
  __builtin_prefetch(source + kFloats - 1, kToRead, kSecondLevel);  // a tile rarely begins at a line
}

// Fetches the next tile's planes, evenly over the rows of this one.
template <int kTile>
class Prefetch {
 public:
  Prefetch(const Next& next, int64_t rows) : next_(next), rows_(rows) {}

  void with_row() {
    for (due_ += next_.planes; due_ >= rows_; due_ -= rows_) {
      prefetch_tile<kTile>(next_.source);
      next_.source += next_.plane;
    }
  }

 private:
  Next next_;
  int64_t rows_;
  int64_t due_ = 0;  // planes times rows
};

// The target's lines of a row, while the row before is computed: a store of part of a line waits for all of it.
inline void fetch_target(const DirectTarget& direct, int64_t row) {
  constexpr int64_t kLineFloats = 16;
  const float* target = direct.target + row * direct.plane;
  for (const Segment* s = direct.segments; s != direct.segments + direct.count; ++s) {
    for (int64_t i = 0; i < s->length; i += kLineFloats) __builtin_prefetch(target + s->target + i, kToWrite);
  }
}

// The entries of a block's rows.
struct BlockEntries {
  explicit BlockEntries(const StencilEntries& entries, int64_t block)
      : begin(entries.begin + block * entries.rows),
        first(entries.first + block * entries.rows),
        offset(entries.offset) {}

  int64_t count(int64_t row) const { return begin[row + 1] - begin[row]; }

  const int64_t* begin;
  const int64_t* first;
  const int32_t* offset;
};

// What an entry of a plan that is not `shifted` looks at: a tile of the slab.
class SlabTile {
 public:
  SlabTile(const float* slab, const Shift* /*shifts*/, int32_t offset) : source_(slab + offset) {}
  Floats operator[](int t) const { return load(source_ + t * kLanes); }

 private:
  const float* source_;
};

#if GRANET_AVX512
// And one that is: a tile of an image, shifted, with zeros for what lies beyond its sides.
class ShiftedTile {
 public:
  ShiftedTile(const float* slab, const Shift* shifts, int32_t offset)
      : shift_(shifts[offset & (kMostShifts - 1)]), source_(slab + (offset >> kShiftBits) + shift_.offset) {}
  Floats operator[](int t) const { return Floats(_mm512_maskz_loadu_ps(shift_.inside[t], source_ + t * kLanes)); }

 private:
  const Shift& shift_;
  const float* source_;
};
#endif

// A row's sums before a block: those of the blocks before, or the bias.
template <int kTile>
void start_row(const SumTile& task, int64_t row, const float* sums, Floats (&sum)[kTile]) {
  if (task.block > 0) {
    for (int t = 0; t < kTile; ++t) sum[t] = load(sums + t * kLanes);
  } else {
    const Floats bias = broadcast(task.bias == nullptr ? 0.0f : task.bias[row / task.rows_per_bias]);
    for (int t = 0; t < kTile; ++t) sum[t] = bias;
  }
}

// Those of a row.
struct RowEntries {
  int64_t count;
  const int32_t* offset;
  const float* value;
  int64_t first;  // of the values
};

// add(row, entries of it, sum) for every row of a block.
//
// What it adds to must not be `sum` itself, which is handed on by address: that would be stored for every entry. Nor
// should it look up the entries through what it captures: after each row, whose end is mispredicted, the next one waits
// for its first offset, and 1.07 of the time went into a layer at 4 x 4 when that took two loads more.
template <int kTile, typename Add>
void for_each_row(const SumTile& task, const Add& add) {
  const BlockEntries entries(task.entries, task.block);
  const float* const values = task.entries.value;
  const bool finishes = task.direct.target != nullptr && task.block + 1 == task.blocks;
  Prefetch<kTile> next(task.next, task.last_row - task.first_row);
  float* sums = task.sums;
  for (int64_t row = task.first_row; row < task.last_row; ++row, sums += kTile * kLanes) {
    next.with_row();
    const int64_t count = entries.count(row);
    if (task.block > 0 && count == 0 && !finishes) continue;
    if (finishes && !task.direct.streams && row + 1 < task.last_row) fetch_target(task.direct, row + 1);
    Floats sum[kTile];
    start_row<kTile>(task, row, sums, sum);
    const int64_t first = entries.first[row];
    add(row, RowEntries{count, entries.offset + entries.begin[row], values + first, first}, sum);
    if (finishes) {
      finish_row<kTile>(sum, task.direct, row);
    } else {
      for (int t = 0; t < kTile; ++t) store(sums + t * kLanes, sum[t]);
    }
  }
  if (finishes && task.direct.streams) drain();
}

template <int kTile, typename Tile>
void sum_tile(const SumTile& task) {
  const auto add = [slab = task.slab, shifts = task.shifts](int64_t, const RowEntries& entries, Floats(&sum)[kTile]) {
    Floats running[kTile];
    for (int t = 0; t < kTile; ++t) running[t] = sum[t];
    for (int64_t e = 0; e < entries.count; ++e) {
      const Tile source(slab, shifts, entries.offset[e]);
      const Floats weight = broadcast(entries.value[e]);
      for (int t = 0; t < kTile; ++t) running[t] = fma(weight, source[t], running[t]);
    }
    for (int t = 0; t < kTile; ++t) sum[t] = running[t];
  };
  for_each_row<kTile>(task, add);
}

template <int kTile, typename Tile>
void sum_with_factors(const SumTile& task) {
  const bool fetches = task.factors.next != nullptr && task.block + 1 == task.blocks;
  const auto add = [slab = task.slab, shifts = task.shifts, factors = task.factors, fetches,
                    first_row = task.first_row](int64_t row, const RowEntries& entries, Floats(&sum)[kTile]) {
    const float* own = factors.data + (row - first_row) * factors.plane;
    if (fetches) prefetch_tile<kTile>(factors.next + (row - first_row) * factors.next_plane);
    Floats running[kTile], factor[kTile];
    for (int t = 0; t < kTile; ++t) {
      running[t] = sum[t];
      factor[t] = load(own + t * kLanes);
    }
    const auto product = [&](int64_t e) {
      const Tile tile(slab, shifts, entries.offset[e]);
      const Floats weight = broadcast(entries.value[e]);
      Floats products{};
      for (int t = 0; t < kTile; ++t) {
        const Floats source = in_register(tile[t]);
        running[t] = fma(weight, source, running[t]);
        products = t == 0 ? factor[0] * source : fma(factor[t], source, products);
      }
      return products;
    };
    float* gradients = factors.gradient + entries.first;
    int64_t e = 0;  // not a function that correlate_tile shares: what `product` adds to would be stored for every entry
    for (; e + 4 <= entries.count; e += 4) {
      const Floats a = product(e), b = product(e + 1), c = product(e + 2), d = product(e + 3);
      store_four(gradients + e, load_four(gradients + e) + sums_of_lanes(a, b, c, d));
    }
    for (; e < entries.count; ++e) {
      const Floats last = product(e);
      gradients[e] += sums_of_lanes(last, last, last, last)[0];
    }
    for (int t = 0; t < kTile; ++t) sum[t] = running[t];
  };
  for_each_row<kTile>(task, add);
}

template <int kTile, typename Tile>
void correlate_tile(const CorrelateTile& task) {
  const BlockEntries entries(task.entries, task.block);
  const Factors& factors = task.factors;
  const bool fetches = factors.next != nullptr && task.block + 1 == task.blocks;
  const auto product = [&](const Floats* factor, int32_t offset) {
    const Tile source(task.slab, task.shifts, offset);
    Floats sum = factor[0] * source[0];
    for (int t = 1; t < kTile; ++t) sum = fma(factor[t], source[t], sum);
    return sum;
  };
  Prefetch<kTile> next(task.next, task.last_row - task.first_row);
  for (int64_t row = task.first_row; row < task.last_row; ++row) {
    next.with_row();
    const int64_t count = entries.count(row);
    if (count == 0) continue;
    const int32_t* offset = entries.offset + entries.begin[row];
    float* gradients = factors.gradient + entries.first[row];
    const float* own = factors.data + (row - task.first_row) * factors.plane;
    if (fetches) prefetch_tile<kTile>(factors.next + (row - task.first_row) * factors.next_plane);
    Floats factor[kTile];
    for (int t = 0; t < kTile; ++t) factor[t] = load(own + t * kLanes);
    int64_t e = 0;
    for (; e + 4 <= count; e += 4) {
      const Floats a = product(factor, offset[e]), b = product(factor, offset[e + 1]),
                   c = product(factor, offset[e + 2]), d = product(factor, offset[e + 3]);
      store_four(gradients + e, load_four(gradients + e) + sums_of_lanes(a, b, c, d));
    }
    for (; e < count; ++e) {
      const Floats sum = product(factor, offset[e]);
      gradients[e] += sums_of_lanes(sum, sum, sum, sum)[0];
    }
  }
}

template <typename Tile>
constexpr TileKernels kTileKernels = {
    {nullptr, sum_tile<1, Tile>, sum_tile<2, Tile>, sum_tile<3, Tile>, sum_tile<4, Tile>, sum_tile<5, Tile>,
     sum_tile<6, Tile>, sum_tile<7, Tile>, sum_tile<8, Tile>},
    {nullptr, sum_with_factors<1, Tile>, sum_with_factors<2, Tile>, sum_with_factors<3, Tile>,
     sum_with_factors<4, Tile>, sum_with_factors<5, Tile>, sum_with_factors<6, Tile>, sum_with_factors<7, Tile>,
     sum_with_factors<8, Tile>},
    {nullptr, correlate_tile<1, Tile>, correlate_tile<2, Tile>, correlate_tile<3, Tile>, correlate_tile<4, Tile>,
     correlate_tile<5, Tile>, correlate_tile<6, Tile>, correlate_tile<7, Tile>, correlate_tile<8, Tile>}};

#if GRANET_AVX512
constexpr StencilKernels kStencilKernels = {kTileKernels<SlabTile>, kTileKernels<ShiftedTile>};
#else
constexpr StencilKernels kStencilKernels = {kTileKernels<SlabTile>, {}};
#endif

}  // namespace granet::cpu::GRANET_ISA
