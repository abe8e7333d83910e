// Compiles what follows for the baseline of the architecture: SSE2, NEON. Included first and for the whole file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define GRANET_ISA portable
#define GRANET_VECTOR_BYTES 16

namespace granet::cpu::portable {

constexpr int64_t kVectorBytes = GRANET_VECTOR_BYTES;

}  // namespace granet::cpu::portable
