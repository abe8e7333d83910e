// What the gradient of a stencil's weights is made of besides its source (conv.h), tile by tile.
#pragma once

#include <cstdint>
#include <optional>

#include "cpu/conv_units.h"
#include "cpu/scratch.h"
#include "cpu/slab.h"
#include "cpu/stencil.h"
#include "cpu/stencil_tables.h"

namespace granet::cpu {

// gradient[e], in the order of the values, += the sum over all positions of factor * source for each entry e. The
// factor is a tensor like the target. No gradient: none is wanted.
struct Correlated {
  ImageView factor;
  float* gradient;
};

// Its rows, where sources are read in place.
class FactorsInPlace {
 public:
  FactorsInPlace(const Correlated& with, const Plan& plan, Rows rows, const ScratchScope& scratch);

  // Those of a tile, and of the one after it to fetch.
  Factors of(const TileInPlace& tile, const std::optional<TileInPlace>& after) const;

 private:
  ImageView view_;
  float* gradient_;
  const Plan& plan_;
  Rows rows_;
  float* rest_ = nullptr;  // of a tile that is moved back
};

// Its rows as the sums of a target would lie, for all tiles of a unit.
Factors packed_factors(const Stencil& s, const Plan& plan, const Correlated& with, const Unit& unit, Rows rows,
                       const ScratchScope& scratch);

}  // namespace granet::cpu
