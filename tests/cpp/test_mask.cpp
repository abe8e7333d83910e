// Tests of csrc/common/bits.h and csrc/cpu/mask.h that need neither torch nor Python. Buffers have exactly the sizes
// that the contracts name, so that a sanitizer sees the first byte read or written beyond them.
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <random>
#include <vector>

#include "common/bits.h"
#include "cpu/mask.h"

namespace {

using namespace granet;
using Bytes = std::vector<uint8_t>;

int failures = 0;

void expect(bool holds, const char* what, int64_t numel) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s, numel = %lld\n", what, static_cast<long long>(numel));
}

size_t size(int64_t numel) { return static_cast<size_t>(numel); }

Bytes random_mask(int64_t numel, double active) {
  std::mt19937_64 generator(size(numel));
  std::bernoulli_distribution draw(active);
  Bytes mask(size(numel));
  for (uint8_t& weight : mask) weight = draw(generator);
  return mask;
}

// The definition, one bit at a time.
Bytes pack(const Bytes& mask) {
  Bytes packed((mask.size() + 7) / 8);
  for (size_t i = 0; i < mask.size(); ++i) packed[i >> 3] |= static_cast<uint8_t>((mask[i] != 0) << (i & 7));
  return packed;
}

int64_t count(const Bytes& mask) {
  int64_t active = 0;
  for (const uint8_t weight : mask) active += weight;
  return active;
}

void test_bits() {
  static_assert(ceil_div(0, 8) == 0 && ceil_div(1, 8) == 1 && ceil_div(8, 8) == 1 && ceil_div(9, 8) == 2);
  static_assert(packed_bytes(0) == 0 && packed_bytes(1) == 16 && packed_bytes(128) == 16 && packed_bytes(129) == 32);
  static_assert(packed_bytes(int64_t{1} << 40) == int64_t{1} << 37);
  static_assert(nonzero_bytes(0xff80'7f01'0200'0040) == 0x0101'0101'0100'0001);
  static_assert(scatter_bits(0b1001'0001) == 0x0100'0001'0000'0001);
  static_assert(sum_of_bytes(~uint64_t{0}) == 8 * 255);
  for (int bits = 0; bits < 256; ++bits) {
    const auto byte = static_cast<uint8_t>(bits);
    expect(gather_bits(scatter_bits(byte)) == byte, "gather_bits undoes scatter_bits", bits);
    expect(sum_of_bytes(popcount_of_bytes(byte * kOneInEachByte)) == 8 * std::popcount(byte), "popcount", bits);
  }
}

void test_pack_by_hand() {
  const Bytes mask = {1, 0, 0, 0, 1, 0, 0, 1, 0, 2};  // any byte that is not zero counts as true
  Bytes packed(2, 0xaa);
  cpu::pack_mask(mask.data(), 10, packed.data());
  expect(packed == Bytes{0b1001'0001, 0b10}, "pack_mask by hand", 10);
}

void test_round_trip(int64_t numel, double active) {
  const Bytes mask = random_mask(numel, active);
  Bytes packed(size(mask_bytes(numel)), 0xaa);
  Bytes unpacked(size(numel), 0xaa);
  cpu::pack_mask(mask.data(), numel, packed.data());
  cpu::unpack_mask(packed.data(), numel, unpacked.data());
  expect(packed == pack(mask), "pack_mask", numel);
  expect(unpacked == mask, "unpack_mask", numel);
  expect(cpu::count_active(packed.data(), mask_bytes(numel)) == count(mask), "count_active", numel);
}

template <typename Bits>
void test_zero_inactive(int64_t numel, double active) {
  const Bytes mask = random_mask(numel, active);
  const Bytes packed = pack(mask);
  std::vector<Bits> weight(size(numel));
  for (size_t i = 0; i < weight.size(); ++i) weight[i] = static_cast<Bits>(~i);
  std::vector<Bits> expected = weight;
  for (size_t i = 0; i < mask.size(); ++i) {
    if (mask[i] == 0) expected[i] = 0;
  }
  expect(cpu::zero_inactive(weight.data(), sizeof(Bits), packed.data(), numel), "zero_inactive's item size", numel);
  expect(weight == expected, "zero_inactive", numel);
}

void test_other_item_sizes_are_refused() {
  const Bytes packed = {0};
  for (const size_t item_size : {0, 3, 16}) {
    Bytes weight(16, 1);
    expect(!cpu::zero_inactive(weight.data(), item_size, packed.data(), 1), "item size refused", 1);
    expect(weight == Bytes(16, 1), "nothing written", 1);
  }
}

}  // namespace

int main() {
  test_bits();
  test_pack_by_hand();
  test_other_item_sizes_are_refused();
  // Below, at and above a group of eight, a word, a mask's padding, and count_active's run of 31 words (1984 weights).
  for (const int64_t numel : {0, 1, 7, 8, 9, 31, 33, 63, 64, 65, 127, 128, 129, 1009, 1983, 1984, 1985, 100'003}) {
    for (const double active : {0.0, 0.1, 0.5, 0.97, 1.0}) {
      test_round_trip(numel, active);
      test_zero_inactive<uint8_t>(numel, active);
      test_zero_inactive<uint16_t>(numel, active);
      test_zero_inactive<uint32_t>(numel, active);
      test_zero_inactive<uint64_t>(numel, active);
    }
  }
  if (failures == 0) std::puts("all passed");
  return failures == 0 ? 0 : 1;
}
