// Selection against the oracle: any numbers of any formats, bit by bit, in tensors of any size.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include <fuzzer/FuzzedDataProvider.h>

#include "select_run.h"

namespace {

using namespace granet;
using namespace granet::oracle;

// The first tensor may be large enough for a sample and for two chunks; the oracle is too slow for more of that kind.
size_t draw_size(FuzzedDataProvider& data, bool first) {
  const bool large = first && data.ConsumeIntegralInRange(0, 15) == 15;
  return large ? data.ConsumeIntegralInRange<size_t>(16'385, 34'000) : data.ConsumeIntegralInRange<size_t>(0, 300);
}

// A pattern is repeated, and every `stride` bytes something in it changes, so that large tensors are not all ties.
Bytes draw_bytes(FuzzedDataProvider& data, size_t size) {
  Bytes pattern = data.ConsumeBytes<uint8_t>(data.ConsumeIntegralInRange<size_t>(1, 512));
  if (pattern.empty()) pattern = {0};
  const auto stride = data.ConsumeIntegralInRange<size_t>(1, 4096);
  const auto mix = data.ConsumeIntegral<uint8_t>();
  Bytes bytes(size);
  for (size_t i = 0; i < size; ++i) {
    bytes[i] = static_cast<uint8_t>(pattern[i % pattern.size()] ^ (i / stride * mix >> 3));
  }
  return bytes;
}

Tensor draw_tensor(FuzzedDataProvider& data, size_t numel) {
  Tensor tensor = {static_cast<FloatType>(data.ConsumeIntegralInRange(0, kFloatTypes - 1)), {}};
  tensor.bytes = draw_bytes(data, numel * tensor.item_size());
  return tensor;
}

Bools draw_active(FuzzedDataProvider& data, size_t numel) {
  const auto share = data.ConsumeIntegral<uint8_t>();
  Bools active = draw_bytes(data, numel);
  for (uint8_t& a : active) a = a <= share;
  return active;
}

std::vector<int64_t> draw_counts(FuzzedDataProvider& data, const std::vector<Tensor>& tensors) {
  int64_t total = 0;
  for (const Tensor& tensor : tensors) total += static_cast<int64_t>(tensor.numel());
  std::vector<int64_t> k(data.ConsumeBool() ? tensors.size() : 1);
  for (int64_t& count : k) count = data.ConsumeIntegralInRange<int64_t>(-1, total + 1);
  return k;
}

// Mostly a fraction, at times any double.
double draw_fraction(FuzzedDataProvider& data) {
  return data.ConsumeIntegralInRange(0, 7) == 0 ? data.ConsumeFloatingPoint<double>()
                                                : data.ConsumeProbability<double>();
}

void require(bool holds) {
  if (!holds) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  FuzzedDataProvider data(bytes, size);
  const int operation = data.ConsumeIntegralInRange(0, 3);
  const auto count = data.ConsumeIntegralInRange<size_t>(1, 4);
  const bool momenta = data.ConsumeBool();
  const cpu::Serial parallel;
  State state;
  std::vector<Tensor> scores;
  for (size_t t = 0; t < count; ++t) {
    const size_t numel = draw_size(data, t == 0);
    scores.push_back(draw_tensor(data, numel));
    if (operation == 0) continue;
    state.weights.push_back(draw_tensor(data, numel));
    state.active.push_back(draw_active(data, numel));
    if (momenta) state.momenta.push_back(draw_tensor(data, numel));
  }
  if (operation == 0) require(topk_agrees(scores, draw_counts(data, scores), parallel));
  if (operation == 1) require(prune_agrees(state, draw_counts(data, state.weights), parallel));
  if (operation == 2) require(drop_regrow_agrees(state, scores, draw_fraction(data), parallel));
  if (operation == 3) {
    const std::vector<int64_t> k = draw_counts(data, state.weights);
    require(prune_drop_regrow_agrees(state, scores, k, draw_fraction(data), parallel));
  }
  return 0;
}
