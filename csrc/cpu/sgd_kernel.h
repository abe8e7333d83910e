// The update of a chunk, for each pair of dtypes: compiled once for each instruction set.
//
// The types in which each term is computed, and which sums are fused with a product, are those of the reference, that
// is of PyTorch's type promotion: a gradient and its weight decay in the parameter's compute dtype, the momentum times
// its factor in the momentum's, and from there on in the wider of the two.
#pragma once

#include "common/simd_dtypes.h"
#include "cpu/sgd_chunk.h"

namespace granet::cpu::GRANET_ISA {

constexpr int64_t kWordGroups = 8;  // mask bytes that are looked at together

// Groups that are fetched ahead of the one that is computed, where most groups are passed over: the processor's own
// prefetchers then fetch the wrong lines. Into the second level, which does not set off the first level's prefetchers:
// with 28 % of the lines in use, 0.6 of the time of prefetching into the first, which gained nothing.
constexpr int64_t kPrefetchGroups = 32;
constexpr int kSecondLevel = 2;  // __builtin_prefetch's word for it

// Words of the mask, 256 bytes of each fp32 tensor, by which the lines of every group are fetched ahead where that is
// done (sgd.cpp), into the first level. When it was new it took 0.93 of the time on one thread (8 to 12 words alike; 4
// and 6, or the second level, gained nothing), and as long on two, which wait for memory; on which Zen is not certain.
constexpr int64_t kWordsAhead = 10;
constexpr int kFirstLevel = 3;

template <typename P, typename M>
class SgdUpdate {
  using G = Compute<P>;
  using V = Compute<M>;
  using C = Larger<G, V>;
  static constexpr int64_t n = kLanesOf<C>;

 public:
  explicit SgdUpdate(const SgdOptions& options)
      : options_(options),
        scale_(static_cast<G>(options.grad_scale)),
        weight_decay_(static_cast<G>(options.weight_decay)),
        momentum_(static_cast<V>(options.momentum)),
        lookahead_(static_cast<C>(options.momentum)),
        gain_(static_cast<C>(1 - options.dampening)),
        rate_(static_cast<C>(-options.lr)) {}

  // Every group of the chunk, except for words without an active weight. The groups of a word are not told apart: at
  // 90 % random sparsity a branch for each cannot be foreseen, and made the step take 1.4 times as long.
  void all_groups(const SgdChunk& chunk) const {
    const int64_t whole = chunk.group_count / kWordGroups * kWordGroups;
    for (int64_t g = 0; g < whole; g += kWordGroups) {
      uint64_t word;
      __builtin_memcpy(&word, chunk.mask + g, sizeof word);
      for (int64_t i = 0; i < kWordGroups && chunk.fetches_ahead; ++i) {
        prefetch<kFirstLevel>(chunk, g + kWordsAhead * kWordGroups + i);
      }
      if (word == ~uint64_t{0}) {
        for (int64_t i = 0; i < kWordGroups; ++i) group<true>(chunk, g + i, kAll);
      } else if (word != 0) {
        for (int64_t i = 0; i < kWordGroups; ++i)
          group<false>(chunk, g + i, static_cast<uint8_t>(word >> (i * kMaxLanes)));
      }
    }
    for (int64_t g = whole; g < chunk.group_count; ++g) {
      if (chunk.mask[g] != 0) group<false>(chunk, g, chunk.mask[g]);
    }
  }

  // The listed groups of the chunk.
  void listed_groups(const SgdChunk& chunk) const {
    for (int64_t i = 0; i < kPrefetchGroups && i < chunk.group_count; ++i) {
      prefetch<kSecondLevel>(chunk, chunk.groups[i]);
    }
    for (int64_t i = 0; i < chunk.group_count; ++i) {
      prefetch<kSecondLevel>(chunk, chunk.groups[i + kPrefetchGroups < chunk.group_count ? i + kPrefetchGroups : i]);
      group<false>(chunk, chunk.groups[i], chunk.mask[chunk.groups[i]]);
    }
  }

 private:
  static constexpr uint32_t kAll = 0xff;

  // The eight weights of a group, of which those whose bit is set are written.
  template <bool all>
  void group(const SgdChunk& chunk, int64_t g, uint32_t mask) const {
    P* param = static_cast<P*>(chunk.param) + g * kMaxLanes;
    const P* grad = static_cast<const P*>(chunk.grad) + g * kMaxLanes;
    M* momentum = static_cast<M*>(chunk.momentum) + g * kMaxLanes;
    for (int64_t i = 0; i < kMaxLanes; i += n) lanes<all>(param + i, grad + i, momentum + i, mask >> i);
  }

  template <int level>
  static void prefetch(const SgdChunk& chunk, int64_t g) {  // at any address: what is behind the end is no fault
    __builtin_prefetch(static_cast<P*>(chunk.param) + kMaxLanes * g, 0, level);
    __builtin_prefetch(static_cast<const P*>(chunk.grad) + kMaxLanes * g, 0, level);
    __builtin_prefetch(static_cast<M*>(chunk.momentum) + kMaxLanes * g, 0, level);
  }

  template <bool all>
  void lanes(P* param, const P* grad, M* momentum, uint32_t mask) const {
    const auto param_bits = load_bits<n>(param);
    const Lanes<G, n> weight = Coding<P, n>::decode(param_bits);
    const Lanes<G, n> gradient = decayed(Coding<P, n>::decode(load_bits<n>(grad)), weight);
    Lanes<C, n> step = convert<C, n, G>(gradient);
    if (options_.momentum != 0) {
      const auto momentum_bits = load_bits<n>(momentum);
      const Lanes<C, n> velocity = options_.first ? step : faster(Coding<M, n>::decode(momentum_bits), step);
      write<M, all>(momentum, Coding<M, n>::encode(convert<V, n, C>(velocity)), momentum_bits, mask);
      step = options_.nesterov ? multiply_add<C, n>(velocity, splat(lookahead_), step) : velocity;
    }
    const Lanes<C, n> updated = multiply_add<C, n>(step, splat(rate_), convert<C, n, G>(weight));
    write<P, all>(param, Coding<P, n>::encode(convert<G, n, C>(updated)), param_bits, mask);
  }

  template <typename T, bool all>
  static void write(T* address, const Lanes<Bits<T>, n>& bits, const Lanes<Bits<T>, n>& old, uint32_t mask) {
    if constexpr (all) {
      store_bits<n>(address, bits);
    } else {
      store_where<n>(address, bits, old, mask);
    }
  }

  Lanes<G, n> decayed(Lanes<G, n> gradient, const Lanes<G, n>& weight) const {
    if (options_.grad_scale != 1) gradient /= scale_;
    if (options_.maximize) gradient = -gradient;
    if (options_.weight_decay == 0) return gradient;
    return multiply_add<G, n>(weight, Lanes<G, n>{} + weight_decay_, gradient);
  }

  Lanes<C, n> faster(const Lanes<V, n>& velocity, const Lanes<C, n>& step) const {
    return multiply_add<C, n>(step, splat(gain_), convert<C, n, V>(velocity * momentum_));
  }

  static Lanes<C, n> splat(C value) { return value - Lanes<C, n>{}; }

  const SgdOptions options_;
  const G scale_, weight_decay_;
  const V momentum_;
  const C lookahead_, gain_, rate_;
};

template <typename P, typename M>
void sgd_chunk(const SgdChunk& chunk, const SgdOptions& options) {
  const SgdUpdate<P, M> update(options);
  if (chunk.groups == nullptr) {
    update.all_groups(chunk);
  } else {
    update.listed_groups(chunk);
  }
}

template <typename P>
SgdKernel sgd_kernel_of(Dtype momentum) {
  switch (momentum) {
    case Dtype::kFloat32:
      return sgd_chunk<P, float>;
    case Dtype::kBfloat16:
      return sgd_chunk<P, Bfloat16>;
    case Dtype::kFloat16:
      return sgd_chunk<P, Float16>;
    default:
      return sgd_chunk<P, double>;
  }
}

inline SgdKernel sgd_kernel_of_pair(Dtype param, Dtype momentum) {
  switch (param) {
    case Dtype::kFloat32:
      return sgd_kernel_of<float>(momentum);
    case Dtype::kBfloat16:
      return sgd_kernel_of<Bfloat16>(momentum);
    case Dtype::kFloat16:
      return sgd_kernel_of<Float16>(momentum);
    default:
      return sgd_kernel_of<double>(momentum);
  }
}

}  // namespace granet::cpu::GRANET_ISA
