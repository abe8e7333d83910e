// What packing and unpacking (slab_pack.cpp, slab_unpack.cpp) and their kernels (slab_kernel.h) say to each other.
#pragma once

#include <cstdint>

#include "cpu/stencil_tables.h"

namespace granet::cpu {

// Positions position, position + lanes, … (length of them) hold the elements origin, origin + step, …
struct Run {
  int64_t position;
  int64_t length;
  int64_t origin;  // in elements, for channel 0
};

struct Gap {
  int64_t position;
  int64_t length;
};

// A vector of a packed plane of one image, or a part of one: the rest is zero, or the next part's.
struct PackedVector {
  int64_t origin;  // of the first element
  uint16_t lanes;  // a bit for each lane that holds one, in their order
  bool is_whole;   // a vector of elements may be read there, wanted or not
  bool is_last;    // part of the vector
};

// A plane, vector by vector, from elements that are `step` (1 or 2) apart.
struct PackRows {
  const PackedVector* parts;
  int64_t part_count;
  int64_t step;
  const void* source;
  int64_t ahead;  // elements from this plane to the one that is packed next, which is fetched; 0 where there is none
  float* plane;
};

// A plane of as many images as a vector has lanes: its gaps become zero, and the runs, one for each image and then the
// next row's, are copied.
struct PackImages {
  const Run* runs;
  int64_t run_count;
  const Gap* gaps;
  int64_t gap_count;
  int64_t step;
  const void* source;
  int64_t ahead;
  float* plane;
};

constexpr int64_t kMostPixels = 8;  // of a piece

// Pixels of as many images as a vector has lanes, next to one another in each image, from sums in which the images are
// interleaved.
struct Piece {
  const Run* images;  // one run for each
  int64_t first;      // floats behind where each of them begins
  int64_t count;
  int64_t positions[kMostPixels];  // of the first image's, in the sums
};

// Into the planes of `channels` channels, whose sums are `width` apart.
struct UnpackImages {
  const Piece* pieces;
  int64_t piece_count;
  const float* sums;
  int64_t width;
  int64_t channels;
  float* target;
  int64_t channel_stride;
};

// The pixels of a vector of positions: for each lane where its first channel is, or -1 where there is no pixel.
struct PixelVector {
  int64_t origin[kWidestVector];
};

// Planes from pixels whose channels are next to one another, vector by vector; zeros where there is no pixel.
struct PackPixels {
  const PixelVector* vectors;
  int64_t vector_count;
  int64_t channels;
  const void* source;
  float* slab;
  int64_t plane;  // floats from one channel's to the next
};

// And back, from sums that are `width` apart.
struct UnpackPixels {
  const PixelVector* vectors;
  int64_t vector_count;
  int64_t channels;
  const float* sums;
  int64_t width;
  float* target;
};

// A row, or a part of one, of which even and odd columns have been summed one by one.
struct ColumnPair {
  int64_t position;  // in the sums, of both
  int64_t origin;    // of the first even one in the target
  int64_t evens;
  int64_t odds;  // as many, or one less
};

// Into planes of pixels next to one another; the odd columns' sums lie `apart` floats behind those of the even ones.
struct UnpackColumns {
  const ColumnPair* pairs;
  int64_t pair_count;
  int64_t channels;
  const float* sums;
  int64_t apart;
  int64_t width;
  float* target;
  int64_t channel_stride;
};

struct PackKernels {
  void (*rows)(const PackRows&);
  void (*images)(const PackImages&);
  void (*pixels)(const PackPixels&);
};

struct SlabKernels {
  PackKernels pack_float;     // sources of float32
  PackKernels pack_bfloat16;  // and of bfloat16
  void (*unpack_images)(const UnpackImages&);
  void (*unpack_pixels)(const UnpackPixels&);
  void (*unpack_columns)(const UnpackColumns&);
  int64_t lanes;  // of a vector
};
extern const SlabKernels slab_kernels_portable;
extern const SlabKernels slab_kernels_avx2;
extern const SlabKernels slab_kernels_avx512;

}  // namespace granet::cpu
