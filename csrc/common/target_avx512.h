// Compiles what follows for AVX-512 F, BW, DQ, VL. Included first and for the whole file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define GRANET_ISA avx512

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,bmi,bmi2,popcnt"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,bmi,bmi2,popcnt")
#endif

namespace granet::cpu::avx512 {

constexpr int64_t kVectorBytes = 64;

}  // namespace granet::cpu::avx512
