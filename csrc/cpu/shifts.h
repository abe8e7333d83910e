// How the elements of a filter look at the pixels of a tile, of a source that is read in place.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "cpu/stencil.h"
#include "cpu/stencil_tables.h"

namespace granet::cpu {

class Shifts {
 public:
  // Of a plan that is not `shifted` there are none.
  Shifts(const Stencil& stencil, const Plan& plan);

  // Finds those of the tile that begins at a pixel.
  void find(int64_t start);

  // Row by row of the filter; null where there are none.
  const Shift* data() const { return table_.empty() ? nullptr : table_.data(); }

 private:
  // A bit for each pixel of a tile.
  using Pixels = std::array<uint64_t, kMostVectors * kWidestVector / 64>;

  Pixels in_columns(int64_t start, int64_t away) const;
  Pixels in_rows(int64_t start, int64_t away) const;

  const Stencil& stencil_;
  int64_t width_;  // of a tile
  std::vector<Shift> table_;
};

}  // namespace granet::cpu
