// The end of a selection: ties are cut by position, bits written, and zeros where weights and momenta go.
#pragma once

#include "cuda/select_state.cuh"

namespace granet::cuda {

struct ApplyMemory {
  int64_t room[SelectTraits::kThreads / kWarpSize];
  bool flag;
};

// Whether only some of those inside the final bracket, which are equal then, are chosen.
__device__ __forceinline__ bool cuts_ties(const State& state) {
  return state.verdict == Verdict::kCut && state.wanted < state.inside;
}

struct Resolved {
  unsigned above;
  unsigned tied;
};

// Of a group's undecided elements those above the final bracket, and those inside.
template <typename Key, Rank rank>
__device__ __forceinline__ Resolved resolve(const Selection& selection, const Walk& walk, const State& state,
                                            int group) {
  const unsigned undecided = selection.undecided[walk.chunk() * kChunkGroups + group];
  Resolved result = {0, 0};
  if (undecided == 0) return result;
  with_format<Key>(ranked_type(selection, walk.row()), [&](auto format) {
    using Format = decltype(format);
    using Bits = typename Format::Bits;
    const auto* numbers = static_cast<const Bits*>(ranked(selection, walk.row())) + walk.first_element();
    const auto values = load_group(numbers + group * kGroup, walk.elements() - group * kGroup, is_aligned(numbers));
    const Key low = static_cast<Key>(state.low), span = static_cast<Key>(state.span);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const Key key = key_of<Format, rank, Key>(values.bits[i], selection.unit);
      const unsigned bit = undecided & 1U << i;
      if (key >= low) (static_cast<Key>(key - low) > span ? result.above : result.tied) |= bit;
    }
  });
  return result;
}

// tied[chunk] = how many elements in front of the chunk, in its segment, are at the threshold; where ties are cut.
template <typename Key, Rank rank>
__global__ void __launch_bounds__(SelectTraits::kThreads) tie_kernel(Selection selection) {
  ApplyMemory& shared = shared_memory<ApplyMemory>();
  Walk walk(selection.table, selection.each);
  while (walk.any()) {
    const int64_t index = walk.segment();
    Segment& segment = selection.segments[index];
    const State state = segment.state;
    const bool works = cuts_ties(state);
    int64_t chunks = 0;
    for (; walk.any() && walk.segment() == index; walk.next(), ++chunks) {
      if (!works) continue;
      const int elements = walk.elements();
      int64_t count = 0, total = 0;
      for (int group = threadIdx.x; group * kGroup < elements; group += SelectTraits::kThreads) {
        count += __popc(resolve<Key, rank>(selection, walk, state, group).tied);
      }
      sum_before(count, shared.room, total);
      if (threadIdx.x == 0) selection.tied[walk.chunk()] = total;
    }
    if (!works || !arrives_last(segment, chunks, state.chunks, &shared.flag)) continue;
    if (threadIdx.x == 0) clear_arrivals(segment);
    int64_t before = 0;
    for (int64_t first = 0; first < state.chunks; first += SelectTraits::kThreads) {
      const int64_t i = first + threadIdx.x;
      int64_t* tied = selection.tied + state.first_chunk + i;
      int64_t total = 0;
      const int64_t sum = sum_before(i < state.chunks ? __ldcg(tied) : 0, shared.room, total);
      if (i < state.chunks) *tied = before + sum;
      before += total;
    }
  }
}

// What becomes of the bits that are chosen.
enum class Effect : int32_t {
  kKeep,     // written beside the masks, which still tell what was active
  kMask,     // written to masks that hold nothing
  kWeights,  // written to the masks, with those that are kept anyway; +0.0 in weights and momenta that go
};

// +0.0 where a bit is set; `numbers` begin with the group.
template <typename Bits>
__device__ __forceinline__ void zero_where(Bits* numbers, unsigned where) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if ((where >> i & 1) != 0) numbers[i] = 0;
  }
}

// A group of weights of which those that are not active have been zeroed by the first pass; of momenta nothing is
// known.
__device__ __forceinline__ void drop(const Walk& walk, int group, unsigned was, unsigned now, int left) {
  const SelectRow& row = walk.row();
  const int64_t first = walk.first_element() + group * kGroup;
  if (const unsigned lost = was & ~now; lost != 0) {
    with_bits(row.types,
              [&](auto bits) { zero_where(in_global(static_cast<decltype(bits)*>(row.numbers)) + first, lost); });
  }
  const unsigned goes = bits_inside(left) & ~(was & now);
  if (row.momentum == nullptr || goes == 0) return;
  with_bits(row.types >> 8, [&](auto bits) {
    using Bits = decltype(bits);
    Bits* momentum = in_global(static_cast<Bits*>(row.momentum)) + first;
    const Group<Bits> old = load_group(static_cast<const Bits*>(momentum), left, is_aligned(momentum));
    unsigned nonzero = 0;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) nonzero |= old.bits[i] != 0 ? 1U << i : 0U;
    zero_where(momentum, goes & nonzero);
  });
}

template <typename Key, Rank rank>
__global__ void __launch_bounds__(SelectTraits::kThreads) apply_kernel(Selection selection, Effect effect) {
  ApplyMemory& shared = shared_memory<ApplyMemory>();
  for (Walk walk(selection.table, selection.each); walk.any(); walk.next()) {
    const State& state = selection.segments[walk.segment()].state;
    const Verdict verdict = state.verdict;
    const bool cuts = cuts_ties(state);
    int64_t quota = cuts ? state.wanted - selection.tied[walk.chunk()] : 0;  // of tied elements, from here on
    const int elements = walk.elements();
    const auto bytes = static_cast<int>(packed_bytes(elements));  // of the mask; padding only at the end of the tensor
    const int64_t place = walk.chunk() * kChunkGroups;
    for (int turn = 0; turn < bytes; turn += SelectTraits::kThreads) {
      const int group = turn + static_cast<int>(threadIdx.x);
      const int left = elements - group * kGroup;
      unsigned chosen = 0;
      unsigned tied = 0;
      if (left > 0 && verdict == Verdict::kEverything) chosen = participants(selection, walk)(group, left);
      if (left > 0 && verdict == Verdict::kCut) {
        const Resolved resolved = resolve<Key, rank>(selection, walk, state, group);
        chosen = selection.chosen[place + group] | resolved.above;
        tied = resolved.tied;
      }
      if (cuts) {
        int64_t total = 0;
        int64_t keeps = quota - sum_before(int64_t{__popc(tied)}, shared.room, total);
        quota -= total;
        unsigned stay = 0;
        for (; tied != 0 && keeps > 0; --keeps, tied &= tied - 1) stay |= tied & -tied;
        tied = stay;
      }
      chosen |= tied;
      if (group >= bytes) continue;
      if (effect == Effect::kKeep) {
        selection.kept[place + group] = static_cast<uint8_t>(chosen);
        continue;
      }
      if (selection.among == Among::kInactive && left > 0) chosen |= selection.kept[place + group];
      uint8_t* mask = in_global(walk.row().mask) + walk.first_element() / kGroup + group;
      if (effect == Effect::kWeights && left > 0) drop(walk, group, *mask, chosen, left);
      *mask = static_cast<uint8_t>(chosen);
    }
  }
}

}  // namespace granet::cuda
