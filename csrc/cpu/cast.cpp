#include "cpu/cast.h"

#include <array>
#include <cstddef>
#include <cstring>

#include "common/bits.h"
#include "common/isa.h"

namespace granet::cpu {

using CastKernel = void (*)(const void* from, const uint8_t* mask, int64_t groups, void* to);

namespace portable {
CastKernel cast_kernel(Dtype from, Dtype to);
}
namespace avx2 {
CastKernel cast_kernel(Dtype from, Dtype to);
}

namespace {

CastKernel cast_kernel(Dtype from, Dtype to) {
  // eight lanes fill an AVX2 register, and memory is the bound: AVX-512 would add nothing
  return GRANET_FOR_ISA(portable::cast_kernel, avx2::cast_kernel, avx2::cast_kernel)(from, to);
}

}  // namespace

void mask_cast(const void* from, Dtype from_dtype, const uint8_t* mask, int64_t numel, void* to, Dtype to_dtype) {
  const CastKernel kernel = cast_kernel(from_dtype, to_dtype);
  const int64_t groups = numel / kWeightsPerByte;
  kernel(from, mask, groups, to);
  const int64_t done = groups * kWeightsPerByte;
  if (done == numel) return;
  std::array<std::byte, kWeightsPerByte * sizeof(double)> head{}, result{};  // fewer than eight weights, filled up
  const auto count = static_cast<size_t>(numel - done);
  const auto from_size = static_cast<size_t>(item_size(from_dtype)), to_size = static_cast<size_t>(item_size(to_dtype));
  std::memcpy(head.data(), static_cast<const std::byte*>(from) + static_cast<size_t>(done) * from_size,
              count * from_size);
  kernel(head.data(), mask + groups, 1, result.data());
  std::memcpy(static_cast<std::byte*>(to) + static_cast<size_t>(done) * to_size, result.data(), count * to_size);
}

}  // namespace granet::cpu
