// The update of torch.optim.SGD on active weights, all tensors in one launch.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cuda/launch.h"
#include "cuda/table.h"

namespace granet::cuda {

constexpr int64_t kSgdChunk = 8192;

// A hyperparameter: a number, or where it lies on the device, in the dtype that is computed in.
struct SgdScalar {
  double number = 0;
  const void* address = nullptr;
};

struct SgdOptions {
  SgdScalar lr;
  double momentum = 0;  // 0: there are no momenta
  double dampening = 0;
  double weight_decay = 0;
  SgdScalar grad_scale{.number = 1};
  const float* found_inf = nullptr;  // on the device; nothing changes where it is not zero
  bool nesterov = false;
  bool maximize = false;
  bool first = false;
  bool is_averaged = false;  // there is a list of averages
  double average_decay = 0;
};

// What SgdScalar points to: fp32, or fp64 where one of them is fp64.
constexpr Dtype sgd_compute_dtype(Dtype param, Dtype momentum) {
  const bool is_double = param == Dtype::kFloat64 || momentum == Dtype::kFloat64;
  return is_double ? Dtype::kFloat64 : Dtype::kFloat32;
}

// g = +-grad / grad_scale + weight_decay w;  v = momentum v + (1 - dampening) g;  w = w - lr (g + momentum v  or  v).
//
// On the first step v = g. Computed in fp32 (fp64 where a tensor is fp64), rounded once. With averages, then
// average += (1 - average_decay) (w - average), of w as it is stored. Inactive weights, momenta and averages keep their
// bits; vectors of 16 bytes without an active weight are neither read nor written. Lists: param, grad, mask, momenta
// where there is momentum, and averages, fp32 (fp64 of fp64 parameters), where there are any; gradients have their
// parameter's dtype.
cudaError_t launch_masked_sgd(const Table& tensors, Dtype param, Dtype momentum, const SgdOptions& options,
                              cudaStream_t stream);

}  // namespace granet::cuda
