// CUB's selection of the k largest, for the benchmarks: the only one of a library that neither sorts nor scans its results.
//
// CCCL 3.3 or later, whose headers bench/yardsticks/cub.py finds. Values come in no order and indices are int32.
#include <cstddef>
#include <cstdint>

#include <cub/device/device_topk.cuh>
#include <cuda/iterator>

namespace {

auto environment(cudaStream_t stream) {
  const auto requirements = cuda::execution::require(cuda::execution::determinism::not_guaranteed,
                                                     cuda::execution::output_ordering::unsorted);
  return cuda::std::execution::env{cuda::stream_ref{stream}, requirements};
}

}  // namespace

// The k largest of n keys; with `indices` where they were, too. As in all of CUB, without `memory` only its size is
// told.
extern "C" int cub_topk(void* memory, size_t* bytes, const float* keys, float* values, int32_t* indices, int32_t n,
                        int32_t k, cudaStream_t stream) {
  const auto env = environment(stream);
  if (indices == nullptr) return cub::DeviceTopK::MaxKeys(memory, *bytes, keys, values, n, k, env);
  const cuda::counting_iterator<int32_t> places{0};
  return cub::DeviceTopK::MaxPairs(memory, *bytes, keys, values, places, indices, n, k, env);
}
