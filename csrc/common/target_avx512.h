// Compiles what follows for AVX-512 F, BW, DQ, VL. Included first and for the whole file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include <immintrin.h>

#define GRANET_ISA avx512
#define GRANET_VECTOR_BYTES 64

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,bmi,bmi2,popcnt"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,bmi,bmi2,popcnt")
#endif

namespace granet::cpu::avx512 {

constexpr int64_t kVectorBytes = GRANET_VECTOR_BYTES;

}  // namespace granet::cpu::avx512
