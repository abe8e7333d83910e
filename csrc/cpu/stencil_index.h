// The active weights of a masked convolution, in the order in which a stencil's kernels use them.
#pragma once

#include <cstdint>

#include "cpu/stencil.h"

namespace granet::cpu {

enum class Direction { kForward, kInputGradient };

// How the elements of a weight (out_channels, group_channels, kernel.h, kernel.w) lie in storage.
enum class WeightOrder { kContiguous, kChannelsLast };

// Entries are ordered by (block of source channels, row, source channel): those of block b and row r are
// [begin[b * rows + r], begin[b * rows + r + 1]).
struct StencilIndex {
  int64_t* begin;   // blocks * rows + 1
  int32_t* offset;  // where its slab plane and shift lie; in a plan that is `shifted`, plane << kShiftBits | shift
  int32_t* rank;    // which of the active weights it is, in storage order; null where entries are in runs
  int64_t* first;   // blocks * rows: the rank of the first one, where entries are in runs; else null
};

// Whether the entries of a block and row are next to one another in storage order too, and worth reading there.
// `groups` is blocks * rows.
bool entries_in_runs(WeightOrder order, Direction direction, const Plan& plan, int64_t groups, int64_t entries);

// Fills begin; returns the number of entries, which is that of the active weights.
int64_t count_entries(const uint8_t* mask, const ConvShape& shape, WeightOrder order, Direction direction,
                      const Plan& plan, int64_t* begin);

// Fills offset, and rank or first, after count_entries. An entry's place depends on the mask alone.
void fill_entries(const uint8_t* mask, const ConvShape& shape, WeightOrder order, Direction direction, const Plan& plan,
                  const StencilIndex& index);

// Whether 32-bit offsets reach every float of a slab.
bool offsets_fit(const Stencil& stencil, const Plan& plan);

}  // namespace granet::cpu
