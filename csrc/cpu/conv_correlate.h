// One unit of the gradient of a stencil's weights (conv.h).
#pragma once

#include <cstdint>

#include "cpu/conv_factors.h"
#include "cpu/conv_units.h"
#include "cpu/slab.h"
#include "cpu/stencil.h"
#include "cpu/stencil_tables.h"

namespace granet::cpu {

// For the entries of the rows, over the unit's positions.
void correlate_unit(const Stencil& stencil, const Plan& plan, const StencilEntries& entries, const ImageView& source,
                    const Correlated& with, int64_t unit, Rows rows);

}  // namespace granet::cpu
