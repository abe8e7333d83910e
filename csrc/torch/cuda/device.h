// The device of a tensor: where adaptors launch, and what they check of tensors there.
//
// tests/simt compiles the same adaptors for tensors on the CPU, whose memory its kernels reach.
#pragma once

#include <string>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "cuda/launch.h"
#include "torch/checks.h"

#if defined(GRANET_SIMT)
#define GRANET_CUDA_KEY CPU
#else
#define GRANET_CUDA_KEY CUDA
#endif

namespace granet {

// Throws for what a launcher returns.
inline void check_cuda(cudaError_t error, const char* operation) {
  STD_TORCH_CHECK(error == cudaSuccess, operation, ": ", cudaGetErrorString(error));
}

#if defined(GRANET_SIMT)

inline bool is_on_device(const Tensor& tensor) { return tensor.is_cpu(); }

class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};

#else

inline bool is_on_device(const Tensor& tensor) { return tensor.is_cuda(); }

// Makes the tensor's device the current one, as long as it lives.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

#endif

inline void check_beside(const Tensor& tensor, const Tensor& first, const std::string& argument) {
  STD_TORCH_CHECK(is_on_device(tensor) && tensor.get_device_index() == first.get_device_index(), argument,
                  ": expected a tensor on the device of the first");
}

// A tensor that a kernel walks by one index, together with others of as many elements.
inline void check_dense_beside(const Tensor& tensor, int64_t numel, const Tensor& first, const std::string& argument) {
  check_beside(tensor, first, argument);
  STD_TORCH_CHECK(is_dense(tensor) && tensor.numel() == numel, argument, ": expected a dense tensor with ", numel,
                  " elements, got ", tensor.numel());
}

inline void check_packed_beside(const Tensor& packed, int64_t numel, const Tensor& first, const std::string& argument) {
  check_beside(packed, first, argument);
  STD_TORCH_CHECK(
      packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() && packed.numel() >= packed_bytes(numel),
      argument, ": expected a contiguous uint8 tensor of at least ", packed_bytes(numel), " bytes for ", numel,
      " weights, got ", packed.numel());
}

}  // namespace granet
