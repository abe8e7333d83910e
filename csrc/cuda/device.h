// What launchers ask of the device they launch on.
#pragma once

#include <algorithm>

#include "cuda/launch.h"

namespace granet::cuda {

// As many blocks as the current device runs at once, or fewer where there is less to do: each then takes several chunks
// in turn. Asked at every launch, because processes have several devices; the runtime answers from memory.
template <typename Kernel>
cudaError_t resident_blocks(Kernel kernel, int threads, int64_t chunks, int64_t* blocks) {
  int device = 0, processors = 0, on_each = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&on_each, kernel, threads, 0);
  *blocks = std::min(chunks, static_cast<int64_t>(processors) * on_each);
  return error;
}

// Launch with that many blocks. The kernel goes from chunk blockIdx.x on in steps of gridDim.x.
template <typename... Params, typename... Args>
cudaError_t launch_resident(void (*kernel)(Params...), int threads, int64_t chunks, cudaStream_t stream,
                            const Args&... args) {
  if (chunks == 0) return cudaSuccess;
  int64_t blocks = 0;
  const cudaError_t error = resident_blocks(kernel, threads, chunks, &blocks);
  if (error != cudaSuccess) return error;
  return launch(kernel, {.blocks = blocks, .threads = threads, .stream = stream}, args...);
}

}  // namespace granet::cuda
