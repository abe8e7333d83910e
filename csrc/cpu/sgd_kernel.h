// The update of a chunk, for each pair of dtypes: compiled once for each instruction set.
//
// The types in which each term is computed, and which sums are fused with a product, are those of the reference, that
// is of PyTorch's type promotion: a gradient and its weight decay in the parameter's compute dtype, the momentum times
// its factor in the momentum's, and from there on in the wider of the two.
#pragma once

#include <type_traits>

#include "common/prefetch.h"
#include "common/simd_dtypes.h"
#include "cpu/sgd_chunk.h"
#include "cpu/sgd_walk.h"

namespace granet::cpu::GRANET_ISA {

// Which terms the update of a weight has.
struct SgdTerms {
  bool scaled = false, negated = false, decayed = false, moved = false, first = false, nesterov = false;
  bool operator==(const SgdTerms&) const = default;
};

inline SgdTerms terms_of(const SgdOptions& o) {
  return {o.grad_scale != 1, o.maximize, o.weight_decay != 0, o.momentum != 0, o.first, o.nesterov};
}

// Asking for each term at every group took 0.06 of a step, which otherwise waits for memory: loops are compiled for
// the terms of almost all steps, with a momentum in the parameter's dtype or fp32, and one for all others.
struct AnyTerms {
  explicit AnyTerms(const SgdOptions& options) : terms(terms_of(options)) {}
  SgdTerms terms;
};

template <bool is_decayed, bool is_nesterov>
struct UsualTerms {
  explicit UsualTerms(const SgdOptions&) {}
  static constexpr SgdTerms terms{.decayed = is_decayed, .moved = true, .nesterov = is_nesterov};
};

template <typename P, typename M, typename Terms>
class SgdUpdate {
  using G = Compute<P>;
  using V = Compute<M>;
  using C = Larger<G, V>;
  static constexpr int64_t n = kLanesOf<C>;

 public:
  explicit SgdUpdate(const SgdOptions& options)
      : given_(options),
        scale_(static_cast<G>(options.grad_scale)),
        weight_decay_(static_cast<G>(options.weight_decay)),
        momentum_(static_cast<V>(options.momentum)),
        lookahead_(static_cast<C>(options.momentum)),
        gain_(static_cast<C>(1 - options.dampening)),
        rate_(static_cast<C>(-options.lr)) {}

  // The eight weights of a group, of which those whose bit is set are written. Inlined without exception, for a call of
  // its own loads every constant again. Even a step that waits for memory counts its instructions, since the processor
  // can look only so many of them ahead: with AVX2 this, and fewer of them for a mask, take 0.95 of the time at 80 to
  // 95 % sparsity.
  template <bool all>
  __attribute__((always_inline)) void group(const SgdChunk& chunk, int64_t g, uint32_t mask) const {
    P* param = static_cast<P*>(chunk.param) + g * kMaxLanes;
    const P* grad = static_cast<const P*>(chunk.grad) + g * kMaxLanes;
    M* momentum = static_cast<M*>(chunk.momentum) + g * kMaxLanes;
    for (int64_t i = 0; i < kMaxLanes; i += n) lanes<all>(param + i, grad + i, momentum + i, mask >> i);
  }

  template <int level>
  static void prefetch(const SgdChunk& chunk, int64_t g) {  // at any address: what is behind the end is no fault
    __builtin_prefetch(static_cast<P*>(chunk.param) + kMaxLanes * g, kToRead, level);
    __builtin_prefetch(static_cast<const P*>(chunk.grad) + kMaxLanes * g, kToRead, level);
    __builtin_prefetch(static_cast<M*>(chunk.momentum) + kMaxLanes * g, kToRead, level);
  }

 private:
  template <bool all>
  void lanes(P* param, const P* grad, M* momentum, uint32_t mask) const {
    const auto param_bits = load_bits<n>(param);
    const Lanes<G, n> weight = Coding<P, n>::decode(param_bits);
    const Lanes<G, n> gradient = decayed(Coding<P, n>::decode(load_bits<n>(grad)), weight);
    Lanes<C, n> step = convert<C, n, G>(gradient);
    if (given_.terms.moved) {
      const auto momentum_bits = load_bits<n>(momentum);
      const Lanes<C, n> velocity = given_.terms.first ? step : faster(Coding<M, n>::decode(momentum_bits), step);
      write<n, all>(momentum, Coding<M, n>::encode(convert<V, n, C>(velocity)), momentum_bits, mask);
      step = given_.terms.nesterov ? multiply_add<C, n>(velocity, splat(lookahead_), step) : velocity;
    }
    const Lanes<C, n> updated = multiply_add<C, n>(step, splat(rate_), convert<C, n, G>(weight));
    write<n, all>(param, Coding<P, n>::encode(convert<G, n, C>(updated)), param_bits, mask);
  }

  Lanes<G, n> decayed(Lanes<G, n> gradient, const Lanes<G, n>& weight) const {
    if (given_.terms.scaled) gradient /= scale_;
    if (given_.terms.negated) gradient = -gradient;
    if (!given_.terms.decayed) return gradient;
    return multiply_add<G, n>(weight, Lanes<G, n>{} + weight_decay_, gradient);
  }

  Lanes<C, n> faster(const Lanes<V, n>& velocity, const Lanes<C, n>& step) const {
    return multiply_add<C, n>(step, splat(gain_), convert<C, n, V>(velocity * momentum_));
  }

  static Lanes<C, n> splat(C value) { return value - Lanes<C, n>{}; }

  [[no_unique_address]] const Terms given_;
  const G scale_, weight_decay_;
  const V momentum_;
  const C lookahead_, gain_, rate_;
};

template <typename P, typename M, typename Terms>
void sgd_chunk_of(const SgdChunk& chunk, const SgdOptions& options) {
  const SgdUpdate<P, M, Terms> update(options);
  if (chunk.is_listed) {
    listed_groups(update, chunk);
  } else {
    all_groups(update, chunk);
  }
}

template <typename P, typename M>
void sgd_chunk(const SgdChunk& chunk, const SgdOptions& options) {
  if constexpr (std::is_same_v<M, P> || std::is_same_v<M, float>) {
    using Decayed = UsualTerms<true, false>;
    using Nesterov = UsualTerms<true, true>;
    using Undecayed = UsualTerms<false, false>;
    const SgdTerms terms = terms_of(options);
    if (terms == Decayed::terms) return sgd_chunk_of<P, M, Decayed>(chunk, options);
    if (terms == Nesterov::terms) return sgd_chunk_of<P, M, Nesterov>(chunk, options);
    if (terms == Undecayed::terms) return sgd_chunk_of<P, M, Undecayed>(chunk, options);
  }
  sgd_chunk_of<P, M, AnyTerms>(chunk, options);
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
