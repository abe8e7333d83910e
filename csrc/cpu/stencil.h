// A sparse convolution as a stencil: every target value is a sum of a few source values at fixed shifts.
//
// The source is packed into a *slab*, one plane of 32-bit floats a channel, in which a shift of the filter is one
// offset that is the same for all output pixels:
//
//     target[row][p] = sum over the row's entries e of value[e] * slab[offset[e] + p]
//
// for positions p of a grid. So one kernel, which streams contiguous positions, serves every stride, padding, dilation,
// group and layout; those live in how a slab is packed and how a target is unpacked. Forward and input gradient are
// both such stencils, and the weight gradient is the sum over p of target[row][p] * slab[offset[e] + p].
//
//   forward          source: input, split into stride x stride phases; target: output; a row is an output channel
//   input gradient   source: gradient of the output; target: gradient of the input, spread over stride x stride phases;
//                    a row is an input channel and a phase
#pragma once

#include <cstdint>

namespace granet::cpu {

struct Pair {  // of something in the vertical and the horizontal direction
  int64_t h;
  int64_t w;
};

// A two-dimensional convolution, as torch.nn.functional.conv2d names its parts.
struct ConvShape {
  int64_t batch;
  int64_t channels;      // of the input
  int64_t out_channels;  // of the output
  Pair input;
  Pair kernel;
  Pair stride;
  Pair padding;
  Pair dilation;
  int64_t groups;

  int64_t group_channels() const { return channels / groups; }
  int64_t filter_size() const { return group_channels() * kernel.h * kernel.w; }
  int64_t weights() const { return out_channels * filter_size(); }
  Pair output() const {
    return {(input.h + 2 * padding.h - dilation.h * (kernel.h - 1) - 1) / stride.h + 1,
            (input.w + 2 * padding.w - dilation.w * (kernel.w - 1) - 1) / stride.w + 1};
  }
};

struct Stencil {
  int64_t batch;
  int64_t channels;  // source planes
  Pair source;       // their height and width
  Pair split;        // source pixel (y, x) is in phase ((y + before.h) % split.h, (x + before.w) % split.w)
  Pair before;       // zeros above and to the left of a source plane
  Pair grid;         // positions: target rows and columns of a phase
  Pair reach;        // the farthest shift, in grid steps
  int64_t targets;   // target planes
  Pair target;       // their height and width
  Pair spread;       // grid position (q, r) of phase (a, b) is target pixel (q * spread.h + a, r * spread.w + b)
  Pair filter;       // its height and width
  Pair first;        // without strides, element (i, j) of a filter looks (first.h + i * step.h, first.w + j * step.w)
  Pair step;         // away from the target pixel
  int64_t products;  // that a vector of the source takes part in for an entry: with its weight and, backward, a factor

  int64_t phases() const { return split.h * split.w; }
  int64_t rows() const { return targets * spread.h * spread.w; }
};

// Whether a stencil can read its source where it is, not packed, if its planes and the target's are contiguous: output
// and input have the same pixels, enough for the largest tile or such that fill a smaller one. One that looks at
// several pixels can where loads have masks, by which what lies beyond the sides of the image is zero.
bool can_read_in_place(const ConvShape& shape);

// Whether that is faster than packing, with so many active weights and planes that they read.
bool is_faster_in_place(const ConvShape& shape, int64_t planes, int64_t entries);

Stencil forward_stencil(const ConvShape& shape);
Stencil input_gradient_stencil(const ConvShape& shape);

// How a stencil is cut up: for the caches, for vectors, for threads. It depends on the shapes, on the width of a vector
// and on the number of entries, never on the number of threads.
struct Plan {
  bool in_place;         // the source is read where it is, not packed: positions are pixels
  bool shifted;          // in place, and looking at more than one pixel
  int64_t lanes;         // images that are interleaved: position = (q * row + r) * lanes + image
  int64_t image_groups;  // of `lanes` images
  int64_t row;           // grid columns from one row to the next, padding included
  int64_t band;          // grid rows that are packed at once
  int64_t bands;         // to cover the grid
  int64_t plane;         // floats from one slab plane to the next
  int64_t tile;          // vectors that are accumulated in registers
  int64_t block;         // channels whose part of a tile stays in the first-level cache
  int64_t blocks;        // to cover the channels
  int64_t vector;        // floats
  int64_t positions() const { return band * row * lanes; }
  int64_t tiles(int64_t count) const { return (count + tile * vector - 1) / (tile * vector); }
  int64_t units() const { return image_groups * bands; }
};

// `entries` active weights.
Plan plan_for(const Stencil& stencil, int64_t entries, bool in_place);

}  // namespace granet::cpu
