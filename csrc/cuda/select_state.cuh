// What selection keeps on the device, and how blocks share work.
//
// A segment's threshold is narrowed down pass by pass. Each pass counts keys in up to 4096 bins of a bracket, a range
// of keys that holds the threshold; the block that arrives last chooses the bin, which is the next bracket. Nothing
// spins.
#pragma once

#include <cstdint>

#include "common/bits.h"
#include "cuda/select.h"
#include "cuda/select_keys.cuh"

namespace granet::cuda {

// The tuning, all in one place. None of it has been measured on a card yet; the reasons are arithmetic.
struct SelectTraits {
  static constexpr int kThreads = 256;  // sixteen bins for each at the choice
  static constexpr int64_t kChunk =
      kSelectChunk;                      // four groups a thread; ResNet-50 has three chunks for each of 528 blocks
  static constexpr int kResident = 4;    // blocks on a multiprocessor: registers are what bounds them
  static constexpr int kDigitBits = 12;  // exponents of weights vary little: 12 bits tell some 80 bins apart, 8 bits 5
  static constexpr int kBins = 1 << kDigitBits;
  static constexpr int64_t kSampleEvery = 256;  // of 25.5 million 100 000: the bracket holds some 1.5 %
};
constexpr int kChunkGroups = SelectTraits::kChunk / kGroup;

enum class Verdict : int32_t {
  kCount,       // nothing is known; count over all keys
  kGuess,       // a sample suggests the bracket
  kSplit,       // the bracket is certain, and every element is to be compared with it
  kNarrow,      // likewise, but elements that are still undecided have a bit
  kCut,         // final: of the undecided those above the bracket are chosen, and the first `wanted` inside
  kEverything,  // final: all that take part are chosen
  kNothing,     // final
};

struct State {
  int64_t first_chunk;
  int64_t chunks;
  int64_t elements;
  int64_t wanted;  // how many are to be chosen: of all, or, once bits are written (kNarrow, kCut), of those inside
  int64_t inside;  // how many there are, once the bracket has been chosen
  uint64_t low;    // the bracket's smallest key
  uint64_t span;   // its largest, less `low`
  int32_t shift;   // keys of a bin: two to this
  Verdict verdict;
};

struct Segment {
  State state;  // written by the block that arrives last, when all have read it
  // Of a pass; cleared by that block.
  unsigned long long above;    // keys above the bracket; while sampling, the places looked at
  unsigned long long arrived;  // chunks
};

enum class Among : int32_t { kActive, kInactive, kAll };

// Arguments of the kernels: a ranking of all rows.
struct Selection {
  Table table;
  Segment* segments;
  unsigned long long* histograms;  // (segments, kBins), zero between passes
  int64_t* tied;                   // (chunks,)
  uint8_t* chosen;                 // bits of all chunks: above the bracket
  uint8_t* undecided;              // inside
  uint8_t* kept;                   // kInactive: those that stay anyway, and take no part
  Among among;
  bool each;
  bool by_gain;  // rank SelectRow::gain
  int unit;
  int bits;  // of a key
  int64_t sample_from;
};

__device__ __forceinline__ const void* ranked(const Selection& selection, const SelectRow& row) {
  return in_global(selection.by_gain ? row.gain : row.numbers);
}

__device__ __forceinline__ int64_t ranked_type(const Selection& selection, const SelectRow& row) {
  return selection.by_gain ? row.types >> 16 : row.types;
}

// The block's chunks, a contiguous range of equal length for all, one after another.
class Walk {
 public:
  __device__ Walk(const Table& table, bool each)
      : table_(table),
        each_(each),
        chunk_(table.chunks * blockIdx.x / gridDim.x),
        end_(table.chunks * (blockIdx.x + 1) / gridDim.x) {
    find_row();
  }

  __device__ bool any() const { return chunk_ < end_; }
  __device__ int64_t chunk() const { return chunk_; }
  __device__ const SelectRow& row() const { return reinterpret_cast<const SelectRow*>(table_.rows)[row_]; }
  __device__ int64_t segment() const { return each_ ? row_ : 0; }
  __device__ int64_t first_element() const { return (chunk_ - row().first_chunk) * SelectTraits::kChunk; }
  __device__ int elements() const {
    const int64_t left = row().numel - first_element();
    return static_cast<int>(left < SelectTraits::kChunk ? left : SelectTraits::kChunk);
  }

  __device__ void next() {
    ++chunk_;
    find_row();
  }

 private:
  __device__ void find_row() {
    if (any()) row_ = table_.owners[chunk_];
  }

  const Table& table_;
  bool each_;
  int64_t chunk_;
  int64_t end_;
  int64_t row_ = 0;
};

// Bits of a group that are elements of the tensor, which has so many from the group on.
__device__ __forceinline__ unsigned bits_inside(int left) { return left >= kGroup ? 0xffU : (1U << left) - 1; }

// Which elements of a chunk take part: those with a bit, or those without.
struct Participants {
  const uint8_t* bits;  // null: none is set
  unsigned flip;

  __device__ unsigned operator()(int group, int left) const {
    return ((bits == nullptr ? 0U : in_global(bits)[group]) ^ flip) & bits_inside(left);
  }
};

__device__ __forceinline__ Participants participants(const Selection& selection, const Walk& walk) {
  if (selection.among == Among::kActive) return {walk.row().mask + walk.first_element() / kGroup, 0};
  if (selection.among == Among::kInactive) return {selection.kept + walk.chunk() * kChunkGroups, 0xff};
  return {nullptr, 0xff};
}

// Exclusive sums of the block's values in the order of threads, and their total; `room` holds a number for each warp.
template <typename Number>
__device__ __forceinline__ Number sum_before(Number value, Number* room, Number& total) {
  constexpr int kWarps = SelectTraits::kThreads / kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  Number sum = value;
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const Number before = __shfl_up_sync(kWholeWarp, sum, step);
    if (lane() >= step) sum += before;
  }
  if (lane() == kWarpSize - 1) room[warp] = sum;
  __syncthreads();
  Number of_warps = 0;
  total = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    if (i == warp) of_warps = total;
    total += room[i];
  }
  __syncthreads();  // `room` may be used again
  return of_warps + sum - value;
}

// Nobody has arrived; by one thread of the block that was last. Atomically, as all accesses to these are.
__device__ __forceinline__ void clear_arrivals(Segment& segment) {
  atomicExch(&segment.above, 0ULL);
  atomicExch(&segment.arrived, 0ULL);
}

// Whether the block is the last to arrive with chunks of the segment, `total` of them: then it sees what all have
// written before. For all threads of the block, as a barrier; `flag` in shared memory.
__device__ __forceinline__ bool arrives_last(Segment& segment, int64_t chunks, int64_t total, bool* flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // what the block has written is seen by whoever sees it arrive
    const auto before = static_cast<int64_t>(atomicAdd(&segment.arrived, static_cast<unsigned long long>(chunks)));
    __threadfence();
    *flag = before + chunks == total;
  }
  __syncthreads();
  return *flag;
}

}  // namespace granet::cuda
