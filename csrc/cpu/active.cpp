#include "cpu/active.h"

#include <algorithm>

#include "common/bfloat16.h"
#include "common/isa.h"
#include "common/prefetch.h"
#include "cpu/active_tables.h"

namespace granet::cpu {
namespace {

constexpr int64_t kGathered = 4096;  // values that a thread takes at once
// Values that are fetched ahead: the processor's prefetchers do not see which lines are wanted. Of 2 million weights
// out of all caches, 95 and 98 % of them inactive, on one thread: 0.68 and 0.39 ms into the first level of caches, 0.47
// and 0.23 into the second, which has more lines under way.
constexpr int64_t kGatheredAhead = 192;
constexpr int64_t kSpreadWords = 1024;  // words of the mask, whose weights a thread writes at once

template <typename Type, typename Convert>
void gather_piece(const Type* source, const Convert& convert, const Positions& at, int64_t first, int64_t end,
                  float* values) {
  int64_t i = first;
  const int64_t last = at.rising ? std::min(end, at.count - kGatheredAhead) : first;
  for (; i < last; ++i) {
    __builtin_prefetch(source + at.data[i + kGatheredAhead], kToRead, kSecondLevel);
    values[i] = convert(source[at.data[i]]);
  }
  for (; i < end; ++i) values[i] = convert(source[at.data[i]]);
}

// Gradients from here on are written past the caches: no layer's stays there until the optimizer reads it.
constexpr int64_t kLargeGradient = int64_t{4} << 20;  // bytes

const ActiveKernels& active_kernels() {
  return *GRANET_FOR_ISA(&active_kernels_portable, &active_kernels_avx2, &active_kernels_avx512);
}

// The first active one at or behind a weight.
int64_t first_at(const Active& active, int64_t weight) {
  return std::lower_bound(active.positions, active.positions + active.count, weight) - active.positions;
}

// The weights behind the last whole word of the mask.
template <typename Type, typename Convert>
void spread_rest(const Convert& convert, const float* values, const Active& active, int64_t first, Type* target) {
  std::fill(target + first, target + active.weights, Type{});
  for (int64_t i = first_at(active, first); i < active.count; ++i) {
    const int64_t at = active.positions[i];
    if (first <= at && at < active.weights) target[at] = convert(values[i]);
  }
}

template <typename Type, typename Convert>
void spread_as(const Convert& convert, void (*kernel)(const SpreadTask&), const float* values, const Active& active,
               void* gradient, const Parallel& parallel) {
  auto* target = static_cast<Type*>(gradient);
  const bool streams = active.weights * static_cast<int64_t>(sizeof(Type)) >= kLargeGradient &&
                       reinterpret_cast<uintptr_t>(gradient) % kStreamAlignment == 0;
  const int64_t words = active.weights / kWordWeights;
  parallel.for_each(ceil_div(words, kSpreadWords), [&](int64_t piece) {
    const int64_t word = piece * kSpreadWords, first = word * kWordWeights;
    kernel({values + first_at(active, first), values + active.count,
            active.mask + word * (kWordWeights / kWeightsPerByte), std::min(kSpreadWords, words - word), target + first,
            streams});
  });
  spread_rest(convert, values, active, words * kWordWeights, target);
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

void gather(const void* source, Element element, const Positions& at, bool to_bfloat16, float* values,
            const Parallel& parallel) {
  parallel.for_each(ceil_div(at.count, kGathered), [&](int64_t chunk) {
    const int64_t first = chunk * kGathered;
    const int64_t end = std::min(at.count, first + kGathered);
    if (element == Element::kBFloat16) {
      return gather_piece(static_cast<const uint16_t*>(source), bfloat16_to_float, at, first, end, values);
    }
    const auto same = [](float value) { return value; };
    gather_piece(static_cast<const float*>(source), same, at, first, end, values);
    for (int64_t i = first; i < end && to_bfloat16; ++i) values[i] = round_to_bfloat16(values[i]);
  });
}

void spread(const float* values, const Active& active, void* gradient, Element element, const Parallel& parallel) {
  if (element == Element::kBFloat16) {
    return spread_as<uint16_t>(float_to_bfloat16, active_kernels().spread_to_bfloat16, values, active, gradient,
                               parallel);
  }
  const auto same = [](float value) { return value; };
  spread_as<float>(same, active_kernels().spread_to_float, values, active, gradient, parallel);
}

}  // namespace granet::cpu
