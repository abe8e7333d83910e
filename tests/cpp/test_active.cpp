// Tests of csrc/cpu/active.h: gradients written by a mask, and weights read by it. Behind what is written lies what
// must stay.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#include "common/bfloat16.h"
#include "common/bits.h"
#include "cpu/active.h"
#include "sanitizers.h"
#include "threads.h"

namespace {

using namespace granet;
using namespace granet::cpu;
using Floats = std::vector<float>;

int failures = 0;
std::mt19937 generator(0);

bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// Gradients on both sides of the size from which they are written past the caches, aligned or not.
template <typename Type>
void check_spread(Element element, int64_t weights, double density, int64_t offset, const Parallel& parallel) {
  std::vector<uint8_t> mask(static_cast<size_t>(mask_bytes(weights)));
  std::vector<int32_t> positions;
  Floats values;
  std::vector<Type> expected(static_cast<size_t>(weights));
  std::bernoulli_distribution active(density);
  for (int64_t i = 0; i < weights; ++i) {
    if (!active(generator)) continue;
    mask[static_cast<size_t>(i / 8)] |= static_cast<uint8_t>(1 << i % 8);
    positions.push_back(static_cast<int32_t>(i));
    values.push_back(i % 97 == 0 ? NAN : 1 + static_cast<float>(i) / 1000);
    if constexpr (std::is_same_v<Type, float>) {
      expected[static_cast<size_t>(i)] = values.back();
    } else {
      expected[static_cast<size_t>(i)] = float_to_bfloat16(values.back());
    }
  }
  std::vector<Type> memory(static_cast<size_t>(weights + 64 + offset), Type{7});
  void* start = memory.data();
  size_t space = memory.size() * sizeof(Type);
  auto* target = static_cast<Type*>(std::align(64, expected.size() * sizeof(Type), start, space)) + offset;
  const auto count = static_cast<int64_t>(positions.size());
  spread(values.data(), {mask.data(), weights, positions.data(), count}, target, element, parallel);
  const bool is_right = std::memcmp(target, expected.data(), expected.size() * sizeof(Type)) == 0;
  if (!is_right || target[weights] != Type{7}) {
    ++failures;
    std::printf("FAILED: spread of %lld weights, offset %lld\n", static_cast<long long>(weights),
                static_cast<long long>(offset));
  }
  // And back: in positions that rise, fetched ahead or not.
  for (float& value : values) value = element == Element::kFloat32 ? value : round_to_bfloat16(value);
  for (const bool rising : {true, false}) {
    Floats back(values.size());
    gather(target, element, {positions.data(), count, rising}, false, back.data(), parallel);
    if (same_bits(back, values)) continue;
    ++failures;
    std::printf("FAILED: gather of %lld values\n", static_cast<long long>(count));
  }
}

void test_spread_and_gather() {
  constexpr int64_t kLarge = int64_t{1} << 20;  // floats
  for (const int64_t weights : {int64_t{1}, int64_t{1000}, kLarge - 1, kLarge, kLarge + 65537}) {
    for (const double density : {0.0, 0.03, 0.5, 1.0}) {
      if (kAnySanitizer && weights > 1000 && density == 0.03) continue;  // to draw masks takes most of the time
      for (const int64_t offset : {0, 1}) {
        check_spread<float>(Element::kFloat32, weights, density, offset,
                            StdThreads(kThreadSanitizer ? 3 : 1 + weights % 3));
        check_spread<uint16_t>(Element::kBFloat16, 2 * weights, density, offset,
                               StdThreads(kThreadSanitizer ? 2 : 1 + offset));
      }
    }
  }
}

// A mask with more bits than there are values, as only a wrong call has: none behind the last is read.
template <typename Type>
void test_spread_of_too_few_values(Element element, Type one) {
  constexpr int64_t kWeights = 256;
  const std::vector<uint8_t> mask(static_cast<size_t>(mask_bytes(kWeights)), kAllActive);
  for (int64_t count = 0; count < kWeights; ++count) {
    const Floats values(static_cast<size_t>(count), 1.0f);
    std::vector<int32_t> positions(values.size());
    for (int64_t i = 0; i < count; ++i) positions[static_cast<size_t>(i)] = static_cast<int32_t>(i);
    std::vector<Type> gradient(kWeights, Type{7}), expected(kWeights);
    std::fill_n(expected.begin(), count, one);
    spread(values.data(), {mask.data(), kWeights, positions.data(), count}, gradient.data(), element, Serial());
    if (gradient == expected) continue;
    ++failures;
    std::printf("FAILED: spread of %lld values over more bits\n", static_cast<long long>(count));
  }
}

}  // namespace

int main() {
  test_spread_and_gather();
  test_spread_of_too_few_values<float>(Element::kFloat32, 1.0f);
  test_spread_of_too_few_values<uint16_t>(Element::kBFloat16, float_to_bfloat16(1.0f));
  if (failures == 0) std::printf("active: all passed\n");
  return failures == 0 ? 0 : 1;
}
