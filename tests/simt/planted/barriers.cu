// Threads that wait for others which do not come, and memory that nobody has set.
#include <vector>

#include "planted.h"

namespace granet::cuda::planted {
namespace {

__global__ void divergent_barrier_kernel(bool mended) {
  if (mended || threadIdx.x < kThreads / 2) __syncthreads();
}

__global__ void ended_before_barrier_kernel(bool mended) {
  if (!mended && threadIdx.x == 7) return;
  __syncthreads();
}

__global__ void two_barriers_kernel(bool mended) {
  if (mended || threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void divergent_shuffle_kernel(int* out, bool mended) {
  int value = static_cast<int>(threadIdx.x);
  if (mended || threadIdx.x % 32 < 16) value = __shfl_down_sync(0xffffffff, value, 1);
  out[threadIdx.x] = value;
}

__global__ void shuffle_outside_mask_kernel(int* out, bool mended) {
  if (threadIdx.x >= 16) return;
  const int value = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = __shfl_sync(0x0000ffff, value, mended ? 3 : 20);
}

struct Sum {
  int value;
};

__global__ void uninitialised_shared_memory_kernel(int* out, bool mended) {
  auto& sum = shared_memory<Sum>().value;
  if (mended && threadIdx.x == 0) sum = 0;
  __syncthreads();
  atomicAdd(&sum, 1);
  __syncthreads();
  if (threadIdx.x == 0) *out = sum;
}

__global__ void too_much_shared_memory_kernel(bool) { dynamic_shared_memory<char>()[threadIdx.x] = 0; }

constexpr Grid kGrid = {.blocks = 1, .threads = kThreads, .stream = nullptr};

}  // namespace

cudaError_t divergent_barrier(bool mended) { return launch(divergent_barrier_kernel, kGrid, mended); }
cudaError_t ended_before_barrier(bool mended) { return launch(ended_before_barrier_kernel, kGrid, mended); }
cudaError_t two_barriers(bool mended) { return launch(two_barriers_kernel, kGrid, mended); }

cudaError_t divergent_shuffle(bool mended) {
  std::vector<int> out(kThreads);
  return launch(divergent_shuffle_kernel, kGrid, out.data(), mended);
}

cudaError_t shuffle_outside_mask(bool mended) {
  std::vector<int> out(kThreads);
  return launch(shuffle_outside_mask_kernel, kGrid, out.data(), mended);
}

cudaError_t uninitialised_shared_memory(bool mended) {
  int sum = 0;
  const cudaError_t error = launch(uninitialised_shared_memory_kernel, kGrid, &sum, mended);
  return sum == kThreads ? error : cudaErrorInvalidValue;
}

cudaError_t too_much_shared_memory(bool mended) {
  Grid grid = kGrid;
  grid.shared = mended ? 1024 : 300 * 1024;
  return launch(too_much_shared_memory_kernel, grid, mended);
}

}  // namespace granet::cuda::planted
