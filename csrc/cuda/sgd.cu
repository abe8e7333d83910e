#include "cuda/sgd.h"

#include <algorithm>
#include <bit>

#include "cuda/device.h"
#include "cuda/numbers.cuh"
#include "cuda/tile.cuh"

namespace granet::cuda {
namespace {

struct SgdTraits {
  static constexpr int kThreads = 256;  // a tile for each of eight warps: a chunk
  // Bytes that a lane reads before it writes the first, so that memory's latency is covered: four vectors of fp32 with
  // momentum. At 90 % sparsity two thirds of them are skipped. With averages two of them fit, and take so few registers
  // that on sm_80 and sm_90 a third block is resident: as many bytes in all.
  static constexpr int kAtOnceBytes = 192;
  static constexpr int kAtOnceWeights = 16;     // more of 16 bits, each in a register of its own, did not fit
  static constexpr int kBlocksOnProcessor = 2;  // leaves 128 registers for a thread
};
static_assert(kSgdChunk == SgdTraits::kThreads / kWarpSize * kTile);

struct None {};  // in the place of momenta, or averages, that do not exist

template <typename T>
constexpr bool kExists = !std::is_same_v<T, None>;

enum SgdList { kParam, kGrad, kMask, kMomentum };

template <typename Momentum>
constexpr int kAverage = kMomentum + (kExists<Momentum> ? 1 : 0);

template <typename Number>
struct Scalar {
  Number number;
  const Number* address;

  __device__ __forceinline__ Number get() const { return address == nullptr ? number : *address; }
};

// The options, in the number type that is computed in.
template <typename Number>
struct Rule {
  Scalar<Number> lr;
  Scalar<Number> grad_scale;
  const float* found_inf;
  Number momentum;
  Number gain;  // 1 - dampening
  Number weight_decay;
  Number average_share;  // 1 - average_decay
  bool nesterov;
  bool maximize;
  bool first;
};

// average + share * (weight - average), as torch.lerp computes it: from the nearer end, so that with a share of 1 it is
// the weight, and with 0 the average.
template <typename Number>
__device__ __forceinline__ Number lerp(Number average, Number weight, Number share) {
  const bool from_average = share < Number{0.5};
  return fused(weight - average, from_average ? share : share - 1, from_average ? average : weight);
}

// As it is applied: with the numbers that lie on the device.
template <typename Param, typename Momentum, typename Average>
struct Update {
  using Number = Compute<Param, Momentum>;
  using OfParam = Compute<Param>;
  using OfMomentum = Compute<Momentum>;

  Rule<Number> rule;
  Number lr;
  OfParam factor;  // of gradients: 1 / grad_scale, exact where that is a power of two, as a GradScaler's is

  __device__ __forceinline__ explicit Update(const Rule<Number>& rule)
      : rule(rule), lr(rule.lr.get()), factor(OfParam{1} / static_cast<OfParam>(rule.grad_scale.get())) {
    if (rule.maximize) factor = -factor;
  }

  __device__ __forceinline__ void apply(Param& param, Param grad, Momentum& momentum, Average& average) const {
    const OfParam weight = widened<OfParam>(param);
    OfParam decayed = widened<OfParam>(grad) * factor;
    if (rule.weight_decay != 0) decayed = fused(weight, static_cast<OfParam>(rule.weight_decay), decayed);
    auto step = static_cast<Number>(decayed);
    if constexpr (kExists<Momentum>) {
      Number velocity = step;
      if (!rule.first) {
        const OfMomentum kept = widened<OfMomentum>(momentum) * static_cast<OfMomentum>(rule.momentum);
        velocity = fused(step, rule.gain, static_cast<Number>(kept));
      }
      momentum = rounded<Momentum>(velocity);
      step = rule.nesterov ? fused(velocity, rule.momentum, step) : velocity;
    }
    param = rounded<Param>(fused(step, -lr, static_cast<Number>(weight)));
    if constexpr (kExists<Average>) {
      average = lerp(average, widened<OfParam>(param), static_cast<OfParam>(rule.average_share));
    }
  }
};

// The tensors of a tile, from its first element on.
template <typename Param, typename Momentum, typename Average>
struct Operands {
  Param* param;
  const Param* grad;
  Momentum* momentum;
  Average* average;

  __device__ __forceinline__ bool are_aligned() const {
    return is_aligned(param) && is_aligned(grad) && (!kExists<Momentum> || is_aligned(momentum)) &&
           (!kExists<Average> || is_aligned(average));
  }
};

template <typename T, int kCount>
constexpr int kVectorBytes = kExists<T> ? kCount * static_cast<int>(sizeof(T)) : 0;

template <typename Param, typename Momentum, typename Average>
__device__ __forceinline__ void update_vectors(const Operands<Param, Momentum, Average>& tile, uint32_t word,
                                               const Update<Param, Momentum, Average>& update) {
  constexpr int kCount = kAccessBytes / sizeof(Param);
  constexpr int kBytes = 2 * kAccessBytes + kVectorBytes<Momentum, kCount> + kVectorBytes<Average, kCount>;
  constexpr unsigned kMost = std::min(SgdTraits::kAtOnceBytes / kBytes, SgdTraits::kAtOnceWeights / kCount);
  constexpr int kAtOnce = std::bit_floor(kMost);
  static_assert(kSteps<kCount> % kAtOnce == 0);
#pragma unroll 1
  for (int step = 0; step < kSteps<kCount>; step += kAtOnce) {
    uint32_t bits[kAtOnce];
    Vector<Param, kCount> param[kAtOnce], grad[kAtOnce];
    Vector<Momentum, kCount> momentum[kAtOnce];
    Vector<Average, kCount> average[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int place = place_of<kCount>(step + i);
      bits[i] = bits_of<kCount>(word, step + i);
      if (bits[i] == 0) continue;
      param[i] = *vectors<Param, kCount>(tile.param + place);
      grad[i] = *vectors<Param, kCount>(tile.grad + place);
      if constexpr (kExists<Momentum>) momentum[i] = *vectors<Momentum, kCount>(tile.momentum + place);
      if constexpr (kExists<Average>) average[i] = *vectors<Average, kCount>(tile.average + place);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int place = place_of<kCount>(step + i);
      if (bits[i] == 0) continue;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if (bits[i] >> j & 1) update.apply(param[i].of[j], grad[i].of[j], momentum[i].of[j], average[i].of[j]);
      }
      *vectors<Param, kCount>(tile.param + place) = param[i];
      if constexpr (kExists<Momentum>) *vectors<Momentum, kCount>(tile.momentum + place) = momentum[i];
      if constexpr (kExists<Average>) *vectors<Average, kCount>(tile.average + place) = average[i];
    }
  }
}

template <typename Param, typename Momentum, typename Average>
__device__ __forceinline__ void update_elements(const Operands<Param, Momentum, Average>& tile, uint32_t word,
                                                int64_t left, const Update<Param, Momentum, Average>& update) {
#pragma unroll 1
  for (int step = 0; step < kSteps<1> && place_of<1>(step) - lane() < left; ++step) {
    const int place = place_of<1>(step);
    if (bits_of<1>(word, step) == 0 || place >= left) continue;
    Momentum momentum{};
    Average average{};
    if constexpr (kExists<Momentum>) momentum = tile.momentum[place];
    if constexpr (kExists<Average>) average = tile.average[place];
    update.apply(tile.param[place], tile.grad[place], momentum, average);
    if constexpr (kExists<Momentum>) tile.momentum[place] = momentum;
    if constexpr (kExists<Average>) tile.average[place] = average;
  }
}

template <typename Param, typename Momentum, typename Average>
__global__ void __launch_bounds__(SgdTraits::kThreads, SgdTraits::kBlocksOnProcessor)
    masked_sgd_kernel(Table tensors, const __grid_constant__ Rule<Compute<Param, Momentum>> rule) {
  if (rule.found_inf != nullptr && *rule.found_inf != 0) return;
  const Update<Param, Momentum, Average> update(rule);
  for (int64_t chunk = blockIdx.x; chunk < tensors.chunks; chunk += gridDim.x) {
    const Place place = locate(tensors, chunk);
    if (place.tile.left <= 0) continue;
    const uint32_t word = load_word_of(place.address<const uint8_t>(kMask), place.tile);
    if (!__any_sync(kWholeWarp, word != 0)) continue;
    const int64_t first = place.tile.first;
    Operands<Param, Momentum, Average> tile = {place.address<Param>(kParam) + first,
                                               place.address<const Param>(kGrad) + first, nullptr, nullptr};
    if constexpr (kExists<Momentum>) tile.momentum = place.address<Momentum>(kMomentum) + first;
    if constexpr (kExists<Average>) tile.average = place.address<Average>(kAverage<Momentum>) + first;
    if (place.tile.is_whole() && tile.are_aligned()) {
      update_vectors(tile, word, update);
    } else {
      update_elements(tile, word, place.tile.left, update);
    }
  }
}

template <typename Number>
Scalar<Number> of_number(const SgdScalar& scalar) {
  return {static_cast<Number>(scalar.number), static_cast<const Number*>(scalar.address)};
}

template <typename Param, typename Momentum, typename Average>
cudaError_t launch_kernel(const Table& tensors, const SgdOptions& options, cudaStream_t stream) {
  using Number = Compute<Param, Momentum>;
  const Rule<Number> rule = {.lr = of_number<Number>(options.lr),
                             .grad_scale = of_number<Number>(options.grad_scale),
                             .found_inf = options.found_inf,
                             .momentum = static_cast<Number>(options.momentum),
                             .gain = static_cast<Number>(1 - options.dampening),
                             .weight_decay = static_cast<Number>(options.weight_decay),
                             .average_share = static_cast<Number>(1 - options.average_decay),
                             .nesterov = options.nesterov,
                             .maximize = options.maximize,
                             .first = options.first};
  return launch_resident(masked_sgd_kernel<Param, Momentum, Average>, SgdTraits::kThreads, tensors.chunks, stream,
                         tensors, rule);
}

template <typename Param, typename Momentum>
cudaError_t launch_step(const Table& tensors, const SgdOptions& options, cudaStream_t stream) {
  if (!options.is_averaged) return launch_kernel<Param, Momentum, None>(tensors, options, stream);
  return launch_kernel<Param, Momentum, Compute<Param>>(tensors, options, stream);
}

}  // namespace

cudaError_t launch_masked_sgd(const Table& tensors, Dtype param, Dtype momentum, const SgdOptions& options,
                              cudaStream_t stream) {
  return with_dtype(param, [&]<typename OfParam>(OfParam) {
    using Param = typename OfParam::Type;
    if (options.momentum == 0) return launch_step<Param, None>(tensors, options, stream);
    return with_dtype(momentum, [&]<typename OfMomentum>(OfMomentum) {
      return launch_step<Param, typename OfMomentum::Type>(tensors, options, stream);
    });
  });
}

}  // namespace granet::cuda
