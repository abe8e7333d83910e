// Sparse convolution: forward, input gradient and the gradient of the active weights (see stencil.h).
#pragma once

#include <cstdint>

#include "cpu/parallel.h"
#include "cpu/slab.h"
#include "cpu/stencil.h"
#include "cpu/stencil_tables.h"

namespace granet::cpu {

// target = stencil(source) [+ bias] [+ residual] [max 0]. `entries` were built for `plan`; the target's images and
// planes must be those of the stencil. A row's sums are added up in the order of its entries, whatever the threads.
void run_stencil(const Stencil& stencil, const Plan& plan, const StencilEntries& entries, const ImageView& source,
                 const float* bias, const Finish& finish, const ImageView& target, const Parallel& parallel);

// gradient[rank[e]], or where entries are in runs (rank is null) the element of e's value = sum over all positions of
// target * source, for every one of the `count` entries e of a forward stencil. `partial` is scratch:
// gradient_parts(plan) * count floats.
void correlate_stencil(const Stencil& stencil, const Plan& plan, const StencilEntries& entries, const int32_t* rank,
                       int64_t count, const ImageView& source, const ImageView& target, float* partial, float* gradient,
                       const Parallel& parallel);
int64_t gradient_parts(const Plan& plan);

}  // namespace granet::cpu
