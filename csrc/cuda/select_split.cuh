// A tile's elements beside a bracket.
#pragma once

#include "cuda/select_state.cuh"

namespace granet::cuda {

// Keys in a bracket, and above it.
template <typename Key>
struct Bracket {
  Key low;
  Key span;

  __device__ explicit Bracket(const State& state)
      : low(static_cast<Key>(state.low)), span(static_cast<Key>(state.span)) {}
};

// The lane's bits of a tile. At first a byte for each group that the lane takes, in the order of steps, and then, once
// the lanes have exchanged them, its word.
struct Split {
  uint32_t above = 0;
  uint32_t inside = 0;

  __device__ void add(bool is_above, bool is_inside, int place) {
    above |= static_cast<uint32_t>(is_above) << place;
    inside |= static_cast<uint32_t>(is_inside) << place;
  }
};

// The element of the lane's bit `place`, while there is a byte for each group.
__device__ __forceinline__ int element_of(int place) { return place_of<kGroup>(place / kGroup) + place % kGroup; }

// The lane's word, from all lanes' bytes.
__device__ __forceinline__ uint32_t word_of(uint32_t bytes) {
  static_assert(kSteps<kGroup> == 4);
  const int from = lane() % 8 * 4, shift = lane() / 8 * 8;  // whose bytes, and of which step
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) word |= (__shfl_sync(kWholeWarp, bytes, from + i) >> shift & 0xff) << (8 * i);
  return word;
}

// Bytes of those elements of a tile that have a bit in the lanes' words. Numbers of a group without one are not loaded.
// All lanes must come.
template <typename Format, Rank rank, typename Key>
__device__ __forceinline__ Split split(const typename Format::Bits* elements, const Tile& tile, uint32_t word,
                                       const Bracket<Key>& bracket, int unit) {
  using Bits = typename Format::Bits;
  constexpr int kMost = SelectTraits::kAtOnceBytes / static_cast<int>(sizeof(Group<Bits>));
  constexpr int kAtOnce = kMost < kSteps<kGroup> ? kMost : kSteps<kGroup>;
  Split result;
  const auto add = [&](Bits number, int place) {
    const Key key = key_of<Format, rank, Key>(number, unit);
    const bool is_inside = static_cast<Key>(key - bracket.low) <= bracket.span;
    result.add(key >= bracket.low && !is_inside, is_inside, place);
  };
  if (!is_aligned(elements) || !tile.is_whole()) {
#pragma unroll 1
    for (int step = 0; step < kSteps<kGroup>; ++step) {
      for (unsigned bits = bits_of<kGroup>(word, step); bits != 0; bits &= bits - 1) {
        const int place = step * kGroup + __ffs(static_cast<int>(bits)) - 1;
        add(elements[element_of(place)], place);
      }
    }
    return result;
  }
#pragma unroll
  for (int first = 0; first < kSteps<kGroup>; first += kAtOnce) {
    unsigned bits[kAtOnce];
    Group<Bits> groups[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      bits[i] = bits_of<kGroup>(word, first + i);
      if (bits[i] != 0) groups[i] = load_group(elements + place_of<kGroup>(first + i));
    }
    uint32_t asked = 0;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      asked |= bits[i] << (first + i) * kGroup;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) add(groups[i].bits[j], (first + i) * kGroup + j);
    }
    const uint32_t others = first == 0 ? 0 : (1U << first * kGroup) - 1;  // of earlier steps
    result.above &= asked | others;
    result.inside &= asked | others;
  }
  return result;
}

}  // namespace granet::cuda
