// Floating dtypes on the device: what they are stored as, what they are computed in, and how they are rounded.
#pragma once

#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/dtype.h"
#include "cuda/launch.h"

namespace granet::cuda {

template <Dtype>
struct Stored;
template <>
struct Stored<Dtype::kFloat32> {
  using Type = float;
};
template <>
struct Stored<Dtype::kBfloat16> {
  using Type = __nv_bfloat16;
};
template <>
struct Stored<Dtype::kFloat16> {
  using Type = __half;
};
template <>
struct Stored<Dtype::kFloat64> {
  using Type = double;
};

// fp32, or fp64 where one of them is fp64.
template <typename... T>
using Compute = std::conditional_t<(std::is_same_v<T, double> || ...), double, float>;

template <typename To>
__device__ __forceinline__ To widened(float x) {
  return x;
}
template <typename To>
__device__ __forceinline__ To widened(double x) {
  return static_cast<To>(x);
}
template <typename To>
__device__ __forceinline__ To widened(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <typename To>
__device__ __forceinline__ To widened(__half x) {
  return __half2float(x);
}

// To nearest; fp64 to 16 bits by way of fp32, as torch does.
template <typename To, typename From>
__device__ __forceinline__ To rounded(From x) {
  if constexpr (std::is_same_v<To, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(x));
  } else if constexpr (std::is_same_v<To, __half>) {
    return __float2half_rn(static_cast<float>(x));
  } else {
    return static_cast<To>(x);
  }
}

template <typename To, typename From>
__device__ __forceinline__ To converted(From x) {
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else {
    return rounded<To>(widened<Compute<From>>(x));
  }
}

// +0.0 is all zero bits.
template <typename T>
__device__ __forceinline__ T zero() {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(0.0F);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(0.0F);
  } else {
    return T{0};
  }
}

// One rounding for both.
__device__ __forceinline__ float fused(float x, float y, float z) { return __fmaf_rn(x, y, z); }
__device__ __forceinline__ double fused(double x, double y, double z) { return __fma_rn(x, y, z); }

// call(Stored<dtype>{}) for a dtype that is known only now.
template <typename Call>
cudaError_t with_dtype(Dtype dtype, const Call& call) {
  switch (dtype) {
    case Dtype::kFloat32:
      return call(Stored<Dtype::kFloat32>{});
    case Dtype::kBfloat16:
      return call(Stored<Dtype::kBfloat16>{});
    case Dtype::kFloat16:
      return call(Stored<Dtype::kFloat16>{});
    case Dtype::kFloat64:
      return call(Stored<Dtype::kFloat64>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace granet::cuda
