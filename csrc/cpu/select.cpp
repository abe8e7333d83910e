#include "cpu/select.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "common/bits.h"
#include "common/isa.h"
#include "cpu/mask.h"
#include "cpu/scratch.h"
#include "cpu/select_choose.h"
#include "cpu/select_nested.h"
#include "cpu/select_table.h"

namespace granet::cpu {
namespace {

const SelectTable& table() { return *GRANET_FOR_ISA(&select_portable, &select_avx2, &select_avx512); }

// Packed masks for a list of tensors, not initialised.
template <typename Tensor>
class Masks {
 public:
  Masks(std::span<const Tensor> tensors, Scratch& scratch) {
    int64_t bytes = 0;
    for (const Tensor& tensor : tensors) {
      offsets_.push_back(bytes);
      bytes += packed_bytes(tensor.numel);
    }
    bits_ = scratch.take<uint8_t>(static_cast<size_t>(bytes));
  }
  uint8_t* operator[](int64_t i) const { return bits_ + offsets_[static_cast<size_t>(i)]; }

 private:
  std::vector<int64_t> offsets_;
  uint8_t* bits_;
};

int64_t active_in(const uint8_t* mask, int64_t first, int64_t count) {
  const uint8_t* bytes = mask + first / kWeightsPerByte;
  const int64_t whole = count / kWeightsPerByte;
  const int64_t rest = count % kWeightsPerByte;
  const int tail = rest == 0 ? 0 : std::popcount(static_cast<unsigned>(bytes[whole] & ((1 << rest) - 1)));
  return count_active(bytes, whole) + tail;
}

// The eligible elements of each part, which are those where its bit is 1.
std::vector<int64_t> active_counts(std::span<const Part> parts, const Parallel& parallel) {
  constexpr int64_t kSlice = 64 * kChunk;  // 256 KiB of mask: some 10 microseconds
  struct Task {
    size_t part;
    int64_t first;
  };
  std::vector<Task> tasks;
  for (size_t i = 0; i < parts.size(); ++i) {
    for (int64_t first = 0; first < parts[i].numel; first += kSlice) tasks.push_back({i, first});
  }
  std::vector<std::atomic<int64_t>> counts(parts.size());
  parallel.for_each(std::ssize(tasks), [&](int64_t t) {
    const auto [index, first] = tasks[static_cast<size_t>(t)];
    const Part& part = parts[index];
    counts[index] += active_in(part.bits, first, std::min(kSlice, part.numel - first));
  });
  return {counts.begin(), counts.end()};
}

// One group of all parts, or one for each, as there are elements in k.
std::vector<Group> make_groups(std::span<const int64_t> k, std::span<const int64_t> eligible) {
  std::vector<Group> groups;
  if (k.size() == eligible.size()) {
    for (int64_t i = 0; i < std::ssize(k); ++i) {
      groups.push_back({i, i + 1, eligible[static_cast<size_t>(i)], k[static_cast<size_t>(i)]});
    }
  } else {
    int64_t total = 0;
    for (const int64_t count : eligible) total += count;
    groups.push_back({0, std::ssize(eligible), total, k[0]});
  }
  return groups;
}

// The mask's bytes of elements [first, first + count), padding included at the end of the tensor.
int64_t bytes_of(int64_t numel, int64_t first, int64_t count) {
  return (first + count == numel ? packed_bytes(numel) : (first + count) / kWeightsPerByte) - first / kWeightsPerByte;
}

size_t item_size_log2(FloatType type) { return type == FloatType::kFloat64 ? 3 : type == FloatType::kFloat32 ? 2 : 1; }

// Writes the mask's bits of the elements [first, first + count), with new_word(byte) for the word at a byte of it, and
// +0.0 in weight and momentum of what it has lost or gained: all but what is in `stays`, a mask, and in the new one.
// `same` is room for a mask, and may be `stays`.
template <typename NewWord>
void set_mask(const MaskedWeight& weight, int64_t first, int64_t count, const uint8_t* stays, uint8_t* same,
              const NewWord& new_word) {
  const int64_t begin = first / kWeightsPerByte;
  const int64_t end = begin + bytes_of(weight.numel, first, count);
  for (int64_t byte = begin; byte < end; byte += static_cast<int64_t>(sizeof(uint64_t))) {
    const uint64_t now = new_word(byte);
    store_word(same + byte, (now & load_word(stays + byte)) | ~(now | load_word(weight.mask + byte)));
    store_word(weight.mask + byte, now);
  }
  table().zero[item_size_log2(weight.type)](weight.data, first, count, same);
  if (weight.momentum != nullptr) {
    table().zero[item_size_log2(weight.momentum_type)](weight.momentum, first, count, same);
  }
}

// Active weights by magnitude, to be chosen from into the masks chosen(i).
template <typename Chosen>
std::vector<Part> magnitudes_of(std::span<const MaskedWeight> weights, const Chosen& chosen) {
  std::vector<Part> parts;
  for (const MaskedWeight& weight : weights) {
    parts.push_back({weight.data, weight.type, weight.numel, weight.mask, false, chosen(std::ssize(parts))});
  }
  return parts;
}

// Inside [0, 1]; NaN is not above 0.
double share_of(double fraction) { return fraction > 0 ? std::min(fraction, 1.0) : 0.0; }

int64_t left_of(int64_t active, double share) {
  return active - static_cast<int64_t>(std::ceil(share * static_cast<double>(active)));
}

// What has been dropped is known: of `before`, masks with active[i] bits, the weights in `kept` are left, as many as
// left_of() says. Regrows the others, and writes.
template <typename Before>
void regrow(std::span<const MaskedWeight> weights, std::span<const Numbers> scores, const Before& before,
            std::span<const int64_t> active, const Masks<MaskedWeight>& kept, double share, Scratch& scratch,
            const Parallel& parallel) {
  const Masks regrown(weights, scratch);
  std::vector<Part> gains;
  std::vector<Group> groups;
  for (int64_t i = 0; i < std::ssize(weights); ++i) {
    const auto t = static_cast<size_t>(i);
    const int64_t numel = weights[t].numel, left = left_of(active[t], share);
    gains.push_back({scores[t].data, scores[t].type, numel, kept[i], true, regrown[i]});
    groups.push_back({i, i + 1, numel - left, active[t] - left});
  }
  choose(
      gains, groups, Rank::kGain,
      [&](int64_t i, int64_t first, int64_t count) {
        set_mask(weights[static_cast<size_t>(i)], first, count, before(i), regrown[i],
                 [&](int64_t byte) { return load_word(kept[i] + byte) | load_word(regrown[i] + byte); });
      },
      scratch, parallel);
}

// Tensors of drop_regrow() are chosen from one by one, so they are worked on in batches of about so many elements: what
// the passes read again, weights and masks, is then still in a last-level cache.
constexpr int64_t kBatch = 1'000'000;

void drop_regrow_batch(std::span<const MaskedWeight> weights, std::span<const Numbers> scores, double share,
                       const Parallel& parallel) {
  const ScratchScope scratch;
  const Masks kept(weights, *scratch);
  const std::vector<Part> parts = magnitudes_of(weights, [&](int64_t i) { return kept[i]; });
  const std::vector<int64_t> active = active_counts(parts, parallel);
  std::vector<Group> groups;
  for (int64_t i = 0; i < std::ssize(weights); ++i) {
    const int64_t count = active[static_cast<size_t>(i)];
    groups.push_back({i, i + 1, count, left_of(count, share)});
  }
  choose(parts, groups, Rank::kMagnitude, nullptr, *scratch, parallel);
  const auto before = [&](int64_t i) { return weights[static_cast<size_t>(i)].mask; };
  regrow(weights, scores, before, active, kept, share, *scratch, parallel);
}

}  // namespace

void prune(std::span<const MaskedWeight> weights, std::span<const int64_t> k, const Parallel& parallel) {
  const ScratchScope scratch;
  const Masks kept(weights, *scratch);
  const std::vector<Part> parts = magnitudes_of(weights, [&](int64_t i) { return kept[i]; });
  choose(
      parts, make_groups(k, active_counts(parts, parallel)), Rank::kMagnitude,
      [&](int64_t i, int64_t first, int64_t count) {
        set_mask(weights[static_cast<size_t>(i)], first, count, kept[i], kept[i],
                 [&](int64_t byte) { return load_word(kept[i] + byte); });
      },
      *scratch, parallel);
}

void pruned_masks(std::span<const Numbers> weights, std::span<const uint8_t* const> masks, std::span<const int64_t> k,
                  std::span<uint8_t* const> pruned, const Parallel& parallel) {
  const ScratchScope scratch;
  std::vector<Part> parts;
  for (size_t i = 0; i < weights.size(); ++i) {
    parts.push_back({weights[i].data, weights[i].type, weights[i].numel, masks[i], false, pruned[i]});
  }
  choose(parts, make_groups(k, active_counts(parts, parallel)), Rank::kMagnitude, nullptr, *scratch, parallel);
}

void drop_regrow(std::span<const MaskedWeight> weights, std::span<const Numbers> scores, double fraction,
                 const Parallel& parallel) {
  const double share = share_of(fraction);
  size_t begin = 0;
  int64_t numel = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    numel += weights[i].numel;
    if (numel < kBatch && i + 1 < weights.size()) continue;
    drop_regrow_batch(weights.subspan(begin, i + 1 - begin), scores.subspan(begin, i + 1 - begin), share, parallel);
    begin = i + 1;
    numel = 0;
  }
}

void prune_drop_regrow(std::span<const MaskedWeight> weights, std::span<const Numbers> scores,
                       std::span<const int64_t> k, double fraction, std::span<uint8_t* const> pruned,
                       const Parallel& parallel) {
  const double share = share_of(fraction);
  const ScratchScope scratch;
  const Masks kept(weights, *scratch);
  std::vector<uint8_t*> inner;
  for (int64_t i = 0; i < std::ssize(weights); ++i) inner.push_back(kept[i]);
  const std::vector<Part> parts = magnitudes_of(weights, [&](int64_t i) { return pruned[static_cast<size_t>(i)]; });
  const std::vector<int64_t> active = active_counts(parts, parallel);
  const std::vector<int64_t> left = choose_nested(
      parts, active, make_groups(k, active), inner, [=](int64_t count) { return left_of(count, share); },
      Rank::kMagnitude, *scratch, parallel);
  const auto before = [&](int64_t i) { return pruned[static_cast<size_t>(i)]; };
  regrow(weights, scores, before, left, kept, share, *scratch, parallel);
}

void topk_mask(std::span<const Numbers> scores, std::span<const int64_t> k, std::span<uint8_t* const> masks,
               const Parallel& parallel) {
  const ScratchScope scratch;
  std::vector<Part> parts;
  std::vector<int64_t> eligible;
  for (size_t i = 0; i < scores.size(); ++i) {
    parts.push_back({scores[i].data, scores[i].type, scores[i].numel, nullptr, true, masks[i]});
    eligible.push_back(scores[i].numel);
  }
  choose(parts, make_groups(k, eligible), Rank::kSigned, nullptr, *scratch, parallel);
}

}  // namespace granet::cpu
