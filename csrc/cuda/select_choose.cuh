// The choice of the next bracket from the counts of a pass, by one block.
#pragma once

#include "cuda/select_state.cuh"

namespace granet::cuda {

struct Found {
  int bin;
  int64_t before;  // keys in bins above
  int64_t count;   // in the bin
};

// A thread's share of the bins: consecutive ones, the highest with thread 0. `counts` lie in shared memory: each is
// asked for when the one before is known.
template <typename Count>
class Share {
 public:
  __device__ Share(const Count* counts, int64_t* room)
      : counts_(counts), highest_(SelectTraits::kBins - 1 - static_cast<int>(threadIdx.x) * kBinsOfThread) {
    for (int i = 0; i < kBinsOfThread; ++i) sum_ += counts[highest_ - i];
    before_ = sum_before(sum_, room, total_);
  }

  __device__ int64_t total() const { return total_; }  // of the block

  // Whether the key of this rank, 1 for the largest, lies in one of the thread's bins: so for one thread of the block.
  __device__ bool holds(int64_t rank, Found& found) const {
    if (rank <= before_ || rank > before_ + sum_) return false;
    found = {highest_, before_, static_cast<int64_t>(counts_[highest_])};
    while (rank > found.before + found.count) {
      found.before += found.count;
      found.count = static_cast<int64_t>(counts_[--found.bin]);
    }
    return true;
  }

 private:
  static constexpr int kBinsOfThread = SelectTraits::kBins / SelectTraits::kThreads;
  static_assert(SelectTraits::kBins % SelectTraits::kThreads == 0);
  const Count* counts_;
  int highest_;
  int64_t sum_ = 0;
  int64_t before_ = 0;
  int64_t total_ = 0;
};

// The bracket of all keys of so many bits, which nothing is known of.
__device__ __forceinline__ void forget(State& state, int bits) {
  state.verdict = Verdict::kCount;
  state.low = 0;
  state.span = bits == 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
  state.shift = bits > SelectTraits::kDigitBits ? bits - SelectTraits::kDigitBits : 0;
}

// After a pass in the bracket of `state`, with so many keys above it: the bin in which the threshold lies.
template <typename Count>
__device__ void choose(State& result, const State& state, int64_t above, const Count* counts, int bits, int64_t* room) {
  const Share share(counts, room);
  State next = state;
  if (state.wanted > above && state.wanted <= above + share.total() &&
      !(state.verdict == Verdict::kCount && state.wanted == share.total())) {
    Found found;
    if (!share.holds(state.wanted - above, found)) return;
    const bool starts_over = state.verdict == Verdict::kCount;  // the next pass counts what is above the bracket
    if (!starts_over) next.wanted = state.wanted - above - found.before;
    next.inside = found.count;
    next.low = state.low + (static_cast<uint64_t>(found.bin) << state.shift);
    next.span = (uint64_t{1} << state.shift) - 1;
    next.shift = state.shift > SelectTraits::kDigitBits ? state.shift - SelectTraits::kDigitBits : 0;
    const bool is_final = state.shift == 0 || next.wanted == next.inside;
    next.verdict = starts_over ? Verdict::kSplit : is_final ? Verdict::kCut : Verdict::kNarrow;
  } else if (state.verdict == Verdict::kCount) {
    next.verdict = state.wanted <= 0 ? Verdict::kNothing : Verdict::kEverything;
  } else {  // the guess was wrong
    forget(next, bits);
  }
  if (next.verdict == Verdict::kSplit || next.verdict == Verdict::kNarrow || next.verdict == Verdict::kCut) {
    result = next;  // by the thread that holds the bin
  } else if (threadIdx.x == 0) {
    result = next;
  }
}

// After a look at some places of the segment: a bracket that holds the threshold, as likely as six sigma are. Within a
// bin keys are taken to be spread evenly. Where they are not, the pass over all elements refutes the bracket, and that
// pass is all that is lost.
template <typename Count>
__device__ void guess(State& result, const State& state, int64_t places, const Count* counts, int64_t* room,
                      uint64_t* bracket) {
  if (threadIdx.x == 0) {
    bracket[0] = 0;
    bracket[1] = state.span;
  }
  const Share share(counts, room);
  const float expected = static_cast<float>(state.wanted) / static_cast<float>(state.elements) * places;
  const float margin = 6 * sqrtf(fmaxf(expected, 0)) + 8;
  const auto highest = static_cast<int64_t>(expected - margin);
  const auto lowest = static_cast<int64_t>(expected + margin);
  const int fine = state.shift < 16 ? state.shift : 16;  // bits of a place inside a bin
  const auto key_at = [&](const Found& found, int64_t rank_from_below) {
    const uint64_t part = (static_cast<uint64_t>(rank_from_below) << fine) / static_cast<uint64_t>(found.count);
    return (static_cast<uint64_t>(found.bin) << state.shift) + (part << (state.shift - fine));
  };
  Found found;
  if (share.holds(lowest, found)) bracket[0] = key_at(found, found.before + found.count - lowest);
  if (highest > 0 && share.holds(highest, found)) {
    const uint64_t key = key_at(found, found.before + found.count - highest + 1);
    bracket[1] = key < state.span ? key : state.span;
  }
  __syncthreads();
  if (threadIdx.x != 0 || state.wanted <= 0 || bracket[1] - bracket[0] == state.span) return;
  State next = state;
  next.verdict = Verdict::kGuess;
  next.low = bracket[0];
  next.span = bracket[1] - bracket[0];
  next.shift = 0;
  while (next.span >> next.shift >= SelectTraits::kBins) ++next.shift;
  result = next;
}

}  // namespace granet::cuda
