// How the work of a stencil (conv.h) is cut into units, rows and tiles.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/slab.h"
#include "cpu/stencil.h"
#include "cpu/stencil_tables.h"

namespace granet::cpu {

// Of this machine.
const TileKernels& tile_kernels(const Plan& plan);

inline float* take_floats(const ScratchScope& scratch, int64_t count) {
  return (*scratch).take<float>(static_cast<size_t>(count));
}

struct Unit {  // of work: a band of a group of images
  int64_t first_image;
  int64_t first_row;
  int64_t rows;
  int64_t positions;
};

Unit unit_of(const Stencil& s, const Plan& plan, int64_t index);

void pack_source(const Stencil& s, const Plan& plan, const Unit& unit, const ImageView& view, float* slab);

// Of a phase of the target; `floats` are those of a plane.
Runs target_runs(const Stencil& s, const Plan& plan, const Unit& unit, Pair phase, int64_t floats,
                 const ImageView& view);

struct Rows {
  int64_t first;  // target planes
  int64_t count;
};

// Rows are split over tasks only where there are too few other tasks for the threads: each part packs the slab again.
int64_t row_parts(int64_t tasks, const Stencil& s, const Parallel& parallel);
Rows rows_of_part(const Stencil& s, int64_t parts, int64_t part);

// Vectors in the tile at `position`.
int64_t vectors_left(const Plan& plan, const Unit& unit, int64_t position);

// A tensor from a channel on.
ImageView from_channel(ImageView view, int64_t channel);

// A tile's sums, which for each row are those of all phases, into the target.
void unpack_phases(const Stencil& s, const std::vector<Runs>& phases, const ImageView& target, const Finish& finish,
                   float* sums, int64_t position, int64_t count, Rows rows);

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

TileInPlace tile_in_place(const Plan& plan, const Unit& unit, int64_t position);

// The tile after that at `position` of a unit; as a rule the thread's own next one.
std::optional<TileInPlace> tile_after(const Stencil& s, const Plan& plan, int64_t unit, int64_t position);

// What to fetch of it.
Next planes_of(const std::optional<TileInPlace>& tile, const Stencil& s, const Plan& plan, const ImageView& source);

// The share of its planes that is fetched with a block.
Next share_of(const Next& next, const Plan& plan, int64_t block);

}  // namespace granet::cpu
