// The floating dtypes of weights, gradients and momenta.
#pragma once

#include <cstddef>
#include <cstdint>

namespace granet {

enum class Dtype : uint8_t { kFloat32, kBfloat16, kFloat16, kFloat64 };

constexpr int64_t kDtypes = 4;

constexpr int64_t item_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return 4;
    case Dtype::kFloat64:
      return 8;
    default:
      return 2;
  }
}

}  // namespace granet
