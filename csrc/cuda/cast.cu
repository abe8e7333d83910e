#include "cuda/cast.h"

#include "cuda/device.h"
#include "cuda/numbers.cuh"
#include "cuda/tile.cuh"

namespace granet::cuda {
namespace {

struct CastTraits {
  static constexpr int kThreads = 256;
  static constexpr int kAtOnce = 4;             // vectors of a lane that are under way
  static constexpr int kBlocksOnProcessor = 2;  // leaves 128 registers for a thread
};
constexpr int64_t kWarps = CastTraits::kThreads / kWarpSize;

// Of one tensor, so tiles need no table.
template <typename Source, typename Target>
struct CastOf {
  const Source* source;
  const uint8_t* mask;
  const bool* keep_all;
  Target* target;
  int64_t numel;
  SourceOrder order;
};

template <typename Source, typename Target>
__device__ __forceinline__ Target kept_or_zero(bool is_kept, Source value) {
  return is_kept ? converted<Target>(value) : zero<Target>();
}

// By 16 bytes an access, which only an intrinsic makes sure of: of elements that are chosen one by one the compiler
// makes single stores.
template <typename T, int kCount>
__device__ __forceinline__ void store_words(T* target, const Vector<T, kCount>& vector) {
  constexpr int kWords = sizeof vector / kAccessBytes;
  uint4 words[kWords];
  __builtin_memcpy(words, &vector, sizeof vector);
#pragma unroll
  for (int i = 0; i < kWords; ++i) __stcg(reinterpret_cast<uint4*>(target) + i, words[i]);
}

template <typename Source, typename Target>
__device__ __forceinline__ void cast_vectors(const Source* source, Target* target, uint32_t word) {
  constexpr int kCount = kAccessBytes / (sizeof(Source) < sizeof(Target) ? sizeof(Source) : sizeof(Target));
  constexpr int kAtOnce = kSteps<kCount> < CastTraits::kAtOnce ? kSteps<kCount> : CastTraits::kAtOnce;
#pragma unroll 1
  for (int step = 0; step < kSteps<kCount>; step += kAtOnce) {
    uint32_t bits[kAtOnce];
    Vector<Source, kCount> value[kAtOnce]{};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      bits[i] = bits_of<kCount>(word, step + i);
      if (bits[i] != 0) value[i] = *vectors<Source, kCount>(source + place_of<kCount>(step + i));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      Vector<Target, kCount> cast;
#pragma unroll
      for (int j = 0; j < kCount; ++j) cast.of[j] = kept_or_zero<Source, Target>(bits[i] >> j & 1, value[i].of[j]);
      store_words(target + place_of<kCount>(step + i), cast);
    }
  }
}

template <typename Index>
__device__ __forceinline__ int64_t offset_by(const SourceOrder& order, Index i) {
  int64_t offset = 0;
  for (int d = 0; d + 1 < order.dims; ++d) {
    const auto size = static_cast<Index>(order.size[d]);
    offset += static_cast<int64_t>(i % size) * order.stride[d];
    i /= size;
  }
  return offset + static_cast<int64_t>(i) * order.stride[order.dims - 1];
}

// Where the source has the target's element i. Dividing 64 bits is slow.
__device__ __forceinline__ int64_t offset_of(const SourceOrder& order, int64_t i) {
  return i <= UINT32_MAX ? offset_by(order, static_cast<uint32_t>(i)) : offset_by(order, static_cast<uint64_t>(i));
}

template <typename Source, typename Target>
__device__ __forceinline__ void cast_elements(const CastOf<Source, Target>& cast, const Tile& tile, uint32_t word) {
#pragma unroll 1
  for (int step = 0; step < kSteps<1>; ++step) {
    const int place = place_of<1>(step);
    const bool is_kept = bits_of<1>(word, step) != 0;
    if (place >= tile.left) continue;
    const int64_t i = tile.first + place;
    Source value{};
    if (is_kept) value = cast.source[cast.order.dims == 0 ? i : offset_of(cast.order, i)];
    cast.target[i] = kept_or_zero<Source, Target>(is_kept, value);
  }
}

template <typename Source, typename Target>
__global__ void __launch_bounds__(CastTraits::kThreads, CastTraits::kBlocksOnProcessor)
    mask_cast_kernel(const __grid_constant__ CastOf<Source, Target> cast) {
  const bool keep_all = cast.keep_all != nullptr && *cast.keep_all;
  const auto warp = static_cast<int64_t>(threadIdx.x / kWarpSize);
  for (int64_t chunk = blockIdx.x; chunk * kWarps * kTile < cast.numel; chunk += gridDim.x) {
    const int64_t first = (chunk * kWarps + warp) * kTile;
    const Tile tile = {first, cast.numel - first};
    if (tile.left <= 0) continue;
    const uint32_t word = keep_all ? ~0U : load_word_of(cast.mask, tile);
    if (cast.order.dims == 0 && tile.is_whole() && is_aligned(cast.source) && is_aligned(cast.target)) {
      cast_vectors(cast.source + first, cast.target + first, word);
    } else {
      cast_elements(cast, tile, word);
    }
  }
}

template <typename Source, typename Target>
cudaError_t launch_of(const MaskCast& cast, cudaStream_t stream) {
  const CastOf<Source, Target> of = {.source = static_cast<const Source*>(cast.source),
                                     .mask = cast.mask,
                                     .keep_all = cast.keep_all,
                                     .target = static_cast<Target*>(cast.target),
                                     .numel = cast.numel,
                                     .order = cast.order};
  const int64_t chunks = ceil_div(cast.numel, kWarps * kTile);
  constexpr int kThreads = CastTraits::kThreads;
  return launch_resident(mask_cast_kernel<Source, Target>, kThreads, chunks, stream, of);
}

}  // namespace

cudaError_t launch_mask_cast(const MaskCast& cast, cudaStream_t stream) {
  return with_dtype(cast.source_dtype, [&]<typename Source>(Source) {
    return with_dtype(cast.target_dtype, [&]<typename Target>(Target) {
      return launch_of<typename Source::Type, typename Target::Type>(cast, stream);
    });
  });
}

}  // namespace granet::cuda
