// Memory that is not the kernel's.
#include <memory>

#include "planted.h"

namespace granet::cuda::planted {
namespace {

constexpr int kNumel = 100;  // two blocks of 64, the second not full

__global__ void behind_the_end_kernel(float* numbers, int numel, bool mended) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < numel || (!mended && i == numel)) numbers[i] = 1;
}

__global__ void before_the_start_kernel(const float* numbers, float* out, bool mended) {
  const int i = static_cast<int>(threadIdx.x);
  out[i] = numbers[mended && i == 0 ? 0 : i - 1];
}

struct Halves {
  int of[kThreads / 2];
};

__global__ void behind_shared_memory_kernel(bool mended) {
  auto& shared = shared_memory<Halves>();
  auto* of = shared.of;
  if (!mended || threadIdx.x < kThreads / 2) of[threadIdx.x] = 1;
}

__global__ void unaligned_vector_kernel(float* numbers, bool mended) {
  if (threadIdx.x == 0) *reinterpret_cast<float4*>(numbers + (mended ? 4 : 1)) = make_float4(1, 2, 3, 4);
}

// Exactly so many, where AddressSanitizer looks.
std::unique_ptr<float[]> floats(int count) { return std::make_unique<float[]>(count); }

Grid grid(int blocks) { return {.blocks = blocks, .threads = kThreads, .stream = nullptr}; }

}  // namespace

cudaError_t behind_the_end(bool mended) {
  const auto numbers = floats(kNumel);
  return launch(behind_the_end_kernel, grid(2), numbers.get(), kNumel, mended);
}

cudaError_t before_the_start(bool mended) {
  const auto numbers = floats(kThreads), out = floats(kThreads);
  return launch(before_the_start_kernel, grid(1), numbers.get(), out.get(), mended);
}

cudaError_t behind_shared_memory(bool mended) { return launch(behind_shared_memory_kernel, grid(1), mended); }

cudaError_t unaligned_vector(bool mended) {
  const auto numbers = floats(8);
  return launch(unaligned_vector_kernel, grid(1), numbers.get(), mended);
}

}  // namespace granet::cuda::planted
