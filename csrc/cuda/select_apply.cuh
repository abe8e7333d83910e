// The end of a selection: ties are cut by position, bits written, and zeros where a bit changes.
#pragma once

#include "cuda/select_split.cuh"

namespace granet::cuda {

struct ApplyMemory {
  int64_t room[kWarps];
  bool flag;
};

// Whether only some of those inside the final bracket, which are equal then, are chosen.
__device__ __forceinline__ bool cuts_ties(const State& state) {
  return state.verdict == Verdict::kCut && state.wanted < state.inside;
}

// The lane's words of the undecided elements of a tile: those above the final bracket, and those inside, which are
// tied.
template <typename Key, Rank rank>
__device__ __forceinline__ Split resolve(const Selection& selection, const Chunk& chunk, const State& state, int i,
                                         const Tile& tile) {
  const uint32_t undecided = chunk.word(selection.undecided, i);
  Split found;
  if (!__any_sync(kWholeWarp, undecided != 0)) return found;
  with_format<Key>(ranked_type(selection, chunk.row()), [&](auto format) {
    using Format = decltype(format);
    const auto* numbers = static_cast<const typename Format::Bits*>(ranked(selection, chunk.row()));
    found = split<Format, rank>(numbers + tile.first, tile, undecided, Bracket<Key>(state), selection.unit);
  });
  return {word_of(found.above), word_of(found.inside)};
}

// tied[chunk] = how many elements in front of the chunk, in its segment, are at the threshold; where ties are cut.
template <typename Key, Rank rank>
__global__ void __launch_bounds__(SelectTraits::kThreads, kResident<Key>) tie_kernel(Selection selection) {
  ApplyMemory& shared = shared_memory<ApplyMemory>();
  const Chunks mine(selection.table);
  for (int64_t first = mine.first, end; first < mine.end; first = end) {
    Segment& segment = selection.segments[segment_of(selection, first)];
    const State state = segment.state;
    const int64_t behind = state.first_chunk + state.chunks;
    end = behind < mine.end ? behind : mine.end;
    if (!cuts_ties(state)) continue;
    for (int64_t index = first; index < end; ++index) {
      const Chunk chunk(selection.table, index);
      int64_t count = 0, total = 0;
      for_each_tile(chunk, [&](int i, const Tile& tile) {
        count += __popc(resolve<Key, rank>(selection, chunk, state, i, tile).inside);
      });
      sum_before(count, shared.room, total);
      if (threadIdx.x == 0) selection.tied[index] = total;
    }
    if (!arrives_last(segment, end - first, state.chunks, &shared.flag)) continue;
    if (threadIdx.x == 0) clear_arrivals(segment);
    int64_t before = 0;
    for (int64_t start = 0; start < state.chunks; start += SelectTraits::kThreads) {
      const int64_t i = start + threadIdx.x;
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
  kWeights,  // written to the masks, with those that are kept anyway; +0.0 in weights and momenta whose bit changes
};

// Its first bits, `count` of them at most.
__device__ __forceinline__ uint32_t first_bits(uint32_t word, int64_t count) {
  uint32_t result = 0;
  for (; word != 0 && count > 0; --count, word &= word - 1) result |= word & -word;
  return result;
}

// +0.0 where a bit is set, `numbers` being those of the word.
template <typename Bits>
__device__ __forceinline__ void zero_where(Bits* numbers, uint32_t where) {
  for (; where != 0; where &= where - 1) numbers[__ffs(static_cast<int>(where)) - 1] = 0;
}

__device__ __forceinline__ void zero_changed(const SelectRow& row, const Tile& tile, uint32_t changed) {
  if (changed == 0) return;
  const int64_t first = tile.first + lane() * kWordWeights;
  with_bits(row.types,
            [&](auto bits) { zero_where(in_global(static_cast<decltype(bits)*>(row.numbers)) + first, changed); });
  if (row.momentum == nullptr) return;
  with_bits(row.types >> 8,
            [&](auto bits) { zero_where(in_global(static_cast<decltype(bits)*>(row.momentum)) + first, changed); });
}

// The lane's word of the tile's mask, padding included.
__device__ __forceinline__ void store_word_of(uint8_t* mask, const Tile& tile, uint32_t word) {
  if (4 * lane() >= packed_bytes(tile.left)) return;
  uint8_t* bytes = mask + tile.first / kWeightsPerByte + 4 * lane();
  if (reinterpret_cast<uintptr_t>(bytes) % 4 == 0) {
    *reinterpret_cast<uint32_t*>(bytes) = word;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) bytes[i] = static_cast<uint8_t>(word >> (8 * i));
  }
}

__device__ __forceinline__ void apply_word(const Selection& selection, const Chunk& chunk, int i, const Tile& tile,
                                           uint32_t word, Effect effect) {
  if (effect == Effect::kKeep) {
    chunk.word(selection.kept, i) = word;
    return;
  }
  if (selection.among == Among::kInactive) word |= chunk.word(selection.kept, i) & word_inside(tile);
  uint8_t* mask = in_global(chunk.row().mask);
  if (effect == Effect::kWeights) {
    zero_changed(chunk.row(), tile, (load_word_of(mask, tile) ^ word) & word_inside(tile));
  }
  store_word_of(mask, tile, word);
}

template <typename Key, Rank rank>
__global__ void __launch_bounds__(SelectTraits::kThreads, kResident<Key>)
    apply_kernel(Selection selection, Effect effect) {
  ApplyMemory& shared = shared_memory<ApplyMemory>();
  const Chunks mine(selection.table);
  // From the end: the first pass, which has read everything, ended there, and some of that is in the cache.
  for (int64_t index = mine.end - 1; index >= mine.first; --index) {
    const Chunk chunk(selection.table, index);
    const State& state = selection.segments[segment_of(selection, index)].state;
    const Verdict verdict = state.verdict;
    const bool cuts = cuts_ties(state);
    int64_t quota = cuts ? state.wanted - selection.tied[index] : 0;  // of tied elements, from here on
#pragma unroll 1
    for (int round = 0; round < kChunkTiles; round += kWarps) {
      const int i = round + static_cast<int>(threadIdx.x) / kWarpSize;
      const Tile tile = chunk.tile(i);
      uint32_t chosen = 0, tied = 0;
      if (tile.left > 0 && verdict == Verdict::kEverything) chosen = word_of_participants(selection, chunk, i, tile);
      if (tile.left > 0 && verdict == Verdict::kCut) {
        const Split resolved = resolve<Key, rank>(selection, chunk, state, i, tile);
        chosen = chunk.word(selection.chosen, i) | resolved.above;
        tied = resolved.inside;
      }
      if (cuts) {
        int64_t total = 0;
        const int64_t keeps = quota - sum_before(int64_t{__popc(tied)}, shared.room, total);
        quota -= total;
        tied = first_bits(tied, keeps);
      }
      if (tile.left > 0) apply_word(selection, chunk, i, tile, chosen | tied, effect);
    }
  }
}

}  // namespace granet::cuda
