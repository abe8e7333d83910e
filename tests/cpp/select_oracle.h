// What select.h promises, computed the slow way: numbers as doubles, compared in pairs, one bool an element.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "common/radix.h"

namespace granet::oracle {

using Bytes = std::vector<uint8_t>;
using Bools = std::vector<uint8_t>;

struct Tensor {
  FloatType type;
  Bytes bytes;

  size_t item_size() const { return type == FloatType::kFloat64 ? 8 : type == FloatType::kFloat32 ? 4 : 2; }
  size_t numel() const { return bytes.size() / item_size(); }
  void zero(size_t i) {
    std::fill_n(bytes.begin() + static_cast<std::ptrdiff_t>(i * item_size()), item_size(), uint8_t{0});
  }

  double number(size_t i) const {
    if (type == FloatType::kFloat64) return load<double>(i);
    if (type == FloatType::kFloat32) return static_cast<double>(load<float>(i));
    const int bits = load<uint16_t>(i);
    const int mantissa_bits = type == FloatType::kFloat16 ? 10 : 7;
    const int top = (1 << (15 - mantissa_bits)) - 1;  // the exponent field of infinity
    const int exponent = bits >> mantissa_bits & top, mantissa = bits & ((1 << mantissa_bits) - 1);
    double magnitude = std::ldexp((1 << mantissa_bits) + mantissa, exponent - top / 2 - mantissa_bits);
    if (exponent == 0) magnitude = std::ldexp(mantissa, 1 - top / 2 - mantissa_bits);
    if (exponent == top) magnitude = mantissa == 0 ? INFINITY : NAN;
    return bits >> 15 != 0 ? -magnitude : magnitude;
  }

 private:
  template <typename T>
  T load(size_t i) const {
    T value;
    std::memcpy(&value, bytes.data() + i * sizeof(T), sizeof(T));
    return value;
  }
};

// Larger is better; pairs compare by the first entry first, so that NaN finds its place.
inline std::pair<int, double> rank_of(double x, Rank rank) {
  if (std::isnan(x)) return {rank == Rank::kMagnitude ? 1 : -1, 0.0};
  return {0, rank == Rank::kSigned ? x : std::abs(x)};
}

// The k largest eligible elements of all tensors together.
inline std::vector<Bools> choose(const std::vector<Tensor>& tensors, const std::vector<Bools>& eligible, Rank rank,
                                 int64_t k) {
  struct Element {
    std::pair<int, double> rank;
    size_t tensor, i;
  };
  std::vector<Element> elements;
  std::vector<Bools> chosen;
  for (size_t t = 0; t < tensors.size(); ++t) {
    chosen.emplace_back(tensors[t].numel());
    for (size_t i = 0; i < tensors[t].numel(); ++i) {
      if (eligible[t][i] != 0) elements.push_back({rank_of(tensors[t].number(i), rank), t, i});
    }
  }
  const auto better = [](const Element& a, const Element& b) {
    return a.rank != b.rank ? a.rank > b.rank : std::pair(a.tensor, a.i) < std::pair(b.tensor, b.i);
  };
  const auto count = std::clamp<int64_t>(k, 0, static_cast<int64_t>(elements.size()));
  std::nth_element(elements.begin(), elements.begin() + count, elements.end(), better);
  for (int64_t e = 0; e < count; ++e) chosen[elements[e].tensor][elements[e].i] = 1;
  return chosen;
}

inline std::vector<Bools> choose(const std::vector<Tensor>& tensors, const std::vector<Bools>& eligible, Rank rank,
                                 const std::vector<int64_t>& k) {
  if (k.size() != tensors.size()) return choose(tensors, eligible, rank, k[0]);
  std::vector<Bools> chosen;
  for (size_t t = 0; t < k.size(); ++t) chosen.push_back(choose({tensors[t]}, {eligible[t]}, rank, k[t])[0]);
  return chosen;
}

// Padded to 16 bytes, as packed_bytes() says.
inline Bytes pack(const Bools& bools) {
  Bytes packed((bools.size() + 127) / 128 * 16);
  for (size_t i = 0; i < bools.size(); ++i) packed[i / 8] |= static_cast<uint8_t>(bools[i] << (i % 8));
  return packed;
}

struct State {
  std::vector<Tensor> weights;
  std::vector<Bools> active;
  std::vector<Tensor> momenta;  // or none

  void set_mask(size_t t, const Bools& now) {
    for (size_t i = 0; i < now.size(); ++i) {
      if (now[i] == active[t][i]) continue;
      weights[t].zero(i);
      if (!momenta.empty()) momenta[t].zero(i);
    }
    active[t] = now;
  }
};

inline void prune(State& state, const std::vector<int64_t>& k) {
  const std::vector<Bools> kept = choose(state.weights, state.active, Rank::kMagnitude, k);
  for (size_t t = 0; t < kept.size(); ++t) state.set_mask(t, kept[t]);
}

inline void drop_regrow(State& state, const std::vector<Tensor>& scores, double fraction) {
  const double p = fraction > 0 ? std::min(fraction, 1.0) : 0.0;
  for (size_t t = 0; t < state.weights.size(); ++t) {
    const Bools& before = state.active[t];
    const int64_t active = std::count(before.begin(), before.end(), 1);
    const auto dropped = static_cast<int64_t>(std::ceil(p * static_cast<double>(active)));
    const Bools kept = choose({state.weights[t]}, {before}, Rank::kMagnitude, active - dropped)[0];
    Bools inactive(kept.size());
    for (size_t i = 0; i < kept.size(); ++i) inactive[i] = kept[i] == 0;
    const Bools regrown = choose({scores[t]}, {inactive}, Rank::kGain, dropped)[0];
    Bools now(kept.size());
    for (size_t i = 0; i < kept.size(); ++i) now[i] = kept[i] | regrown[i];
    state.set_mask(t, now);
  }
}

}  // namespace granet::oracle
