// What the driver of a stencil (conv.cpp) and its kernels (stencil_kernel.h) say to each other.
#pragma once

#include <cstdint>

namespace granet::cpu {

constexpr int64_t kLine = 16;  // floats in a cache line
constexpr int64_t kWidestVector = 16;
constexpr int64_t kMostVectors = 8;  // of a tile: with the weight and an address, what AVX2's 16 registers hold

constexpr int64_t kShiftBits = 6;  // of an entry of a plan that is `shifted`: which element of the filter it is
constexpr int64_t kMostShifts = int64_t{1} << kShiftBits;

// How an element of a filter looks at the pixels of a tile, where sources are read in place.
struct Shift {
  int32_t offset;                 // floats from a pixel to the one that it looks at
  uint16_t inside[kMostVectors];  // of each vector, the lanes for which that one lies in the image
};

// As StencilIndex, with the values of the weights: entry by entry, or in storage order where entries are in runs.
struct StencilEntries {
  int64_t rows;
  const int64_t* begin;
  const int32_t* offset;
  const int64_t* first;  // where the values of a block's row begin: in storage order, or `begin` itself
  const float* value;
};

// A piece of a tile that lies in one piece in the target.
struct Segment {
  int64_t position;  // in the tile
  int64_t length;
  int64_t target;  // floats from the row's plane
};

// Where finished sums go directly, if `target` is not null: + residual (or null), max 0 where relu.
struct DirectTarget {
  float* target;  // plane of row 0
  const float* residual;
  int64_t plane;  // floats from one row to the next
  const Segment* segments;
  int64_t count;
  bool relu;
  bool streams;  // past the caches
  // Whether the segments adjoin in the target too; then the positions that they hold, a bit for each of every sixteen.
  bool is_one_piece;
  uint16_t held[kMostVectors];
};

// The source of the tile after this one: a tile's worth of each of `planes` planes, fetched while this one is computed,
// a few planes with each row. No planes: nothing is fetched.
//
// Rows read half a kilobyte here and there of some hundred planes, in which the processor sees no streams. Fetching the
// planes in their order takes 0.75 of the time without for 1024 -> 256 channels at 14 x 14, batch 32, 98 % sparse, and
// 0.88 to 0.92 of the time of fetching with each entry what lies a tile ahead of it, the same lines many times over.
struct Next {
  const float* source;
  int64_t plane;  // floats from one to the next
  int64_t planes;
};

// A tile's worth of each row of a tensor like the target, by which the slab is multiplied as well: gradient[e], in the
// order of the values, += the sum over the tile of data[(row - first_row) * plane + …] * slab[offset[e] + …].
struct Factors {
  const float* data;  // at the tile's first position; null: there are none
  int64_t plane;      // floats from one row to the next
  float* gradient;
  const float* next;   // those of the tile that SumTile::next is of, or null
  int64_t next_plane;  // floats from one row of these to the next

  Factors from(int64_t position) const {
    return {data == nullptr ? nullptr : data + position, plane, gradient, next, next_plane};
  }
};

// sums[row - first_row] (tile vectors) += the entries of one block of channels times the slab, for rows
// [first_row, last_row). The first block starts from bias[row / rows_per_bias], or 0 where bias is null; the last one
// goes on to the direct target, if there is one.
struct SumTile {
  StencilEntries entries;
  const float* slab;              // at the tile's first position
  const Shift* shifts = nullptr;  // of the tile, one for each element of the filter, where the plan is `shifted`
  Next next = {};
  Factors factors;
  int64_t block = 0;
  int64_t blocks = 0;
  int64_t first_row;
  int64_t last_row;
  const float* bias;
  int64_t rows_per_bias;
  float* sums;
  DirectTarget direct;
};

// Only what the factors add to, for rows [first_row, last_row).
struct CorrelateTile {
  StencilEntries entries;
  const float* slab;              // at the tile's first position
  const Shift* shifts = nullptr;  // as above
  Next next = {};
  Factors factors;
  int64_t block = 0;
  int64_t blocks = 0;
  int64_t first_row;
  int64_t last_row;
};

// Indexed by the number of vectors in a tile.
struct TileKernels {
  void (*sum_tile[kMostVectors + 1])(const SumTile&);
  void (*sum_with_factors[kMostVectors + 1])(const SumTile&);
  void (*correlate_tile[kMostVectors + 1])(const CorrelateTile&);
};

struct StencilKernels {
  TileKernels slab;
  TileKernels shifted;  // for plans that are; null where loads have no masks
};
extern const StencilKernels stencil_kernels_portable;
extern const StencilKernels stencil_kernels_avx2;
extern const StencilKernels stencil_kernels_avx512;

}  // namespace granet::cpu
