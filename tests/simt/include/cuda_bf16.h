// bfloat16 as CUDA names it.
#pragma once

#include "common/bfloat16.h"

struct __nv_bfloat16 {
  unsigned short bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return granet::bfloat16_to_float(x.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {granet::float_to_bfloat16(x)}; }
