// Compiles what follows for AVX-512 F, BW, DQ, VL. Included first and for the whole file.
#pragma once

#include <immintrin.h>  // before the target, because it brings in <stdlib.h>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define GRANET_ISA avx512
#define GRANET_AVX2 1  // with AVX2, FMA and F16C
#define GRANET_AVX512 1

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,bmi,bmi2,popcnt"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,bmi,bmi2,popcnt")
#endif

namespace granet::cpu::avx512 {

constexpr int64_t kVectorBytes = 64;

}  // namespace granet::cpu::avx512
