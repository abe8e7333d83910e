// Copies that go past the caches, into memory that nobody reads soon.
#pragma once

#include <cstdint>

namespace granet::cpu {

// Both addresses and the number of bytes are multiples of kStreamBytes.
constexpr int64_t kStreamBytes = 64;

struct StreamKernels {
  void (*copy)(const void* source, int64_t bytes, void* target);
  void (*drain)();  // before another thread may read what was copied
};
extern const StreamKernels stream_kernels_portable;
extern const StreamKernels stream_kernels_avx2;
extern const StreamKernels stream_kernels_avx512;

}  // namespace granet::cpu
