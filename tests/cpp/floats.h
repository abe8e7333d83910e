// bf16 and fp16 for the C++ tests, by their definitions and in double: slow, obvious, apart from the kernels' code.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/dtype.h"

namespace granet::cpu {

struct Format {
  int fraction_bits;
  int min_exponent;  // of a normal number
  int max_exponent;
};
constexpr Format kBfloat16Format = {7, -126, 127};
constexpr Format kFloat16Format = {10, -14, 15};

inline double decode16(uint16_t bits, Format format) {
  const int fraction = bits & ((1 << format.fraction_bits) - 1);
  const int exponent = (bits & 0x7fff) >> format.fraction_bits;
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  if (exponent == format.max_exponent - format.min_exponent + 2) {
    return fraction != 0 ? std::nan("") : sign * HUGE_VAL;
  }
  const int scale = format.min_exponent - format.fraction_bits;
  if (exponent == 0) return sign * std::ldexp(fraction, scale);
  return sign * std::ldexp(fraction + (1 << format.fraction_bits), scale + exponent - 1);
}

// To nearest, ties to even, of an fp32 number that is not NaN.
inline uint16_t encode16(float number, Format format) {
  const auto sign = static_cast<uint16_t>(std::signbit(number) ? 0x8000 : 0);
  const double magnitude = std::fabs(static_cast<double>(number));
  const int infinite = (format.max_exponent - format.min_exponent + 2) << format.fraction_bits;
  if (std::isinf(number)) return static_cast<uint16_t>(sign | infinite);
  if (number == 0) return sign;
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  exponent = std::max(exponent - 1, format.min_exponent);
  const double units = std::nearbyint(std::ldexp(magnitude, format.fraction_bits - exponent));
  const int offset = (exponent - format.min_exponent) << format.fraction_bits;  // a carry moves into the exponent
  return static_cast<uint16_t>(sign | std::min(offset + static_cast<int>(units), infinite));
}

// The number behind the bits at `address`, and the bits of a number that was computed in fp32 (fp64 for fp64).
inline double load(const void* address, Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return *static_cast<const float*>(address);
    case Dtype::kFloat64:
      return *static_cast<const double*>(address);
    default:
      return decode16(*static_cast<const uint16_t*>(address),
                      dtype == Dtype::kBfloat16 ? kBfloat16Format : kFloat16Format);
  }
}

inline void store(void* address, double number, Dtype dtype) {
  const auto single = static_cast<float>(number);
  switch (dtype) {
    case Dtype::kFloat32:
      *static_cast<float*>(address) = single;
      break;
    case Dtype::kFloat64:
      *static_cast<double*>(address) = number;
      break;
    default:
      *static_cast<uint16_t*>(address) = encode16(single, dtype == Dtype::kBfloat16 ? kBfloat16Format : kFloat16Format);
  }
}

}  // namespace granet::cpu
