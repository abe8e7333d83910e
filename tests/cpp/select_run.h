// Runs an operator of select.h on the oracle's tensors, in buffers of exactly the promised sizes, and compares.
#pragma once

#include <span>
#include <vector>

#include "common/bits.h"
#include "cpu/select.h"
#include "select_oracle.h"

namespace granet::oracle {

// Packed masks whose bits past the last element, which have no meaning, are ones.
inline std::vector<Bytes> pack_all(const std::vector<Bools>& masks) {
  std::vector<Bytes> packed;
  for (const Bools& mask : masks) {
    packed.push_back(pack(mask));
    for (size_t i = mask.size(); i < 8 * packed.back().size(); ++i)
      packed.back()[i / 8] |= static_cast<uint8_t>(1 << (i % 8));
  }
  return packed;
}

inline std::vector<cpu::MaskedWeight> view(State& state, std::vector<Bytes>& masks) {
  std::vector<cpu::MaskedWeight> views;
  for (size_t t = 0; t < state.weights.size(); ++t) {
    Tensor& weight = state.weights[t];
    Tensor* momentum = state.momenta.empty() ? nullptr : &state.momenta[t];
    views.push_back({weight.bytes.data(), weight.type, static_cast<int64_t>(weight.numel()), masks[t].data(),
                     momentum == nullptr ? nullptr : momentum->bytes.data(),
                     momentum == nullptr ? FloatType::kFloat32 : momentum->type});
  }
  return views;
}

inline std::vector<cpu::Numbers> view(const std::vector<Tensor>& tensors) {
  std::vector<cpu::Numbers> views;
  for (const Tensor& t : tensors) views.push_back({t.bytes.data(), t.type, static_cast<int64_t>(t.numel())});
  return views;
}

inline bool same(const State& state, const std::vector<Bytes>& masks, const State& expected) {
  bool equal = true;
  for (size_t t = 0; t < masks.size(); ++t) {
    equal &= masks[t] == pack(expected.active[t]) && state.weights[t].bytes == expected.weights[t].bytes;
    if (!state.momenta.empty()) equal &= state.momenta[t].bytes == expected.momenta[t].bytes;
  }
  return equal;
}

inline bool prune_agrees(State state, const std::vector<int64_t>& k, const cpu::Parallel& parallel) {
  State expected = state;
  prune(expected, k);
  std::vector<Bytes> masks = pack_all(state.active);
  cpu::prune(view(state, masks), k, parallel);
  return same(state, masks, expected);
}

inline bool drop_regrow_agrees(State state, const std::vector<Tensor>& scores, double fraction,
                               const cpu::Parallel& parallel) {
  State expected = state;
  drop_regrow(expected, scores, fraction);
  std::vector<Bytes> masks = pack_all(state.active);
  cpu::drop_regrow(view(state, masks), view(scores), fraction, parallel);
  return same(state, masks, expected);
}

// One after the other, by the oracle, is what one call must give; the masks in between too.
inline bool prune_drop_regrow_agrees(State state, const std::vector<Tensor>& scores, const std::vector<int64_t>& k,
                                     double fraction, const cpu::Parallel& parallel) {
  State expected = state;
  prune(expected, k);
  const std::vector<Bools> between = expected.active;
  drop_regrow(expected, scores, fraction);
  std::vector<Bytes> masks = pack_all(state.active), pruned = masks;
  std::vector<uint8_t*> addresses;
  for (Bytes& mask : pruned) addresses.push_back(mask.data());
  cpu::prune_drop_regrow(view(state, masks), view(scores), k, fraction, addresses, parallel);
  bool equal = same(state, masks, expected);
  for (size_t t = 0; t < pruned.size(); ++t) equal &= pruned[t] == pack(between[t]);
  return equal;
}

inline bool topk_agrees(const std::vector<Tensor>& scores, const std::vector<int64_t>& k,
                        const cpu::Parallel& parallel) {
  std::vector<Bools> all;
  std::vector<Bytes> masks;
  std::vector<uint8_t*> addresses;
  for (const Tensor& score : scores) {
    all.emplace_back(score.numel(), uint8_t{1});
    masks.emplace_back(static_cast<size_t>(packed_bytes(static_cast<int64_t>(score.numel()))), uint8_t{0xaa});
  }
  for (Bytes& mask : masks) addresses.push_back(mask.data());
  cpu::topk_mask(view(scores), k, addresses, parallel);
  const std::vector<Bools> expected = choose(scores, all, Rank::kSigned, k);
  bool equal = true;
  for (size_t t = 0; t < masks.size(); ++t) equal &= masks[t] == pack(expected[t]);
  return equal;
}

}  // namespace granet::oracle
