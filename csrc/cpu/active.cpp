#include "cpu/active.h"

#include "common/bfloat16.h"

namespace granet::cpu {
namespace {

constexpr int64_t kGathered = 16384;           // values that a thread takes at once
constexpr int64_t kSpread = int64_t{1} << 16;  // weights that are cleared, and then written, while in the cache

template <typename Type, typename Convert>
void spread_as(const Convert& convert, const float* values, const int32_t* positions, int64_t count, void* gradient,
               int64_t weights, const Parallel& parallel) {
  auto* target = static_cast<Type*>(gradient);
  parallel.for_each(ceil_div(weights, kSpread), [&](int64_t piece) {
    const int64_t first = piece * kSpread;
    const int64_t end = std::min(weights, first + kSpread);
    std::memset(target + first, 0, static_cast<size_t>(end - first) * sizeof(Type));
    int64_t i = std::lower_bound(positions, positions + count, first) - positions;
    for (; i < count && positions[i] < end; ++i) target[positions[i]] = convert(values[i]);
  });
}

}  // namespace

int64_t count_weights(const uint8_t* mask, int64_t weights) {
  int64_t active = 0;
  for_each_active(mask, weights, [&](int64_t) { ++active; });
  return active;
}

void list_active(const uint8_t* mask, int64_t weights, int32_t* positions) {
  for_each_active(mask, weights, [&](int64_t weight) { *positions++ = static_cast<int32_t>(weight); });
}

void gather(const void* source, Element element, const int32_t* at, int64_t count, bool to_bfloat16, float* values,
            const Parallel& parallel) {
  parallel.for_each(ceil_div(count, kGathered), [&](int64_t chunk) {
    const int64_t first = chunk * kGathered;
    const int64_t end = std::min(count, first + kGathered);
    if (element == Element::kBFloat16) {
      for (int64_t i = first; i < end; ++i) values[i] = bfloat16_to_float(static_cast<const uint16_t*>(source)[at[i]]);
      return;
    }
    for (int64_t i = first; i < end; ++i) values[i] = static_cast<const float*>(source)[at[i]];
    for (int64_t i = first; i < end && to_bfloat16; ++i) values[i] = round_to_bfloat16(values[i]);
  });
}

void spread(const float* values, const int32_t* positions, int64_t count, void* gradient, Element element,
            int64_t weights, const Parallel& parallel) {
  if (element == Element::kBFloat16) {
    return spread_as<uint16_t>(float_to_bfloat16, values, positions, count, gradient, weights, parallel);
  }
  spread_as<float>([](float value) { return value; }, values, positions, count, gradient, weights, parallel);
}

}  // namespace granet::cpu
