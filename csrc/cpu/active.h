// The active weights of a mask as a list in storage order, a weight read through it, and a gradient written by the
// mask.
//
// Both are dense tensors of which few elements are wanted: what takes time is the cache lines that those lie in, so
// they are visited in the order of memory, and put into the order of a stencil's entries in a list of the active ones.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "common/bits.h"
#include "cpu/parallel.h"
#include "cpu/slab.h"

namespace granet::cpu {

// visit(weight) for every active one of `weights`, in storage order. Bits behind the last weight do not count.
template <typename Visit>
void for_each_active(const uint8_t* mask, int64_t weights, const Visit& visit) {
  const int64_t bytes = mask_bytes(weights);
  for (int64_t byte = 0; byte < bytes; byte += 8) {
    uint64_t bits = 0;
    std::memcpy(&bits, mask + byte, static_cast<size_t>(std::min<int64_t>(8, bytes - byte)));
    const int64_t rest = weights - byte * kWeightsPerByte;
    if (rest < 64) bits &= (uint64_t{1} << rest) - 1;
    for (; bits != 0; bits &= bits - 1) visit(byte * kWeightsPerByte + std::countr_zero(bits));
  }
}

// The number of active weights, and where they are: `positions` takes as many.
int64_t count_weights(const uint8_t* mask, int64_t weights);
void list_active(const uint8_t* mask, int64_t weights, int32_t* positions);

struct Positions {
  const int32_t* data;
  int64_t count;
  bool rising;  // in a source that is in no cache, so what they name is fetched ahead
};

// Nanoseconds that a value takes where those before it are in other cache lines and none is in a cache, about.
constexpr double kFetchNanoseconds = 5;

// values[i] = source[at.data[i]] in float32, rounded to bfloat16 if asked, for i < at.count.
void gather(const void* source, Element element, const Positions& at, bool to_bfloat16, float* values,
            const Parallel& parallel);

// The active ones of as many weights as a mask has bits, and their positions, which rise.
struct Active {
  const uint8_t* mask;
  int64_t weights;
  const int32_t* positions;
  int64_t count;
};

// gradient (as many elements as there are weights) = the next value for each active one in turn, and 0 elsewhere.
void spread(const float* values, const Active& active, void* gradient, Element element, const Parallel& parallel);

}  // namespace granet::cpu
