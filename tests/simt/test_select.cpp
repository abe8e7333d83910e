// Tests of csrc/cuda/select.h, run on the host, against the naive oracle of tests/cpp.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "cuda/select.h"
#include "sanitizers.h"
#include "select_draws.h"

namespace {

using namespace granet;
using namespace granet::oracle;

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

// Packed masks whose bits past the last element, which have no meaning, are ones where they are read.
std::vector<Bytes> pack_all(const std::vector<Bools>& masks) {
  std::vector<Bytes> packed;
  for (const Bools& mask : masks) packed.push_back(pack(mask));
  return packed;
}

// The lists of a call, with the table and the workspace in memory of exactly the size that is asked for.
class Lists {
 public:
  Lists(std::vector<Tensor>& numbers, std::vector<Bytes>& masks, std::vector<Tensor>* momenta,
        const std::vector<Tensor>* gains, bool each, int64_t sample_from)
      : rows_(4, 1, cuda::kSelectChunk) {
    for (size_t t = 0; t < numbers.size(); ++t) {
      const auto numel = static_cast<int64_t>(numbers[t].numel());
      const bool moves = momenta != nullptr && !momenta->empty();
      const FloatType momentum = moves ? (*momenta)[t].type : FloatType::kFloat32;
      const FloatType gain = gains != nullptr ? (*gains)[t].type : FloatType::kFloat32;
      rows_.begin_row(numel);
      rows_.add(numbers[t].bytes.data());
      rows_.add(masks[t].data());
      rows_.add(moves ? (*momenta)[t].bytes.data() : nullptr);
      rows_.add(gains != nullptr ? (*gains)[t].bytes.data() : nullptr);
      rows_.add(cuda::select_types(numbers[t].type, momentum, gain));
      lists_.numbers.add(numbers[t].type);
      lists_.gains.add(gain);
      lists_.elements += numel;
      lists_.largest = std::max(lists_.largest, numel);
    }
    table_.resize((rows_.device_bytes() + 7) / 8);
    expect(launch_write_table(rows_, table_.data(), nullptr) == cudaSuccess, "the table");
    lists_.table = rows_.table(table_.data());
    lists_.tensors = rows_.rows();
    lists_.each = each;
    lists_.sample_from = sample_from;
    workspace_.resize(cuda::select_workspace_bytes(lists_) / 16);
    for (Word& word : workspace_) word.fill(0xa5);
  }

  const cuda::SelectLists& lists() const { return lists_; }
  void* workspace() { return workspace_.data(); }

 private:
  struct alignas(16) Word : std::array<uint8_t, 16> {};
  cuda::TableRows rows_;
  std::vector<int64_t> table_;
  std::vector<Word> workspace_;
  cuda::SelectLists lists_{};
};

bool same(const State& state, const std::vector<Bytes>& masks, const State& expected) {
  bool equal = true;
  for (size_t t = 0; t < masks.size(); ++t) {
    equal &= masks[t] == pack(expected.active[t]) && state.weights[t].bytes == expected.weights[t].bytes;
    if (!state.momenta.empty()) equal &= state.momenta[t].bytes == expected.momenta[t].bytes;
  }
  return equal;
}

bool prune_agrees(State state, const std::vector<int64_t>& k, int64_t sample_from) {
  State expected = state;
  prune(expected, k);
  std::vector<Bytes> masks = pack_all(state.active);
  Lists lists(state.weights, masks, &state.momenta, nullptr, k.size() == masks.size(), sample_from);
  return launch_prune(lists.lists(), {k.data(), k[0] % 2 == 0}, lists.workspace(), nullptr) == cudaSuccess &&
         same(state, masks, expected);
}

bool drop_regrow_agrees(State state, const std::vector<Tensor>& scores, double fraction, int64_t sample_from) {
  State expected = state;
  drop_regrow(expected, scores, fraction);
  std::vector<Bytes> masks = pack_all(state.active);
  Lists lists(state.weights, masks, &state.momenta, &scores, true, sample_from);
  return launch_drop_regrow(lists.lists(), {.address = &fraction}, lists.workspace(), nullptr) == cudaSuccess &&
         same(state, masks, expected);
}

bool topk_agrees(std::vector<Tensor> scores, const std::vector<int64_t>& k, int64_t sample_from) {
  std::vector<Bools> all;
  std::vector<Bytes> masks;
  for (const Tensor& score : scores) {
    all.emplace_back(score.numel(), uint8_t{1});
    masks.emplace_back(static_cast<size_t>(packed_bytes(static_cast<int64_t>(score.numel()))), uint8_t{0xaa});
  }
  const std::vector<Bools> expected = choose(scores, all, Rank::kSigned, k);
  Lists lists(scores, masks, nullptr, nullptr, k.size() == masks.size(), sample_from);
  bool equal = launch_topk_mask(lists.lists(), {k.data(), k[0] % 2 == 0}, lists.workspace(), nullptr) == cudaSuccess;
  for (size_t t = 0; t < masks.size(); ++t) equal &= masks[t] == pack(expected[t]);
  return equal;
}

constexpr int64_t kNever = int64_t{1} << 60;  // sample no segment

// `more`: counts and fractions at the ends of their ranges too, and other masks.
void test_all(const std::vector<size_t>& sizes, size_t types, const std::string& name, const Draw& draw,
              int64_t sample_from, bool more) {
  Generator generator(types);
  State state;
  state.weights = tensors(sizes, types, draw, generator);
  state.momenta = tensors(sizes, (types + 1) % kTypes.size(), draw, generator);
  const std::vector<Tensor> scores = tensors(sizes, (types + 2) % kTypes.size(), draw, generator);
  int64_t total = 0;
  for (const size_t size : sizes) total += static_cast<int64_t>(size);
  for (const unsigned percent : more ? std::vector{100U, 40U, 3U} : std::vector{40U}) {
    state.active.clear();
    for (const size_t size : sizes) {
      state.active.emplace_back(size);
      for (uint8_t& active : state.active.back()) active = generator() % 100 < percent;
    }
    const std::string label = name + ", types " + std::to_string(types) + ", active " + std::to_string(percent);
    std::vector<int64_t> counts = {total * static_cast<int64_t>(percent) / 500};
    if (more) counts.insert(counts.end(), {-1, 1, total});
    for (const int64_t k : counts) {
      expect(prune_agrees(state, {k}, sample_from), "prune " + label + ", k " + std::to_string(k));
    }
    std::vector<int64_t> each;
    for (const size_t size : sizes) each.push_back(static_cast<int64_t>(size * percent / 300));
    State bare = state;
    bare.momenta.clear();
    expect(prune_agrees(bare, each, sample_from), "prune each, without momenta, " + label);
    expect(drop_regrow_agrees(state, scores, 0.3, sample_from), "drop_regrow " + label);
    if (!more) continue;
    for (const double fraction : {1.0, -0.0, static_cast<double>(NAN)}) {
      expect(drop_regrow_agrees(state, scores, fraction, sample_from), "drop_regrow " + label);
    }
  }
  expect(topk_agrees(scores, {total / 5}, sample_from), "topk_mask " + name);
  if (more) expect(topk_agrees(scores, {total - 1}, sample_from), "topk_mask, all but one, " + name);
}

// The sample sees nothing of what decides, or takes it for what it is not.
void test_wrong_guess() {
  constexpr size_t kNumel = 50'000;
  Generator generator(1);
  for (const size_t every : {64, 1024}) {
    for (const double rare : {0.5, 2.0}) {
      const Draw draw = [&](size_t i, Generator& g) {
        return i / 8 % every == 5 ? rare * normal(g) : 1 + 1e-3 * normal(g);
      };
      const std::vector<Tensor> scores = {tensor(FloatType::kFloat32, kNumel, draw, generator)};
      for (const int64_t k : {kNumel / every / 2, kNumel / every, kNumel - kNumel / every}) {
        expect(topk_agrees(scores, {k}, 1), "wrong guess " + std::to_string(every) + ", k " + std::to_string(k));
      }
    }
  }
  const Draw steps = [&](size_t i, Generator& g) { return (i < kNumel / 2 ? 2 : 1) + 1e-4 * normal(g); };
  const std::vector<Tensor> scores = {tensor(FloatType::kFloat32, kNumel, steps, generator)};
  for (const int64_t k : {kNumel / 2 - 1, kNumel / 2, kNumel / 2 + 1}) {
    expect(topk_agrees(scores, {k}, 1), "step, k " + std::to_string(k));
  }
}

}  // namespace

int main() {
  const std::vector<size_t> odd = {0, 1, 7, 8, 9, 63, 64, 65, 127, 128, 129, 1009, 32};
  if (kAnySanitizer) {
    const auto& [name, draw] = kDraws[3];  // mostly zeros: ties at the threshold
    test_all({1009, 33'001, 7}, 0, name, draw, kNever, false);
    test_all({40'000}, 3, "sampled, " + name, draw, 16'384, false);
  } else {
    for (size_t i = 0; i < kTypes.size() * kDraws.size(); ++i) {
      const auto& [name, draw] = kDraws[i % kDraws.size()];
      test_all(odd, i / kDraws.size(), name, draw, kNever, i % kDraws.size() == i / kDraws.size());
    }
    // The borders of chunks (16 384) inside and between tensors, and blocks with more than one chunk; sampled and not.
    for (const auto& [name, draw] : kDraws) {
      test_all({16'384, 1, 33'001}, 0, "large, " + name, draw, kNever, false);
      test_all({50'000, 16'383}, 5, "sampled, " + name, draw, 16'384, false);
    }
    test_wrong_guess();
  }
  if (failures == 0) std::puts("all passed");
  return failures == 0 ? 0 : 1;
}
