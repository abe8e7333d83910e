// The masked cast of whole groups of eight weights, for each pair of dtypes.
#pragma once

#include "common/dtype.h"
#include "common/simd_dtypes.h"

namespace granet::cpu {

// Group g is weights [8g, 8g + 8), active where the bits of mask[g] are set.
using CastKernel = void (*)(const void* from, const uint8_t* mask, int64_t groups, void* to);

namespace GRANET_ISA {

template <typename From, typename To>
void cast_groups(const void* from, const uint8_t* mask, int64_t groups, void* to) {
  using Widest = Bits<Larger<Compute<From>, Compute<To>>>;
  constexpr int64_t n = kLanesOf<Widest>;
  for (int64_t i = 0; i < groups * kMaxLanes; i += n) {
    const auto words = load_bits<n>(static_cast<const From*>(from) + i);
    const auto active = lanes_where<Bits<To>, n>(static_cast<uint32_t>(mask[i / kMaxLanes] >> (i % kMaxLanes)));
    if constexpr (kSame<From, To>) {
      store_bits<n>(static_cast<To*>(to) + i, words & active);
    } else {
      const auto numbers = convert<Compute<To>, n, Compute<From>>(Coding<From, n>::decode(words));
      store_bits<n>(static_cast<To*>(to) + i, Coding<To, n>::encode(numbers) & active);
    }
  }
}

template <typename From>
CastKernel cast_kernel_from(Dtype to) {
  switch (to) {
    case Dtype::kFloat32:
      return cast_groups<From, float>;
    case Dtype::kBfloat16:
      return cast_groups<From, Bfloat16>;
    case Dtype::kFloat16:
      return cast_groups<From, Float16>;
    default:
      return cast_groups<From, double>;
  }
}

inline CastKernel cast_kernel_of_pair(Dtype from, Dtype to) {
  switch (from) {
    case Dtype::kFloat32:
      return cast_kernel_from<float>(to);
    case Dtype::kBfloat16:
      return cast_kernel_from<Bfloat16>(to);
    case Dtype::kFloat16:
      return cast_kernel_from<Float16>(to);
    default:
      return cast_kernel_from<double>(to);
  }
}

}  // namespace GRANET_ISA
}  // namespace granet::cpu
