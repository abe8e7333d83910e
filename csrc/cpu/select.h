// Selection by rank over many tensors at once, exactly, on the CPU: over raw pointers and sizes.
//
// Elements are counted in storage order. Equal keys: the one of the lower (tensor, element) goes first. Results do not
// depend on the number of threads. A packed mask has packed_bytes(numel) bytes, all of which may be read; those that
// are written are written whole, padding included. Bits of a mask past the last element are ignored.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "common/radix.h"
#include "cpu/parallel.h"

namespace granet::cpu {

struct Numbers {
  const void* data;
  FloatType type;
  int64_t numel;
};

// A weight with its mask and, unless null, its momentum: as many elements, in the same order.
struct MaskedWeight {
  void* data;
  FloatType type;
  int64_t numel;
  uint8_t* mask;
  void* momentum;
  FloatType momentum_type;
};

// Keeps the k largest magnitudes among the active weights, NaN above infinity: of all tensors together if k has one
// element, of tensor i the k[i] largest if it has one for each. Fewer active ones all stay. Weights that become
// inactive, and their momenta, become +0.0; those that were so before are not touched.
void prune(std::span<const MaskedWeight> weights, std::span<const int64_t> k, const Parallel& parallel);

// pruned[i]: the mask that prune() would leave of weights[i] with masks[i], written whole.
void pruned_masks(std::span<const Numbers> weights, std::span<const uint8_t* const> masks, std::span<const int64_t> k,
                  std::span<uint8_t* const> pruned, const Parallel& parallel);

// masks[i]: the k largest of scores (k as above), signed, NaN below -infinity.
void topk_mask(std::span<const Numbers> scores, std::span<const int64_t> k, std::span<uint8_t* const> masks,
               const Parallel& parallel);

// In each tensor drops the ceil(fraction * active) smallest magnitudes and regrows as many by the largest |score| among
// the inactive, the just dropped included; a NaN score ranks last. The fraction counts as 0 if it is NaN or below 0,
// and as 1 above 1. Dropped and regrown: values stay. What becomes active or inactive becomes +0.0, in momenta too.
// scores[i] has as many elements as weights[i], in the same order.
void drop_regrow(std::span<const MaskedWeight> weights, std::span<const Numbers> scores, double fraction,
                 const Parallel& parallel);

// prune() to k and then drop_regrow(), with fewer passes over memory. pruned[i]: the mask in between, written whole.
void prune_drop_regrow(std::span<const MaskedWeight> weights, std::span<const Numbers> scores,
                       std::span<const int64_t> k, double fraction, std::span<uint8_t* const> pruned,
                       const Parallel& parallel);

}  // namespace granet::cpu
