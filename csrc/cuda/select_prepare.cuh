// What comes before a selection: segments as they are at first, and how many elements to drop.
#pragma once

#include "cuda/select_choose.cuh"

namespace granet::cuda {

// As many numbers as a launch carries: its arguments may take 4 KiB on every device and driver.
struct Counts {
  static constexpr int kMost = 480;
  int64_t of[kMost];
};

__global__ void __launch_bounds__(SelectTraits::kThreads)
    write_counts_kernel(const __grid_constant__ Counts counts, int count, int64_t* to) {
  for (int i = threadIdx.x; i < count; i += SelectTraits::kThreads) to[i] = counts.of[i];
}

// Segments of a ranking know their size and what is wanted of them: nothing where `k` is null, since it is counted
// later. `regrown`: those of a second ranking, of keys of so many bits, or null; they differ in what is known of them.
__global__ void __launch_bounds__(SelectTraits::kThreads)
    prepare_kernel(Selection selection, const int64_t* k, int64_t segments, int64_t elements, Segment* regrown,
                   int regrown_bits) {
  for (int64_t i = blockIdx.x; i < segments; i += gridDim.x) {
    State state{};
    state.chunks = selection.table.chunks;
    state.elements = elements;
    if (selection.each) {
      const SelectRow& row = reinterpret_cast<const SelectRow*>(selection.table.rows)[i];
      state.first_chunk = row.first_chunk;
      state.chunks = ceil_div(row.numel, SelectTraits::kChunk);
      state.elements = row.numel;
    }
    state.wanted = k == nullptr ? 0 : k[i];
    if (threadIdx.x == 0) {
      forget(state, selection.bits);
      selection.segments[i] = {state, 0, 0};
      if (regrown != nullptr) {
        forget(state, regrown_bits);
        regrown[i] = {state, 0, 0};
      }
    }
    if (state.chunks < 2) continue;  // the block that has the chunk counts in its own memory
    unsigned long long* bins = selection.histograms + i * SelectTraits::kBins;
    for (int bin = threadIdx.x; bin < SelectTraits::kBins; bin += SelectTraits::kThreads) bins[bin] = 0;
  }
}

// ceil(p * active), the product one IEEE double; p outside [0, 1] counts as the nearer end, NaN as 0.
__device__ __forceinline__ int64_t dropped_of(double fraction, int64_t active) {
  const double p = fraction > 0 ? (fraction < 1 ? fraction : 1.0) : 0.0;
  return static_cast<int64_t>(ceil(p * static_cast<double>(active)));
}

// Of each tensor as many are to be regrown, and the others kept, as `fraction` says of its active weights.
__global__ void __launch_bounds__(SelectTraits::kThreads)
    count_kernel(Table table, Segment* kept, Segment* regrown, Fraction fraction) {
  struct Memory {
    int64_t room[kWarps];
    bool flag;
  };
  Memory& shared = shared_memory<Memory>();
  const Chunks mine(table);
  for (int64_t first = mine.first, end; first < mine.end; first = end) {
    const int64_t index = table.owners[first];
    Segment& segment = kept[index];
    const int64_t of_segment = segment.state.chunks, behind = segment.state.first_chunk + of_segment;
    end = behind < mine.end ? behind : mine.end;
    int64_t count = 0, of_block = 0;
    for (int64_t i = first; i < end; ++i) {
      const Chunk chunk(table, i);
      const uint8_t* mask = in_global(chunk.row().mask);
      for_each_tile(chunk,
                    [&](int, const Tile& tile) { count += __popc(load_word_of(mask, tile) & word_inside(tile)); });
    }
    sum_before(count, shared.room, of_block);
    if (threadIdx.x == 0) atomicAdd(&segment.above, static_cast<unsigned long long>(of_block));
    if (arrives_last(segment, end - first, of_segment, &shared.flag) && threadIdx.x == 0) {
      const auto active = static_cast<int64_t>(__ldcg(&segment.above));
      const int64_t dropped = dropped_of(fraction.address == nullptr ? fraction.number : *fraction.address, active);
      segment.state.wanted = active - dropped;
      regrown[index].state.wanted = dropped;
      clear_arrivals(segment);
    }
    __syncthreads();
  }
}

}  // namespace granet::cuda
