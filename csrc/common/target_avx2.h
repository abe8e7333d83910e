// Compiles what follows for AVX2, FMA, F16C. Included first and for the whole file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include <immintrin.h>

#define GRANET_ISA avx2
#define GRANET_VECTOR_BYTES 32

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")
#endif

namespace granet::cpu::avx2 {

constexpr int64_t kVectorBytes = GRANET_VECTOR_BYTES;

}  // namespace granet::cpu::avx2
