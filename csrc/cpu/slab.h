// Packing the source of a stencil into a slab, and unpacking tiles of sums into its target.
//
// Where the elements of a plane lie is worked out once, as runs: the positions of a slab that hold an element, and
// where that element is in the tensor. The same runs then serve every channel.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/slab_tables.h"
#include "cpu/stencil.h"

namespace granet::cpu {

enum class Element { kFloat32, kBFloat16 };  // what a tensor holds; sums are float32

// A four-dimensional tensor (image, channel, y, x) with any strides, in elements.
struct ImageView {
  void* data;
  Element element;
  int64_t image_stride;
  int64_t channel_stride;
  int64_t y_stride;
  int64_t x_stride;
  // Not 0: y counts the pixels of all images, `pixels` to an image, one y_stride apart; there is one column.
  int64_t pixels;
};

struct Runs {
  std::vector<Run> runs;
  std::vector<Gap> gaps;  // positions in no run, in their order: zero once packed
  int64_t lanes;
  int64_t step;      // elements
  int64_t floats;    // of a plane
  bool interleaved;  // each `lanes` successive runs are those of images next to one another
};

// Grid rows [first_row, first_row + rows) of the images of one group, where grid position (q, r) is pixel
// (q * scale.h + phase.h - before.h, r * scale.w + phase.w - before.w) of planes of `size`.
struct RunsOf {
  Pair size;
  Pair scale;
  Pair phase;
  Pair before;
  int64_t first_row;
  int64_t rows;
  int64_t columns;  // grid columns that may hold an element
  int64_t row;      // from one grid row to the next
  int64_t lanes;
  int64_t first_image;
  int64_t images;
  int64_t floats;  // of a plane: those behind the last row are a gap
};
Runs make_runs(const RunsOf& what, const ImageView& view);

// The runs of a phase, which lies `offset` floats behind a channel's first plane.
struct Phase {
  Runs runs;
  int64_t offset;
};

// slab[c * plane + phase.offset + position] for `channels` channels.
void pack(const std::vector<Phase>& phases, const ImageView& view, int64_t channels, int64_t plane, float* slab);

// What becomes of a sum on its way into the target.
struct Finish {
  const void* residual;  // added; as the target in type and strides but not the target, or null
  bool relu;
};

// Sums of positions [position, position + count) of `channels` rows, `width` floats apart, into the target's planes
// from `first` on. The sums are not needed afterwards, and may be changed.
void unpack(const Runs& runs, const ImageView& view, const Finish& finish, float* sums, int64_t width, int64_t position,
            int64_t count, int64_t first, int64_t channels);

// The phases of the even and of the odd columns of the same target, whose sums are `apart` floats apart.
void unpack_columns(const Runs& even, const Runs& odd, const ImageView& view, const Finish& finish, float* sums,
                    int64_t apart, int64_t width, int64_t position, int64_t count, int64_t first, int64_t channels);

}  // namespace granet::cpu
