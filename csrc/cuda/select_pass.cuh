// The passes that narrow thresholds down: a sample, and counts in the bins of a bracket.
#pragma once

#include "cuda/select_choose.cuh"

namespace granet::cuda {

struct PassMemory {
  State state;
  unsigned counts[SelectTraits::kBins];
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

// What a thread has counted above the bracket. While `cleans`, elements that take no part become +0.0.
template <typename Key, Rank rank, typename Format>
__device__ __forceinline__ int pass_over_chunk(const Selection& selection, const Walk& walk, const State& state,
                                               bool cleans, unsigned* counts) {
  using Bits = typename Format::Bits;
  const auto* numbers = static_cast<const Bits*>(ranked(selection, walk.row())) + walk.first_element();
  const bool wide = is_aligned(numbers);
  const int elements = walk.elements();
  const bool narrows = state.verdict == Verdict::kNarrow;
  const bool decides = state.verdict != Verdict::kCount;
  const Key low = static_cast<Key>(state.low), span = static_cast<Key>(state.span);
  const int shift = state.shift, unit = selection.unit;
  uint8_t* chosen_bits = selection.chosen + walk.chunk() * kChunkGroups;
  uint8_t* undecided_bits = selection.undecided + walk.chunk() * kChunkGroups;
  const Participants part_of = narrows ? Participants{undecided_bits, 0} : participants(selection, walk);
  int above = 0;
  Tally tally(counts);
  for (int group = threadIdx.x; group * kGroup < elements; group += SelectTraits::kThreads) {
    const int left = elements - group * kGroup;
    const unsigned part = part_of(group, left);
    unsigned chosen = 0, undecided = 0;
    if (part != 0 || cleans) {
      const Group<Bits> values = load_group(numbers + group * kGroup, left, wide);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const unsigned bit = 1U << i;
        if ((part & bit) != 0) {
          const Key key = key_of<Format, rank, Key>(values.bits[i], unit);
          const Key offset = key - low;
          if (key >= low && offset > span) chosen |= bit;
          if (key >= low && offset <= span) {
            undecided |= bit;
            tally.add(static_cast<unsigned>(offset >> shift));
          }
        } else if (cleans && values.bits[i] != 0) {  // zero behind the end
          const_cast<Bits*>(numbers)[group * kGroup + i] = 0;
        }
      }
    }
    if (narrows) {
      if (chosen != 0) chosen_bits[group] |= static_cast<uint8_t>(chosen);
      if (undecided != part) undecided_bits[group] = static_cast<uint8_t>(undecided);
    } else if (decides) {
      chosen_bits[group] = static_cast<uint8_t>(chosen);
      undecided_bits[group] = static_cast<uint8_t>(undecided);
      above += __popc(chosen);
    }
  }
  return above;
}

// What a thread has looked at: one place in each `kSampleEvery`, not at equal distances, as weights repeat themselves.
template <typename Key, Rank rank, typename Format>
__device__ __forceinline__ int sample_chunk(const Selection& selection, const Walk& walk, const State& state,
                                            unsigned* counts) {
  using Bits = typename Format::Bits;
  constexpr int kEvery = SelectTraits::kSampleEvery;
  const auto* numbers = static_cast<const Bits*>(ranked(selection, walk.row())) + walk.first_element();
  const int elements = walk.elements();
  const Participants part_of = participants(selection, walk);
  int places = 0;
  Tally tally(counts);
  for (int i = threadIdx.x; i * kEvery < elements; i += SelectTraits::kThreads) {
    auto random = static_cast<uint32_t>(walk.chunk() * (SelectTraits::kChunk / kEvery) + i) * 0x9e37'79b1U;
    random = (random ^ random >> 15) * 0x85eb'ca6bU;
    const int element = i * kEvery + static_cast<int>((random >> 16) % kEvery);
    if (element >= elements) continue;
    ++places;
    const int group = element / kGroup;
    if ((part_of(group, elements - group * kGroup) >> element % kGroup & 1) == 0) continue;
    const Key key = key_of<Format, rank, Key>(numbers[element], selection.unit);
    tally.add(static_cast<unsigned>(key >> state.shift));
  }
  return places;
}

// Chunks of one segment after another: count(state) in each chunk, add up, and choose(...) by the block that is last.
template <typename Wanted, typename Count, typename Choose>
__device__ __forceinline__ void for_each_segment(const Selection& selection, const Wanted& is_wanted,
                                                 const Count& count, const Choose& choose) {
  PassMemory& shared = shared_memory<PassMemory>();
  Walk walk(selection.table, selection.each);
  while (walk.any()) {
    const int64_t index = walk.segment();
    Segment& segment = selection.segments[index];
    if (threadIdx.x == 0) shared.state = segment.state;
    __syncthreads();
    const State& state = shared.state;
    const bool works = is_wanted(state);
    if (works) {
      for (int bin = threadIdx.x; bin < SelectTraits::kBins; bin += SelectTraits::kThreads) shared.counts[bin] = 0;
      __syncthreads();
    }
    int64_t chunks = 0;
    int64_t counted = 0;
    for (; walk.any() && walk.segment() == index; walk.next(), ++chunks) {
      if (works) counted += count(walk, state, shared.counts);
    }
    if (!works) {
      __syncthreads();  // all have read the state
      continue;
    }
    int64_t of_block = 0;
    sum_before(counted, shared.room, of_block);  // and the counters are complete
    if (chunks == state.chunks) {
      choose(segment.state, state, of_block, LocalCounts{shared.counts}, shared);
    } else {
      unsigned long long* bins = selection.histograms + index * SelectTraits::kBins;
      for (int bin = threadIdx.x; bin < SelectTraits::kBins; bin += SelectTraits::kThreads) {
        if (shared.counts[bin] != 0) atomicAdd(&bins[bin], static_cast<unsigned long long>(shared.counts[bin]));
      }
      if (threadIdx.x == 0 && of_block != 0) atomicAdd(&segment.above, static_cast<unsigned long long>(of_block));
      if (arrives_last(segment, chunks, state.chunks, &shared.flag)) {
        const auto above = static_cast<int64_t>(__ldcg(&segment.above));
        choose(segment.state, state, above, GlobalCounts{bins}, shared);
        __syncthreads();  // all have read
        for (int bin = threadIdx.x; bin < SelectTraits::kBins; bin += SelectTraits::kThreads) bins[bin] = 0;
        if (threadIdx.x == 0) clear_arrivals(segment);
      }
    }
    __syncthreads();  // the memory may be used again
  }
}

template <typename Key, Rank rank>
__global__ void __launch_bounds__(SelectTraits::kThreads, SelectTraits::kResident) sample_kernel(Selection selection) {
  for_each_segment(
      selection,
      [&](const State& state) { return state.verdict == Verdict::kCount && state.elements >= selection.sample_from; },
      [&](const Walk& walk, const State& state, unsigned* counts) {
        int places = 0;
        with_format<Key>(ranked_type(selection, walk.row()), [&](auto format) {
          places = sample_chunk<Key, rank, decltype(format)>(selection, walk, state, counts);
        });
        return places;
      },
      [&](State& result, const State& state, int64_t places, const auto& counts, PassMemory& shared) {
        guess(result, state, places, counts, shared.room, shared.bracket);
      });
}

// `is_first`: of the call. Then elements that take no part are set to zero, if they are weights.
template <typename Key, Rank rank>
__global__ void __launch_bounds__(SelectTraits::kThreads, SelectTraits::kResident)
    pass_kernel(Selection selection, bool is_first) {
  const bool cleans = is_first && selection.among == Among::kActive;
  for_each_segment(
      selection, [&](const State& state) { return state.verdict < Verdict::kCut; },
      [&](const Walk& walk, const State& state, unsigned* counts) {
        int above = 0;
        with_format<Key>(ranked_type(selection, walk.row()), [&](auto format) {
          above = pass_over_chunk<Key, rank, decltype(format)>(selection, walk, state, cleans, counts);
        });
        return above;
      },
      [&](State& result, const State& state, int64_t above, const auto& counts, PassMemory& shared) {
        choose(result, state, above, counts, selection.bits, shared.room);
      });
}

}  // namespace granet::cuda
