// The kernels of stream.h, compiled once for each instruction set.

#include "common/simd.h"
#include "cpu/stream.h"

namespace granet::cpu::GRANET_ISA {

inline void copy_past_caches(const void* source, int64_t bytes, void* target) {
  const auto* from = static_cast<const float*>(source);
  auto* to = static_cast<float*>(target);
  for (int64_t i = 0; i < bytes / static_cast<int64_t>(sizeof(float)); i += kLanes) stream(to + i, load(from + i));
}

constexpr StreamKernels kStreamKernels = {copy_past_caches, drain};

}  // namespace granet::cpu::GRANET_ISA
