// How kernels are launched, and how they share memory: by nvcc, or by tests/simt, whose cuda_runtime.h runs them on the
// host.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

namespace granet::cuda {

struct Grid {
  int64_t blocks;
  int threads;
  cudaStream_t stream;
  size_t shared = 0;  // bytes of dynamic_shared_memory
};

// Nothing to do for no blocks, which CUDA takes for an error.
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), const Grid& grid, const Args&... args) {
  if (grid.blocks == 0) return cudaSuccess;
  if (grid.blocks < 0 || grid.blocks > INT32_MAX) return cudaErrorInvalidValue;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(grid.blocks);
  config.blockDim = static_cast<unsigned>(grid.threads);
  config.dynamicSmemBytes = grid.shared;
  config.stream = grid.stream;
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

#if defined(GRANET_SIMT)

template <typename T>
T* in_global(T* address) {
  return address;
}

template <typename T>
T& shared_memory() {
  static const char tag = 0;
  return *static_cast<T*>(simt::shared_memory(&tag, sizeof(T), alignof(T)));
}

template <typename T>
T* dynamic_shared_memory() {
  return static_cast<T*>(simt::dynamic_shared_memory());
}

#elif defined(__CUDACC__)

// A pointer to global memory that was itself read from memory: unless it is told, the compiler must take it for one
// that may point to shared memory too, and emits generic accesses (LD, ST) instead of LDG and STG.
template <typename T>
__device__ __forceinline__ T* in_global(T* address) {
  __builtin_assume(__isGlobal(address));
  return address;
}

// The block's one object of type T, which nobody has initialised.
template <typename T>
__device__ __forceinline__ T& shared_memory() {
  __shared__ T memory;
  return memory;
}

template <typename T>
__device__ __forceinline__ T* dynamic_shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

#endif

}  // namespace granet::cuda
