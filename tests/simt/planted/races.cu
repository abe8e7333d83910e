// Two threads at one place, at least one of them writing, and nothing in between that orders them.
#include <vector>

#include "planted.h"

namespace granet::cuda::planted {
namespace {

constexpr unsigned kWholeWarp = 0xffffffff;

struct Exchange {
  int of[kThreads];
  bool is_last;
};

__global__ void unguarded_sum_kernel(int* sum, bool mended) {
  if (mended) {
    atomicAdd(sum, 1);
  } else {
    *sum += 1;
  }
}

// Each reads what its neighbour has written.
__global__ void missing_barrier_kernel(int* out, bool mended) {
  auto& shared = shared_memory<Exchange>();
  shared.of[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (mended) __syncthreads();
  out[threadIdx.x] = shared.of[(threadIdx.x + 1) % kThreads];
}

// The second round writes what the first may still be reading.
__global__ void reused_too_early_kernel(int* out, bool mended) {
  auto& shared = shared_memory<Exchange>();
  for (int round = 0; round < 2; ++round) {
    shared.of[threadIdx.x] = round;
    __syncthreads();
    out[threadIdx.x] = shared.of[(threadIdx.x + 1) % kThreads];
    if (mended) __syncthreads();
  }
}

// The block that arrives last reads what the others have written.
__global__ void missing_fence_kernel(int* parts, unsigned* arrived, int* sum, bool mended) {
  auto& shared = shared_memory<Exchange>();
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = 1;
    if (mended) __threadfence();
    shared.is_last = atomicAdd(arrived, 1U) + 1 == gridDim.x;
    if (mended) __threadfence();
  }
  __syncthreads();
  if (!shared.is_last || threadIdx.x != 0) return;
  for (unsigned i = 0; i < gridDim.x; ++i) *sum += parts[i];
}

// One block adds atomically to what another sets plainly.
__global__ void plain_counter_kernel(unsigned* counter, bool mended) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0 && !mended) {
    *counter = 0;
  } else {
    atomicAdd(counter, 1U);
  }
}

// A shuffle lets threads meet but orders no memory.
__global__ void warp_without_barrier_kernel(int* out, bool mended) {
  auto& shared = shared_memory<Exchange>();
  shared.of[threadIdx.x] = static_cast<int>(threadIdx.x);
  const int other = __shfl_xor_sync(kWholeWarp, static_cast<int>(threadIdx.x), 1);
  if (mended) __syncwarp();
  out[threadIdx.x] = shared.of[other];
}

constexpr Grid kOneBlock = {.blocks = 1, .threads = kThreads, .stream = nullptr};
constexpr Grid kBlocks = {.blocks = 5, .threads = kThreads, .stream = nullptr};

}  // namespace

cudaError_t unguarded_sum(bool mended) {
  int sum = 0;
  return launch(unguarded_sum_kernel, kOneBlock, &sum, mended);
}

cudaError_t missing_barrier(bool mended) {
  std::vector<int> out(kThreads);
  return launch(missing_barrier_kernel, kOneBlock, out.data(), mended);
}

cudaError_t reused_too_early(bool mended) {
  std::vector<int> out(kThreads);
  return launch(reused_too_early_kernel, kOneBlock, out.data(), mended);
}

cudaError_t missing_fence(bool mended) {
  std::vector<int> parts(kBlocks.blocks);
  unsigned arrived = 0;
  int sum = 0;
  return launch(missing_fence_kernel, kBlocks, parts.data(), &arrived, &sum, mended);
}

cudaError_t plain_counter(bool mended) {
  unsigned counter = 0;
  return launch(plain_counter_kernel, kBlocks, &counter, mended);
}

cudaError_t warp_without_barrier(bool mended) {
  std::vector<int> out(kThreads);
  return launch(warp_without_barrier_kernel, kOneBlock, out.data(), mended);
}

}  // namespace granet::cuda::planted
