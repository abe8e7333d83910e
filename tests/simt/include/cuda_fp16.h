// IEEE half precision as CUDA names it.
#pragma once

#include <bit>
#include <cmath>

struct __half {
  unsigned short bits;
};

inline float __half2float(__half x) {
  const unsigned sign = (x.bits & 0x8000U) << 16, magnitude = x.bits & 0x7fffU;
  float value;
  if (magnitude >= 0x7c00U) {
    value = std::bit_cast<float>(0x7f800000U | (magnitude & 0x3ffU) << 13);  // infinity or NaN
  } else {
    value = std::bit_cast<float>(magnitude << 13) * 0x1p112F;  // exact, of subnormal numbers too
  }
  return std::bit_cast<float>(std::bit_cast<unsigned>(value) | sign);
}

// To nearest, ties to even. A NaN keeps its sign and upper bits, as PyTorch's on the CPU; CUDA has but one, 0x7fff.
inline __half __float2half_rn(float x) {
  const auto bits = std::bit_cast<unsigned>(x);
  const auto sign = static_cast<unsigned short>(bits >> 16 & 0x8000U);
  const unsigned magnitude = bits & 0x7fffffffU;
  unsigned result;
  if (magnitude > 0x7f800000U) {
    result = 0x7e00U | (magnitude >> 13 & 0x3ffU);
  } else if (magnitude >= 0x477ff000U) {  // 65520 and more
    result = 0x7c00U;
  } else if (magnitude < 0x38800000U) {  // below 2^-14: a multiple of 2^-24
    result = static_cast<unsigned>(std::nearbyint(std::bit_cast<float>(magnitude) * 0x1p24F));
  } else {
    result = (magnitude - 0x38000000U + 0xfffU + (magnitude >> 13 & 1)) >> 13;
  }
  return {static_cast<unsigned short>(result | sign)};
}
