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

// Both gradients in one pass over an input gradient's entries: grad_input = stencil(grad_output), and gradient[rank[e]]
// = sum over all positions of input * grad_output for each of them. What is loaded then takes part in two products: a
// backward pass takes 0.65 to 0.8 of the time of one pass for each with AVX-512 (3x3 and 1x1 layers of a ResNet-50,
// linear layers of 256 rows, 90 to 98 % sparse), 0.75 to 1.05 with AVX2, whose registers do not hold the factors as
// well. `partial` as above.
void differentiate_stencil(const Stencil& stencil, const Plan& plan, const StencilEntries& entries, const int32_t* rank,
                           int64_t count, const ImageView& grad_output, const ImageView& input,
                           const ImageView& grad_input, float* partial, float* gradient, const Parallel& parallel);

}  // namespace granet::cpu
