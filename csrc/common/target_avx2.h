// Compiles what follows for AVX2, FMA, F16C. Included first and for the whole file.
#pragma once

#include <immintrin.h>  // before the target, because it brings in <stdlib.h>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define GRANET_ISA avx2
#define GRANET_AVX2 1  // with AVX2, FMA and F16C
#define GRANET_AVX512 0

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")
#endif

namespace granet::cpu::avx2 {

constexpr int64_t kVectorBytes = 32;

}  // namespace granet::cpu::avx2
