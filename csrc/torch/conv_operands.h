// What the operators of sparse convolutions (conv.cpp, conv_backward.cpp) take: tensors as the stencils of cpu/ see
// them, indexes, and the values of active weights.
//
// The public operators (namespace granet) have checked every argument, and backends/cpp/conv.py has built the index for
// the shapes at hand. What is checked again here is what keeps a direct call from reading or writing out of bounds.
#pragma once

#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "cpu/slab.h"
#include "cpu/stencil_tables.h"
#include "torch/checks.h"
#include "torch/conv_work.h"

namespace granet {

// Nanoseconds that one thread takes, about: the rates of backends/cpp/cost.py.
double time_of(const ConvShape& shape, int64_t entries);

int64_t entries_in(const std::vector<Tensor>& index);

// Whether pixels lie evenly spaced in memory, as the kernels want those of a pointwise convolution.
bool is_evenly_spaced(const Tensor& tensor);

// (batch, channels, h, w), or (pixels, channels) for a linear layer.
ImageView view_of(const Tensor& tensor, const char* name, bool pointwise);

// Whether the planes of a tensor can be read in place. Where there is but one, its stride means nothing.
bool has_planes(const Tensor& tensor, const ImageView& view, const ConvShape& shape);

// As the kernels want it, which may be in place.
ImageView view_for(const Tensor& tensor, const char* name, const ConvShape& shape, bool in_place);

void check_size(const Tensor& tensor, const char* name, int64_t batch, int64_t channels, Pair size);

const int32_t* ranks_of(const std::vector<Tensor>& index);

// The entries of an index, with their values where those are needed.
cpu::StencilEntries entries_of(const std::vector<Tensor>& index, const Work& work, const float* values);

// The active weights of a layer, as backends/cpp/index.py keeps them: the bits of the mask, and where they are set.
struct Known {
  Tensor bits;
  Tensor positions;
};

Known known_of(const std::vector<Tensor>& known, int64_t weights);

// Whether a mask still has the bits that an index was built from; whoever wrote to it, by whatever way.
bool are_those_of(const Tensor& bits, const Tensor& mask);

// The values of the active weights in storage order, in float32: what takes time is the cache lines of the weight.
Tensor fetched(const Tensor& weight, const Known& known, bool to_bfloat16);

// The same as an index wants them (cpu/stencil_tables.h).
Tensor ordered(const Tensor& stored, const Known& known, const std::vector<Tensor>& index);

// Computed in the input's dtype, whatever the weight's.
bool rounds_to_bfloat16(const Tensor& input);

void check_weight(const Tensor& weight, const ConvShape& shape, const char* name);

}  // namespace granet
