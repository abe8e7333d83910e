// Compiles what follows for the baseline of the architecture: SSE2, NEON. Included first and for the whole file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define GRANET_ISA portable
#define GRANET_AVX2 0
#define GRANET_AVX512 0

namespace granet::cpu::portable {

constexpr int64_t kVectorBytes = 16;

}  // namespace granet::cpu::portable
