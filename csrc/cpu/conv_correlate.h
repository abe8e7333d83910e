// One unit of the gradient of a stencil's weights (conv.h).
#pragma once

#include <cstdint>

#include "cpu/conv_units.h"
#include "cpu/slab.h"
#include "cpu/stencil.h"
#include "cpu/stencil_tables.h"

namespace granet::cpu {

// sums[e], in the order of the values, += the sum over the unit's positions of target * source for each entry e of the
// rows.
void correlate_unit(const Stencil& stencil, const Plan& plan, const StencilEntries& entries, const ImageView& source,
                    const ImageView& target, int64_t unit, Rows rows, float* sums);

}  // namespace granet::cpu
