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

// The tuning, all in one place.
struct SelectTraits {
  static constexpr int kThreads = 256;             // sixteen bins for each at the choice
  static constexpr int64_t kChunk = kSelectChunk;  // two tiles a warp; ResNet-50 has four chunks for each of 396 blocks
  static constexpr int kResident = 3;              // blocks on a multiprocessor: registers are what bounds them,
  static constexpr int kResidentFp64 = 1;          // the more so where keys have 64 bits, which nobody trains with
  static constexpr int kDigitBits = 12;  // exponents of weights vary little: 12 bits tell some 80 bins apart, 8 bits 5
  static constexpr int kBins = 1 << kDigitBits;
  // Bytes that a lane has asked for before it looks at the first: all fp32 numbers of its tile.
  static constexpr int kAtOnceBytes = 128;
  // One place in so many elements is sampled: of a segment some 16 000, and of 25.5 million 100 000, which leaves about
  // 1.5 % in the bracket. Fewer places widen it, more cost a sector of memory each.
  static constexpr int kSamplesLog2 = 14;
  static constexpr int64_t kDensest = 16;
  static constexpr int64_t kSparsest = 256;
};

template <typename Key>
constexpr int kResident = sizeof(Key) == 8 ? SelectTraits::kResidentFp64 : SelectTraits::kResident;
constexpr int kChunkGroups = SelectTraits::kChunk / kGroup;
constexpr int kChunkTiles = SelectTraits::kChunk / kTile;
constexpr int kWarps = SelectTraits::kThreads / kWarpSize;

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

// A chunk, and the row it belongs to.
class Chunk {
 public:
  __device__ Chunk(const Table& table, int64_t index)
      : row_(reinterpret_cast<const SelectRow*>(table.rows)[table.owners[index]]), index_(index) {}

  __device__ const SelectRow& row() const { return row_; }
  __device__ int64_t index() const { return index_; }
  __device__ int64_t first_element() const { return (index_ - row_.first_chunk) * SelectTraits::kChunk; }
  __device__ int elements() const {
    const int64_t left = row_.numel - first_element();
    return static_cast<int>(left < SelectTraits::kChunk ? left : SelectTraits::kChunk);
  }

  // One of its kChunkTiles tiles.
  __device__ Tile tile(int i) const {
    const int64_t first = first_element() + static_cast<int64_t>(i) * kTile;
    return {first, row_.numel - first};
  }

  // The lane's word of that tile in bits that have a place for every chunk.
  __device__ uint32_t& word(uint8_t* bits, int i) const {
    return *reinterpret_cast<uint32_t*>(bits + index_ * kChunkGroups + i * (kTile / kGroup) + 4 * lane());
  }

 private:
  const SelectRow& row_;
  int64_t index_;
};

// The block's share of all chunks: a contiguous range, as long as every other block's.
struct Chunks {
  int64_t first;
  int64_t end;

  __device__ explicit Chunks(const Table& table)
      : first(table.chunks * blockIdx.x / gridDim.x), end(table.chunks * (blockIdx.x + 1) / gridDim.x) {}
};

__device__ __forceinline__ int64_t segment_of(const Selection& selection, int64_t chunk) {
  return selection.each ? selection.table.owners[chunk] : 0;
}

// The warp's tiles of a chunk in turn, visit(i, tile): so that the warps of a block take consecutive ones side by side.
template <typename Visit>
__device__ __forceinline__ void for_each_tile(const Chunk& chunk, const Visit& visit) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) / kWarpSize; i < kChunkTiles; i += kWarps) {
    const Tile tile = chunk.tile(i);
    if (tile.left <= 0) break;
    visit(i, tile);
  }
}

// Bits of the lane's word that are elements of the tensor.
__device__ __forceinline__ uint32_t word_inside(const Tile& tile) {
  const int64_t left = tile.left - lane() * kWordWeights;
  return left >= kWordWeights ? 0xffff'ffffU : left <= 0 ? 0 : (1U << left) - 1;
}

// The lane's word of the elements that take part: those with a bit, or those without.
__device__ __forceinline__ uint32_t word_of_participants(const Selection& selection, const Chunk& chunk, int i,
                                                         const Tile& tile) {
  uint32_t word = 0xffff'ffffU;
  if (selection.among == Among::kActive) word = load_word_of(in_global(chunk.row().mask), tile);
  if (selection.among == Among::kInactive) word = ~chunk.word(selection.kept, i);
  return word & word_inside(tile);
}

// Likewise, for one element of the chunk.
__device__ __forceinline__ bool takes_part(const Selection& selection, const Chunk& chunk, int element) {
  if (selection.among == Among::kAll) return true;
  const bool by_mask = selection.among == Among::kActive;
  const uint8_t* bits =
      by_mask ? chunk.row().mask + chunk.first_element() / kGroup : selection.kept + chunk.index() * kChunkGroups;
  return ((in_global(bits)[element / kGroup] >> element % kGroup & 1) != 0) == by_mask;
}

// Exclusive sums of the block's values in the order of threads, and their total; `room` holds a number for each warp.
template <typename Number>
__device__ __forceinline__ Number sum_before(Number value, Number* room, Number& total) {
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
