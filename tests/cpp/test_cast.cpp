// Tests of csrc/cpu/cast.h against the definition of each dtype. Buffers have exactly the sizes that the contract
// names.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "common/bits.h"
#include "cpu/cast.h"
#include "floats.h"

namespace {

using namespace granet;
using namespace granet::cpu;
using Bytes = std::vector<std::byte>;

constexpr Dtype kAll[] = {Dtype::kFloat32, Dtype::kBfloat16, Dtype::kFloat16, Dtype::kFloat64};

int failures = 0;

void expect(bool holds, const char* what, Dtype from, Dtype to, int64_t numel) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s, from dtype %d to %d, numel = %lld\n", what, static_cast<int>(from), static_cast<int>(to),
              static_cast<long long>(numel));
}

size_t bytes(int64_t numel, Dtype dtype) { return static_cast<size_t>(numel * item_size(dtype)); }

Bytes cast(const Bytes& from, Dtype from_dtype, const std::vector<uint8_t>& mask, Dtype to_dtype) {
  const int64_t numel = static_cast<int64_t>(from.size()) / item_size(from_dtype);
  Bytes to(bytes(numel, to_dtype), std::byte{0xaa});
  mask_cast(from.data(), from_dtype, mask.data(), numel, to.data(), to_dtype);
  return to;
}

std::vector<uint8_t> full(int64_t numel) { return std::vector<uint8_t>(static_cast<size_t>(mask_bytes(numel)), 0xff); }

// Any bits but NaN's, whose payload is no part of the definition.
Bytes random_numbers(int64_t numel, Dtype dtype, std::mt19937_64& generator) {
  Bytes numbers(bytes(numel, dtype));
  const auto size = static_cast<size_t>(item_size(dtype));
  for (size_t at = 0; at < numbers.size(); at += size) {
    do {
      const uint64_t bits = generator();
      std::memcpy(&numbers[at], &bits, size);
    } while (std::isnan(load(&numbers[at], dtype)));
    // Half of the numbers lie where fp16 has its subnormals, its normals and its overflow.
    if (generator() % 2 == 0) {
      const double fraction = 1 + std::ldexp(static_cast<double>(generator() >> 12), -52);
      store(&numbers[at], std::ldexp(fraction, static_cast<int>(generator() % 50) - 30), dtype);
    }
  }
  return numbers;
}

void test_pair(int64_t numel, Dtype from_dtype, Dtype to_dtype) {
  std::mt19937_64 generator(static_cast<size_t>(numel));
  const Bytes from = random_numbers(numel, from_dtype, generator);
  std::vector<uint8_t> mask(static_cast<size_t>(mask_bytes(numel)));
  for (uint8_t& bits : mask) bits = static_cast<uint8_t>(generator());
  Bytes expected(bytes(numel, to_dtype));
  for (int64_t i = 0; i < numel; ++i) {
    if (!is_active(mask[static_cast<size_t>(i / 8)], i)) continue;
    store(&expected[bytes(i, to_dtype)], load(&from[bytes(i, from_dtype)], from_dtype), to_dtype);
  }
  expect(cast(from, from_dtype, mask, to_dtype) == expected, "mask_cast", from_dtype, to_dtype, numel);
}

// Every one of the 65 536 patterns through fp32 and back.
void test_all_16_bit_patterns(Dtype dtype) {
  constexpr int64_t kPatterns = 65'536;
  Bytes from(bytes(kPatterns, dtype));
  for (int i = 0; i < kPatterns; ++i) {
    const auto bits = static_cast<uint16_t>(i);
    std::memcpy(&from[2 * static_cast<size_t>(i)], &bits, 2);
  }
  const Bytes wide = cast(from, dtype, full(kPatterns), Dtype::kFloat32);
  const Bytes back = cast(wide, Dtype::kFloat32, full(kPatterns), dtype);
  for (int64_t i = 0; i < kPatterns; ++i) {
    const double want = load(&from[bytes(i, dtype)], dtype);
    const double got = load(&wide[bytes(i, Dtype::kFloat32)], Dtype::kFloat32);
    const double again = load(&back[bytes(i, dtype)], dtype);
    const bool equal = std::isnan(want) ? std::isnan(got) && std::isnan(again) : want == got && want == again;
    expect(equal && std::signbit(want) == std::signbit(again), "a 16-bit pattern", dtype, Dtype::kFloat32, i);
  }
  expect(cast(from, dtype, full(kPatterns), dtype) == from, "equal dtypes copy bits", dtype, dtype, kPatterns);
}

void test_nan_stays_nan(Dtype from_dtype, Dtype to_dtype) {
  if (from_dtype == to_dtype) return;
  Bytes from(bytes(16, from_dtype));
  for (int64_t i = 0; i < 16; ++i) {
    std::byte* last = &from[bytes(i + 1, from_dtype)] - 2;  // the sign, the exponent and the head of the fraction
    const uint16_t quiet = from_dtype == Dtype::kFloat16 ? 0x7e00 : from_dtype == Dtype::kFloat64 ? 0x7ff8 : 0x7fc0;
    std::memcpy(last, &quiet, 2);
  }
  const Bytes to = cast(from, from_dtype, full(16), to_dtype);
  for (int64_t i = 0; i < 16; ++i) {
    expect(std::isnan(load(&to[bytes(i, to_dtype)], to_dtype)), "NaN stays NaN", from_dtype, to_dtype, i);
  }
}

}  // namespace

int main() {
  for (const Dtype from : kAll) {
    for (const Dtype to : kAll) {
      for (const int64_t numel : {0, 1, 7, 8, 9, 31, 33, 127, 128, 129, 20'001}) test_pair(numel, from, to);
      test_nan_stays_nan(from, to);
    }
  }
  test_all_16_bit_patterns(Dtype::kBfloat16);
  test_all_16_bit_patterns(Dtype::kFloat16);
  if (failures == 0) std::puts("all passed");
  return failures == 0 ? 0 : 1;
}
