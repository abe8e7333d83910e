// The passes that narrow thresholds down: a sample, and counts in the bins of a bracket.
#pragma once

#include "cuda/select_choose.cuh"
#include "cuda/select_split.cuh"

namespace granet::cuda {

struct PassMemory {
  State state;
  union {
    unsigned counts[SelectTraits::kBins];            // of the block
    unsigned long long totals[SelectTraits::kBins];  // then, in the block that arrives last, of all
  };
  int64_t room[SelectTraits::kThreads / kWarpSize];
  uint64_t bracket[2];
  bool flag;
};

// Counts of a thread on their way to the block's: equal bins in a row are added at once, so that a tensor of equal
// numbers does not make every thread wait at one counter for every element.
class Tally {
 public:
  __device__ explicit Tally(unsigned* counts) : counts_(counts) {}
  __device__ ~Tally() { flush(); }

  __device__ void add(unsigned bin) {
    if (bin != bin_) {
      flush();
      bin_ = bin;
      run_ = 0;
    }
    ++run_;
  }

 private:
  __device__ void flush() const {
    if (run_ != 0) atomicAdd(&counts_[bin_], run_);
  }

  unsigned* counts_;
  unsigned bin_ = 0;
  unsigned run_ = 0;
};

// What a thread has counted above the bracket in its tiles of a chunk; those that an earlier pass has counted are not
// counted again.
template <typename Key, Rank rank, typename Format>
__device__ __forceinline__ int pass_over_chunk(const Selection& selection, const Chunk& chunk, const State& state,
                                               unsigned* counts) {
  using Bits = typename Format::Bits;
  const auto* numbers = static_cast<const Bits*>(ranked(selection, chunk.row()));
  const bool narrows = state.verdict == Verdict::kNarrow;
  const Bracket<Key> bracket(state);
  int count = 0;
  Tally tally(counts);
  for_each_tile(chunk, [&](int i, const Tile& tile) {
    const uint32_t part =
        narrows ? chunk.word(selection.undecided, i) : word_of_participants(selection, chunk, i, tile);
    Split found;
    if (__any_sync(kWholeWarp, part != 0)) {
      const Bits* elements = numbers + tile.first;
      found = split<Format, rank>(elements, tile, part, bracket, selection.unit);
      // Few are inside, and are still in the nearest cache: kept in registers they would leave no room for loads.
      for (uint32_t left = found.inside; left != 0; left &= left - 1) {
        const Bits number = elements[element_of(__ffs(static_cast<int>(left)) - 1)];
        const Key key = key_of<Format, rank, Key>(number, selection.unit);
        tally.add(static_cast<unsigned>(static_cast<Key>(key - bracket.low) >> state.shift));
      }
      found = {word_of(found.above), word_of(found.inside)};
    }
    if (!narrows) count += __popc(found.above);
    if (narrows && part != 0) {
      chunk.word(selection.chosen, i) |= found.above;
      chunk.word(selection.undecided, i) = found.inside;
    } else if (!narrows && state.verdict != Verdict::kCount) {
      chunk.word(selection.chosen, i) = found.above;
      chunk.word(selection.undecided, i) = found.inside;
    }
  });
  return count;
}

// One place in so many elements of a segment is sampled; a power of two.
__device__ __forceinline__ int sample_distance(int64_t elements) {
  int64_t distance = SelectTraits::kDensest;
  while (distance < SelectTraits::kSparsest && distance << SelectTraits::kSamplesLog2 < elements) distance *= 2;
  return static_cast<int>(distance);
}

// What a thread has looked at in chunks [first, end): one place in each `distance`, not at equal distances, as weights
// repeat themselves. The block takes the places of all chunks side by side: each waits for memory three times.
template <typename Key, Rank rank>
__device__ __forceinline__ int sample_chunks(const Selection& selection, int64_t first, int64_t end, const State& state,
                                             unsigned* counts) {
  const int distance = sample_distance(state.elements);
  const auto in_chunk = static_cast<int64_t>(SelectTraits::kChunk / distance);
  int places = 0;
  Tally tally(counts);
  for (int64_t i = first * in_chunk + threadIdx.x; i < end * in_chunk; i += SelectTraits::kThreads) {
    const Chunk chunk(selection.table, i / in_chunk);
    uint32_t random = static_cast<uint32_t>(i) * 0x9e37'79b1U;
    random = (random ^ random >> 15) * 0x85eb'ca6bU;
    const int element = static_cast<int>(i % in_chunk) * distance + static_cast<int>((random >> 16) % distance);
    if (element >= chunk.elements()) continue;
    ++places;
    with_format<Key>(ranked_type(selection, chunk.row()), [&](auto format) {
      using Format = decltype(format);
      const auto* numbers = static_cast<const typename Format::Bits*>(ranked(selection, chunk.row()));
      const auto number = __ldg(numbers + chunk.first_element() + element);  // asked for together with its bit
      if (!takes_part(selection, chunk, element)) return;
      tally.add(static_cast<unsigned>(key_of<Format, rank, Key>(number, selection.unit) >> state.shift));
    });
  }
  return places;
}

// For each segment of which the block has chunks [first, end): count(state, first, end, counters), add up, and
// choose(...) by the block that is last.
template <typename Wanted, typename Count, typename Choose>
__device__ __forceinline__ void for_each_segment(const Selection& selection, const Wanted& is_wanted,
                                                 const Count& count, const Choose& choose) {
  PassMemory& shared = shared_memory<PassMemory>();
  const Chunks mine(selection.table);
  for (int64_t first = mine.first, end; first < mine.end; first = end) {
    const int64_t index = segment_of(selection, first);
    Segment& segment = selection.segments[index];
    if (threadIdx.x == 0) shared.state = segment.state;
    __syncthreads();
    const State& state = shared.state;
    const int64_t behind = state.first_chunk + state.chunks;
    end = behind < mine.end ? behind : mine.end;
    if (!is_wanted(state)) {
      __syncthreads();  // all have read the state
      continue;
    }
    for (int bin = threadIdx.x; bin < SelectTraits::kBins; bin += SelectTraits::kThreads) shared.counts[bin] = 0;
    __syncthreads();
    int64_t of_block = 0;
    sum_before(int64_t{count(state, first, end, shared.counts)}, shared.room, of_block);  // and counters are complete
    if (end - first == state.chunks) {
      choose(segment.state, state, of_block, shared.counts, shared);
    } else {
      unsigned long long* bins = selection.histograms + index * SelectTraits::kBins;
      for (int bin = threadIdx.x; bin < SelectTraits::kBins; bin += SelectTraits::kThreads) {
        if (shared.counts[bin] != 0) atomicAdd(&bins[bin], static_cast<unsigned long long>(shared.counts[bin]));
      }
      if (threadIdx.x == 0 && of_block != 0) atomicAdd(&segment.above, static_cast<unsigned long long>(of_block));
      if (arrives_last(segment, end - first, state.chunks, &shared.flag)) {
        const auto above = static_cast<int64_t>(__ldcg(&segment.above));
        for (int bin = threadIdx.x; bin < SelectTraits::kBins; bin += SelectTraits::kThreads) {
          shared.totals[bin] = __ldcg(bins + bin);  // others have written them
          bins[bin] = 0;
        }
        __syncthreads();
        choose(segment.state, state, above, shared.totals, shared);
        if (threadIdx.x == 0) clear_arrivals(segment);
      }
    }
    __syncthreads();  // the memory may be used again
  }
}

template <typename Key, Rank rank>
__global__ void __launch_bounds__(SelectTraits::kThreads, kResident<Key>) sample_kernel(Selection selection) {
  for_each_segment(
      selection,
      [&](const State& state) { return state.verdict == Verdict::kCount && state.elements >= selection.sample_from; },
      [&](const State& state, int64_t first, int64_t end, unsigned* counts) {
        return sample_chunks<Key, rank>(selection, first, end, state, counts);
      },
      [&](State& result, const State& state, int64_t places, const auto* counts, PassMemory& shared) {
        guess(result, state, places, counts, shared.room, shared.bracket);
      });
}

// `backwards`: begin with the chunks that the pass before has ended with, which are in the cache.
template <typename Key, Rank rank>
__global__ void __launch_bounds__(SelectTraits::kThreads, kResident<Key>)
    pass_kernel(Selection selection, bool backwards) {
  for_each_segment(
      selection, [&](const State& state) { return state.verdict < Verdict::kCut; },
      [&](const State& state, int64_t first, int64_t end, unsigned* counts) {
        int above = 0;
        for (int64_t i = first; i < end; ++i) {
          const Chunk chunk(selection.table, backwards ? first + (end - 1 - i) : i);
          with_format<Key>(ranked_type(selection, chunk.row()), [&](auto format) {
            above += pass_over_chunk<Key, rank, decltype(format)>(selection, chunk, state, counts);
          });
        }
        return above;
      },
      [&](State& result, const State& state, int64_t above, const auto* counts, PassMemory& shared) {
        choose(result, state, above, counts, selection.bits, shared.room);
      });
}

}  // namespace granet::cuda
