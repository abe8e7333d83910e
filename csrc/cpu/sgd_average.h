// The averages of a chunk, for each dtype of the weights: compiled once for each instruction set.
//
// A pass of its own over weights that the step has just written, which are still in a cache (sgd.cpp), rather than a
// term of the step: that is compiled for 16 pairs of dtypes and four sets of terms already.
#pragma once

#include "cpu/sgd_walk.h"

namespace granet::cpu::GRANET_ISA {

// average + (1 - decay) * (weight - average), as torch.lerp computes it: from the nearer end, so that with a decay of 0
// it is the weight, and with 1 the average.
template <typename P>
class AverageUpdate {
  using A = Compute<P>;
  static constexpr int64_t n = kLanesOf<A>;

 public:
  explicit AverageUpdate(double decay)
      : is_from_average_(static_cast<A>(1 - decay) < static_cast<A>(0.5)),
        factor_(is_from_average_ ? static_cast<A>(1 - decay) : static_cast<A>(1 - decay) - 1) {}

  template <bool all>
  void group(const AverageChunk& chunk, int64_t g, uint32_t mask) const {
    A* average = static_cast<A*>(chunk.average) + g * kMaxLanes;
    const P* param = static_cast<const P*>(chunk.param) + g * kMaxLanes;
    for (int64_t i = 0; i < kMaxLanes; i += n) lanes<all>(average + i, param + i, mask >> i);
  }

  template <int level>
  static void prefetch(const AverageChunk& chunk, int64_t g) {
    __builtin_prefetch(static_cast<A*>(chunk.average) + kMaxLanes * g, kToRead, level);
  }

 private:
  template <bool all>
  void lanes(A* average, const P* param, uint32_t mask) const {
    const auto bits = load_bits<n>(average);
    const Lanes<A, n> old = Coding<A, n>::decode(bits);
    const Lanes<A, n> weight = Coding<P, n>::decode(load_bits<n>(param));
    const Lanes<A, n> moved =
        multiply_add<A, n>(weight - old, Lanes<A, n>{} + factor_, is_from_average_ ? old : weight);
    write<n, all>(average, Coding<A, n>::encode(moved), bits, mask);
  }

  const bool is_from_average_;
  const A factor_;
};

template <typename P>
void average_chunk(const AverageChunk& chunk, double decay) {
  const AverageUpdate<P> update(decay);
  if (chunk.is_listed) {
    listed_groups(update, chunk);
  } else {
    all_groups(update, chunk);
  }
}

inline AverageKernel average_kernel_of(Dtype param) {
  switch (param) {
    case Dtype::kFloat32:
      return average_chunk<float>;
    case Dtype::kBfloat16:
      return average_chunk<Bfloat16>;
    case Dtype::kFloat16:
      return average_chunk<Float16>;
    default:
      return average_chunk<double>;
  }
}

}  // namespace granet::cpu::GRANET_ISA
