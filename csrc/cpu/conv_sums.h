// One unit of a stencil's sums (conv.h), alone or with the gradient of its weights.
#pragma once

#include <cstdint>

#include "cpu/conv_factors.h"
#include "cpu/conv_units.h"
#include "cpu/slab.h"
#include "cpu/stencil.h"
#include "cpu/stencil_tables.h"

namespace granet::cpu {

// What a sum is made of, and becomes.
struct Sums {
  const Stencil& stencil;
  const Plan& plan;
  const StencilEntries& entries;
  ImageView source;
  const float* bias;  // or null
  Finish finish;
  ImageView target;
};

void sum_unit(const Sums& what, const Correlated& with, int64_t unit, Rows rows);

}  // namespace granet::cpu
