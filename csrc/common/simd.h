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

inline void store(float* address, Floats vector) { __builtin_memcpy(address, &vector, sizeof vector); }

inline Floats broadcast(float value) { return value - Floats{}; }  // value - 0 is value, -0.0 included

}  // namespace granet::cpu::GRANET_ISA
