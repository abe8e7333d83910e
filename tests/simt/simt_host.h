// The runtime's functions that launchers and the example call: a device whose memory is the host's.
#pragma once

#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>

#include "engine.h"

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2 };
using cudaStream_t = struct CUstream_st*;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };

struct dim3 {
  unsigned x;                               // the others are 1
  constexpr dim3(unsigned x = 1) : x(x) {}  // NOLINT: as CUDA's
};

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  return error == cudaErrorInvalidValue ? "invalid argument" : "out of memory";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// Few, so that a block has more than one chunk.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 2;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

template <typename T>
cudaError_t cudaMalloc(T** memory, size_t bytes) {
  *memory = static_cast<T*>(std::malloc(bytes));
  return *memory == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
inline cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* memory, int byte, size_t bytes, cudaStream_t) {
  std::memset(memory, byte, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  // For tests of what is done otherwise during a capture; nothing is captured.
  const bool pretends = std::getenv("GRANET_SIMT_CAPTURES") != nullptr;
  *status = pretends ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  if (config->gridDim.x == 0 || config->gridDim.x > simt::kMostBlocks || config->blockDim.x == 0 ||
      config->blockDim.x > simt::kMostThreads || config->dynamicSmemBytes > simt::kMostShared) {
    return cudaErrorInvalidValue;
  }
  struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> arguments;
  };
  static_assert((sizeof(Params) + ... + 0) <= 4096, "a kernel takes at most 4 KiB of arguments");
  const Call call = {kernel, {std::forward<Args>(args)...}};
  simt::run({.blocks = config->gridDim.x,
             .threads = config->blockDim.x,
             .dynamic_shared = config->dynamicSmemBytes,
             .body =
                 [](const void* data) {
                   const auto* call = static_cast<const Call*>(data);
                   std::apply(call->kernel, call->arguments);
                 },
             .arguments = &call});
  return cudaSuccess;
}
