// How kernels walk weights and their mask.
//
// A warp takes a tile of 1024 weights. Each lane loads one 32-bit word of the mask, 128 consecutive bytes for the warp,
// and so knows at once which of the tile's weights to touch; every later question is a shuffle. Weights are then taken
// 16 bytes a lane where addresses allow, guarded by their few bits: what nobody needs is not fetched. (A guard for each
// element would split the 16 bytes into single accesses.)
#pragma once

#include <cstdint>

#include "common/bits.h"
#include "cuda/launch.h"
#include "cuda/table.h"

namespace granet::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xffffffff;
constexpr int kTile = 1024;  // weights; a word of the mask for each lane
constexpr int kWordWeights = 32;
constexpr int kAccessBytes = 16;  // the widest access

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }

// A tile of a tensor: a warp's work.
struct Tile {
  int64_t first;  // element
  int64_t left;   // elements from there to the tensor's end, 0 or less where there are none

  __device__ __forceinline__ bool is_whole() const { return left >= kTile; }
};

// Words of a packed mask that hold bits of elements: the buffer is padded to four, but a caller's may be longer.
__device__ __forceinline__ int64_t mask_words(int64_t numel) { return ceil_div(numel, kWordWeights); }

// The lane's word of the tile's bits; 0 behind the tensor's end. At any address.
__device__ __forceinline__ uint32_t load_word_of(const uint8_t* mask, const Tile& tile) {
  if (lane() >= mask_words(tile.left)) return 0;
  const uint8_t* bytes = mask + tile.first / kWeightsPerByte + 4 * lane();
  if (reinterpret_cast<uintptr_t>(bytes) % 4 == 0) return *reinterpret_cast<const uint32_t*>(bytes);
  return bytes[0] | bytes[1] << 8 | bytes[2] << 16 | static_cast<uint32_t>(bytes[3]) << 24;
}

// Of the `kCount` consecutive elements that the lane takes in step i, where the warp takes them in turn: their first
// place in the tile.
template <int kCount>
__device__ __forceinline__ int place_of(int step) {
  return (step * kWarpSize + lane()) * kCount;
}

// Their bits, from the words of all lanes. All lanes must ask.
template <int kCount>
__device__ __forceinline__ uint32_t bits_of(uint32_t word, int step) {
  static_assert(kWordWeights % kCount == 0);
  const int place = place_of<kCount>(step);
  return __shfl_sync(kWholeWarp, word, place / kWordWeights) >> (place % kWordWeights) & ((uint64_t{1} << kCount) - 1);
}

template <int kCount>
constexpr int kSteps = kTile / (kWarpSize * kCount);  // in a tile

template <int kCount>
constexpr uint32_t kAllOf = (uint32_t{1} << kCount) - 1;

// Consecutive elements, moved with the widest accesses that their size allows.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount < kAccessBytes ? sizeof(T) * kCount : kAccessBytes) Vector {
  T of[kCount];
};

template <typename T, int kCount>
__device__ __forceinline__ Vector<T, kCount>* vectors(T* elements) {
  return reinterpret_cast<Vector<T, kCount>*>(elements);
}
template <typename T, int kCount>
__device__ __forceinline__ const Vector<T, kCount>* vectors(const T* elements) {
  return reinterpret_cast<const Vector<T, kCount>*>(elements);
}

__device__ __forceinline__ bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % kAccessBytes == 0;
}

// A chunk's tensor, and the tile of it that is the warp's. Tiles of a chunk are for the warps of a block, in order.
struct Place {
  const int64_t* row;
  Tile tile;

  template <typename T>
  __device__ __forceinline__ T* address(int list) const {
    return in_global(reinterpret_cast<T*>(row[kAddresses + list]));
  }
};

__device__ __forceinline__ Place locate(const Table& table, int64_t chunk) {
  const int64_t* row = table.rows + static_cast<int64_t>(table.owners[chunk]) * table.width;
  const auto warp = static_cast<int64_t>(threadIdx.x / kWarpSize), warps = static_cast<int64_t>(blockDim.x / kWarpSize);
  const int64_t first = ((chunk - row[kFirstChunk]) * warps + warp) * kTile;
  return {row, {first, row[kNumel] - first}};
}

}  // namespace granet::cuda
