// Tests of csrc/common/radix.h and csrc/cpu/select.h against the naive oracle of select_oracle.h.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <span>
#include <string>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "cpu/select_sample.h"
#include "sanitizers.h"
#include "select_draws.h"
#include "select_run.h"
#include "threads.h"

namespace {

using namespace granet;
using namespace granet::oracle;
int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

void test_all(const std::vector<size_t>& sizes, size_t types, const std::string& name, const Draw& draw,
              const cpu::Parallel& parallel) {
  Generator generator(types);
  State state;
  state.weights = tensors(sizes, types, draw, generator);
  state.momenta = tensors(sizes, (types + 1) % kTypes.size(), draw, generator);
  const std::vector<Tensor> scores = tensors(sizes, (types + 2) % kTypes.size(), draw, generator);
  int64_t total = 0;
  for (const size_t size : sizes) total += static_cast<int64_t>(size);
  for (const unsigned percent : {100, 40, 3}) {
    state.active.clear();
    for (const size_t size : sizes) {
      state.active.emplace_back(size);
      for (uint8_t& active : state.active.back()) active = generator() % 100 < percent;
    }
    const std::string label = name + ", types " + std::to_string(types) + ", active " + std::to_string(percent);
    for (const int64_t k : {int64_t{-1}, int64_t{1}, total * static_cast<int64_t>(percent) / 500, total}) {
      const std::string count = label + ", k " + std::to_string(k);
      expect(prune_agrees(state, {k}, parallel), "prune " + count);
      const double fraction = k < 0 ? 0.0 : k == 1 ? 1.0 : k == total ? 0.01 : 0.5;
      expect(prune_drop_regrow_agrees(state, scores, {k}, fraction, parallel), "prune_drop_regrow " + count);
    }
    std::vector<int64_t> each;
    for (const size_t size : sizes) each.push_back(static_cast<int64_t>(size * percent / 300));
    expect(prune_agrees(state, each, parallel), "prune each " + label);
    for (const double fraction : {0.0, 0.3}) {
      expect(prune_drop_regrow_agrees(state, scores, each, fraction, parallel), "prune_drop_regrow each " + label);
    }
    State bare = state;
    bare.momenta.clear();
    expect(prune_agrees(bare, each, parallel), "prune without momenta " + label);
    for (const double fraction : {0.3, 1.0, static_cast<double>(NAN)}) {
      expect(drop_regrow_agrees(state, scores, fraction, parallel), "drop_regrow " + label);
    }
  }
  expect(topk_agrees(scores, {total / 5}, parallel), "topk_mask " + name);
  expect(topk_agrees(scores, {total - 1}, parallel), "topk_mask, all but one, " + name);
}

// The sample sees nothing of what decides: of each stretch of the tensor, or of what is active, only a few bytes count.
void test_wrong_guess(const cpu::Parallel& parallel) {
  constexpr size_t kNumel = 300'000;
  Generator generator(1);
  for (const size_t every : {64, 1024, 8192}) {
    for (const double rare : {0.5, 2.0}) {
      const Draw draw = [&](size_t i, Generator& g) {
        return i / 8 % every == 5 ? rare * normal(g) : 1 + 1e-3 * normal(g);
      };
      const std::vector<Tensor> scores = {tensor(FloatType::kFloat32, kNumel, draw, generator)};
      for (const int64_t k : {kNumel / every / 2, kNumel / every, kNumel - kNumel / every}) {
        expect(topk_agrees(scores, {k}, parallel), "wrong guess " + std::to_string(every) + ", k " + std::to_string(k));
      }
    }
  }
  // The first half large, the second small, and the border between them is wanted.
  const Draw steps = [&](size_t i, Generator& g) { return (i < kNumel / 2 ? 2 : 1) + 1e-4 * normal(g); };
  const std::vector<Tensor> scores = {tensor(FloatType::kFloat32, kNumel, steps, generator)};
  for (const int64_t k : {kNumel / 2 - 1, kNumel / 2, kNumel / 2 + 1}) {
    expect(topk_agrees(scores, {k}, parallel), "step, k " + std::to_string(k));
  }
}

// Whether a byte of the mask is one that a sample looks at: of all tensors together, or of each.
std::vector<Bools> sampled_bytes(const std::vector<size_t>& sizes) {
  std::vector<cpu::Part> parts;
  std::vector<Bools> sampled;
  for (const size_t size : sizes) {
    parts.push_back({nullptr, FloatType::kFloat32, static_cast<int64_t>(size), nullptr, true, nullptr});
    sampled.emplace_back(size / 8 + 1);
  }
  const auto mark = [&](std::span<const cpu::Part> some) {
    const cpu::SampledRuns runs(some);
    for (const auto& [part, byte] : runs.list(0, runs.runs())) {
      sampled[static_cast<size_t>(part - parts.data())][static_cast<size_t>(byte)] = 1;
    }
  };
  mark(parts);
  for (size_t t = 0; t < parts.size(); ++t) mark(std::span(parts).subspan(t, 1));
  return sampled;
}

// Of two tensors, where samples look there are weights of another size: where a choice ends, and where the second
// choice ends inside it, is guessed wrong in every way there is.
void test_misled_samples(const cpu::Parallel& parallel) {
  const std::vector<size_t> sizes = {40'000, 36'000};
  const std::vector<Bools> sampled = sampled_bytes(sizes);
  Generator generator(2);
  std::vector<Tensor> scores = tensors(sizes, 0, kDraws[0].second, generator);
  for (int sort = 0; sort < 27; ++sort) {
    const double size[] = {0.01, 1, 100};
    const double seen[] = {size[sort % 3], size[sort / 3 % 3]}, unseen[] = {1, size[sort / 9]};
    State state;
    for (size_t t = 0; t < sizes.size(); ++t) {
      const Draw draw = [&](size_t i, Generator& g) {
        return (sampled[t][i / 8] != 0 ? seen[t] : unseen[t]) * (1 + static_cast<double>(g() % 4096) / 4096);
      };
      state.weights.push_back(tensor(FloatType::kFloat32, sizes[t], draw, generator));
      state.active.emplace_back(sizes[t], uint8_t{1});
    }
    for (const int64_t k : {500, 30'000, 60'000}) {
      const double fraction = sort % 2 == 0 ? 0.9999 : 0.4;
      expect(prune_drop_regrow_agrees(state, scores, {k}, fraction, parallel),
             "misled samples " + std::to_string(sort) + ", k " + std::to_string(k));
    }
  }
}

#ifdef __linux__
// Momenta that are zero already, on pages that cannot be written: the processor itself watches.
void test_zero_lines_are_not_written() {
  constexpr int64_t kNumel = 4096;
  constexpr size_t kBytes = kNumel * sizeof(double);
  void* momentum = mmap(nullptr, kBytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  for (const FloatType type : {FloatType::kFloat16, FloatType::kFloat32, FloatType::kFloat64}) {
    std::vector<float> weight(kNumel);
    for (size_t i = 0; i < kNumel; ++i) weight[i] = static_cast<float>(i * 7919 % kNumel);  // in no order
    std::vector<uint8_t> mask(kNumel / kWeightsPerByte, uint8_t{kAllActive});
    const int64_t k = kNumel / 2;
    cpu::prune({{{weight.data(), FloatType::kFloat32, kNumel, mask.data(), momentum, type}}}, {{k}}, cpu::Serial());
    expect(std::count(weight.begin(), weight.end(), 0.0f) == kNumel - k, "prune with momenta that are zero");
  }
  munmap(momentum, kBytes);
}
#endif

void test_keys() {
  static_assert(Digits<int32_t>(all_keys<int32_t>(Rank::kMagnitude)).shift == 19, "12 bits, then 12, then 7");
  static_assert(key_of<Float32, Rank::kMagnitude, int32_t>(0x8000'0000) == 0);
  static_assert(key_of<Float16, Rank::kMagnitude, int32_t>(0x0001) == 0x3380'0000, "2^-24");
  static_assert(key_of<Float16, Rank::kMagnitude, int32_t>(0x7bff) == 0x477f'e000, "65504");
  static_assert(key_of<Float16, Rank::kGain, int32_t>(0xfe00) == -1, "NaN");
  static_assert(key_of<BFloat16, Rank::kMagnitude, int32_t>(0x7fc0) ==
                key_of<Float32, Rank::kMagnitude, int32_t>(0x7fc0'0000));
  static_assert(key_of<Float32, Rank::kMagnitude, int64_t>(1) == 0x36a0'0000'0000'0000, "2^-149");
  static_assert(key_of<Float32, Rank::kSigned, int64_t>(0xff80'0000) == -0x7ff0'0000'0000'0000, "-infinity");
}

}  // namespace

int main() {
  test_keys();
#ifdef __linux__
  test_zero_lines_are_not_written();
#endif
  const cpu::StdThreads threads(3);
  const cpu::Serial serial;
  // ThreadSanitizer has nothing to find where one thread runs.
  for (size_t types = 0; types < kTypes.size() && !kThreadSanitizer; ++types) {
    for (const auto& [name, draw] : kDraws) {
      test_all({0, 1, 7, 8, 9, 63, 64, 65, 127, 128, 129, 1009, 32}, types, name, draw, serial);
    }
  }
  // Large enough for a sample, with the borders of chunks (32 768) inside and between tensors.
  // Sanitizers take five to twenty times as long: theirs are all ties, few ties and none, and what is no number.
  const auto is_telling = [](const std::string& name) {
    return name == "equal" || name == "normal" || (!kThreadSanitizer && (name == "mostly zeros" || name == "special"));
  };
  for (const auto& [name, draw] : kDraws) {
    if (kAnySanitizer && !is_telling(name)) continue;
    test_all({32'768, 1, 70'001}, 0, "large, " + name, draw, threads);
    test_all({50'000, 65'536}, 5, "large, mixed, " + name, draw, threads);
  }
  if (!kThreadSanitizer) test_wrong_guess(threads);
  if (!kThreadSanitizer) test_misled_samples(threads);
  if (failures == 0) std::puts("all passed");
  return failures == 0 ? 0 : 1;
}
