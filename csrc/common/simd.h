// Vectors for the kernels that are compiled once for each instruction set.
//
// The including file sets the instruction set first (common/target_*.h), which names the namespace GRANET_ISA and the
// width kVectorBytes. The vectors are the compiler's own (GCC and Clang): +, *, comparisons and the like work lane by
// lane and compile to whatever the target has; only what has no operator is a function here.
//
// Include no other header behind this one: an inline function of the standard library that is first seen under a wider
// target could be the copy that the linker keeps for everyone.
#pragma once

#ifndef GRANET_ISA
#error "include common/target_portable.h, target_avx2.h or target_avx512.h first"
#endif

namespace granet::cpu::GRANET_ISA {

constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(float));

using Floats = float __attribute__((vector_size(kVectorBytes)));
using Ints = int32_t __attribute__((vector_size(kVectorBytes)));

inline Floats load(const float* address) {
  Floats vector;
  __builtin_memcpy(&vector, address, sizeof vector);  // unaligned
  return vector;
}

// The same, loaded into a register for several uses: the compiler would load it again for each, as an operand.
inline Floats in_register(Floats vector) {
#if GRANET_AVX2
  asm("" : "+v"(vector));
#endif
  return vector;
}

inline void store(float* address, Floats vector) { __builtin_memcpy(address, &vector, sizeof vector); }

// Past the caches, to an address that is a multiple of a vector's size; see drain().
inline void stream(float* address, Floats vector) {
#if GRANET_AVX512
  _mm512_stream_ps(address, __m512(vector));
#elif GRANET_AVX2
  _mm256_stream_ps(address, __m256(vector));
#else
  store(address, vector);
#endif
}

// Before another thread may read what was streamed.
inline void drain() {
#if GRANET_AVX512 || GRANET_AVX2
  _mm_sfence();
#endif
}

inline Floats broadcast(float value) { return value - Floats{}; }  // value - 0 is value, -0.0 included

// a * b + c, rounded once where the target can, else twice.
inline Floats fma(Floats a, Floats b, Floats c) {
#if GRANET_AVX512
  return Floats(_mm512_fmadd_ps(a, b, c));
#elif GRANET_AVX2
  return Floats(_mm256_fmadd_ps(a, b, c));
#else
  return a * b + c;
#endif
}

using Four = float __attribute__((vector_size(16)));

inline Four load_four(const float* address) {
  Four vector;
  __builtin_memcpy(&vector, address, sizeof vector);
  return vector;
}

inline void store_four(float* address, Four vector) { __builtin_memcpy(address, &vector, sizeof vector); }

// The sums of the lanes of four vectors, always in the same order.
inline Four sums_of_lanes(Floats a, Floats b, Floats c, Floats d) {
  constexpr int64_t kFours = kLanes / 4;
  Four rows[4] = {};
  const Floats vectors[4] = {a, b, c, d};
  for (int v = 0; v < 4; ++v) {
    Four parts[kFours];
    __builtin_memcpy(parts, &vectors[v], sizeof parts);
    rows[v] = parts[0];
    for (int64_t i = 1; i < kFours; ++i) rows[v] += parts[i];
  }
  const Four ab_low = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5);
  const Four ab_high = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7);
  const Four cd_low = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5);
  const Four cd_high = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
  const Four ab = ab_low + ab_high;  // a02 b02 a13 b13
  const Four cd = cd_low + cd_high;
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

}  // namespace granet::cpu::GRANET_ISA
