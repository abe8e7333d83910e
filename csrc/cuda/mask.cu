#include "cuda/mask.h"

#include "cuda/device.h"
#include "cuda/tile.cuh"

namespace granet::cuda {
namespace {

struct MaskTraits {
  static constexpr int kThreads = 256;  // a tile for each of eight warps: a chunk of kZeroChunk weights
  static constexpr int kPacked = 16;  // bools of a thread, which are one access, as are the two bytes of a warp's lanes
};
static_assert(kZeroChunk == MaskTraits::kThreads / kWarpSize * kTile);
static_assert(kCountChunk % (MaskTraits::kThreads * kAccessBytes) == 0);

// Thread i packs bools [16 i, 16 i + 16) into two bytes.
__global__ void __launch_bounds__(MaskTraits::kThreads)
    pack_mask_kernel(const uint8_t* mask, int64_t numel, uint8_t* packed, int64_t bytes) {
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (2 * pair >= bytes) return;
  const int64_t first = pair * MaskTraits::kPacked, left = numel - first;
  uint64_t low = 0, high = 0;
  if (left >= MaskTraits::kPacked && is_aligned(mask)) {
    const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(mask + first));
    low = loaded.x | static_cast<uint64_t>(loaded.y) << 32;
    high = loaded.z | static_cast<uint64_t>(loaded.w) << 32;
  } else {
    for (int i = 0; i < 8 && i < left; ++i) low |= static_cast<uint64_t>(mask[first + i]) << 8 * i;
    for (int i = 8; i < 16 && i < left; ++i) high |= static_cast<uint64_t>(mask[first + i]) << 8 * (i - 8);
  }
  packed[2 * pair] = gather_bits(nonzero_bytes(low));
  packed[2 * pair + 1] = gather_bits(nonzero_bytes(high));
}

// Thread i unpacks two bytes into bools [16 i, 16 i + 16).
__global__ void __launch_bounds__(MaskTraits::kThreads)
    unpack_mask_kernel(const uint8_t* packed, int64_t numel, uint8_t* mask) {
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t first = pair * MaskTraits::kPacked, left = numel - first;
  if (left <= 0) return;
  const uint64_t low = scatter_bits(packed[2 * pair]), high = left > 8 ? scatter_bits(packed[2 * pair + 1]) : 0;
  if (left >= MaskTraits::kPacked && is_aligned(mask)) {
    *reinterpret_cast<uint4*>(mask + first) =
        make_uint4(static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
                   static_cast<uint32_t>(high >> 32));
  } else {
    for (int i = 0; i < MaskTraits::kPacked && i < left; ++i) {
      mask[first + i] = static_cast<uint8_t>((i < 8 ? low : high) >> 8 * (i % 8));
    }
  }
}

__global__ void __launch_bounds__(MaskTraits::kThreads) count_active_kernel(Table masks, unsigned long long* counts) {
  for (int64_t chunk = blockIdx.x; chunk < masks.chunks; chunk += gridDim.x) {
    const int32_t owner = masks.owners[chunk];
    const int64_t* row = masks.rows + static_cast<int64_t>(owner) * masks.width;
    const auto* mask = in_global(reinterpret_cast<const uint8_t*>(row[kAddresses]));
    const int64_t first = (chunk - row[kFirstChunk]) * kCountChunk;
    const int64_t end = min(first + kCountChunk, row[kNumel]);
    unsigned ones = 0;
    if (is_aligned(mask) && (end - first) % kAccessBytes == 0) {
      for (int64_t i = first + kAccessBytes * threadIdx.x; i < end; i += kAccessBytes * blockDim.x) {
        const uint4 bits = *reinterpret_cast<const uint4*>(mask + i);
        ones += __popc(bits.x) + __popc(bits.y) + __popc(bits.z) + __popc(bits.w);
      }
    } else {
      for (int64_t i = first + threadIdx.x; i < end; i += blockDim.x) ones += __popc(mask[i]);
    }
    ones = __reduce_add_sync(kWholeWarp, ones);
    if (lane() == 0 && ones != 0) atomicAdd(&counts[owner], static_cast<unsigned long long>(ones));
  }
}

// `Bits` has the elements' size, which is all that matters.
template <typename Bits>
__device__ __forceinline__ void zero_vectors(Bits* elements, uint32_t word) {
  constexpr int kCount = kAccessBytes / sizeof(Bits);
#pragma unroll 4
  for (int step = 0; step < kSteps<kCount>; ++step) {
    const uint32_t bits = bits_of<kCount>(word, step);
    if (bits == kAllOf<kCount>) continue;
    auto* vector = vectors<Bits, kCount>(elements + place_of<kCount>(step));
    Vector<Bits, kCount> kept{};
    if (bits != 0) {
      kept = *vector;
#pragma unroll
      for (int i = 0; i < kCount; ++i) kept.of[i] = bits >> i & 1 ? kept.of[i] : Bits{0};
    }
    *vector = kept;
  }
}

template <typename Bits>
__device__ __forceinline__ void zero_elements(Bits* elements, uint32_t word, int64_t left) {
#pragma unroll 1
  for (int step = 0; step < kSteps<1>; ++step) {
    const uint32_t bit = bits_of<1>(word, step);
    if (place_of<1>(step) < left && bit == 0) elements[place_of<1>(step)] = 0;
  }
}

template <typename Bits>
__global__ void __launch_bounds__(MaskTraits::kThreads) zero_inactive_kernel(Table tensors) {
  for (int64_t chunk = blockIdx.x; chunk < tensors.chunks; chunk += gridDim.x) {
    const Place place = locate(tensors, chunk);
    if (place.tile.left <= 0) continue;
    const uint32_t word = load_word_of(place.address<const uint8_t>(1), place.tile);
    Bits* elements = place.address<Bits>(0) + place.tile.first;
    if (place.tile.is_whole() && is_aligned(elements)) {
      zero_vectors(elements, word);
    } else {
      zero_elements(elements, word, place.tile.left);
    }
  }
}

cudaError_t launch_for_each(int64_t threads, cudaStream_t stream, auto kernel, auto... args) {
  const int64_t blocks = ceil_div(threads, MaskTraits::kThreads);
  return launch(kernel, {.blocks = blocks, .threads = MaskTraits::kThreads, .stream = stream}, args...);
}

}  // namespace

cudaError_t launch_pack_mask(const uint8_t* mask, int64_t numel, uint8_t* packed, cudaStream_t stream) {
  const int64_t bytes = packed_bytes(numel);
  return launch_for_each(bytes / 2, stream, pack_mask_kernel, mask, numel, packed, bytes);
}

cudaError_t launch_unpack_mask(const uint8_t* packed, int64_t numel, uint8_t* mask, cudaStream_t stream) {
  return launch_for_each(ceil_div(numel, MaskTraits::kPacked), stream, unpack_mask_kernel, packed, numel, mask);
}

cudaError_t launch_count_active(const Table& masks, unsigned long long* counts, cudaStream_t stream) {
  return launch_resident(count_active_kernel, MaskTraits::kThreads, masks.chunks, stream, masks, counts);
}

cudaError_t launch_zero_inactive(const Table& tensors, size_t item_size, cudaStream_t stream) {
  constexpr int kThreads = MaskTraits::kThreads;
  switch (item_size) {
    case 2:
      return launch_resident(zero_inactive_kernel<uint16_t>, kThreads, tensors.chunks, stream, tensors);
    case 4:
      return launch_resident(zero_inactive_kernel<uint32_t>, kThreads, tensors.chunks, stream, tensors);
    case 8:
      return launch_resident(zero_inactive_kernel<uint64_t>, kThreads, tensors.chunks, stream, tensors);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace granet::cuda
