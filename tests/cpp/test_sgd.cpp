// Tests of csrc/cpu/sgd.h against one weight at a time, bit for bit. Buffers have exactly the sizes of the contract.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <type_traits>
#include <vector>

#include "common/bits.h"
#include "common/isa.h"
#include "cpu/sgd.h"
#include "floats.h"
#include "sanitizers.h"
#include "threads.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace {

using namespace granet;
using namespace granet::cpu;
using Bytes = std::vector<std::byte>;

int failures = 0;

void expect(bool holds, const char* what, Dtype param, Dtype momentum, int64_t numel) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s, dtypes %d and %d, numel = %lld\n", what, static_cast<int>(param), static_cast<int>(momentum),
              static_cast<long long>(numel));
}

struct Weights {
  int64_t numel;
  std::vector<uint8_t> mask;
  Bytes param, grad, momentum, average;
};

Dtype average_dtype(Dtype param) { return param == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32; }

constexpr int kMostWeights = 65'537;

// Random numbers, drawn once: drawing them for each case took longer than all that is tested.
struct Draws {
  Draws() {
    std::mt19937_64 generator(0);
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> uniform;
    for (double& value : normals) value = normal(generator);
    for (double& value : uniforms) value = uniform(generator);
  }
  std::vector<double> normals = std::vector<double>(4 * kMostWeights);
  std::vector<double> uniforms = std::vector<double>(kMostWeights);
};

Weights random_weights(int64_t numel, double active, Dtype param, Dtype momentum) {
  static const Draws draws;
  const auto size = [](int64_t count, Dtype dtype) { return static_cast<size_t>(count * item_size(dtype)); };
  const Dtype average = average_dtype(param);
  Weights weights{numel,
                  {},
                  Bytes(size(numel, param)),
                  Bytes(size(numel, param)),
                  Bytes(size(numel, momentum)),
                  Bytes(size(numel, average))};
  weights.mask.resize(static_cast<size_t>(mask_bytes(numel)));
  const double* normal = draws.normals.data();
  for (int64_t i = 0; i < numel; ++i) {
    const bool is_drawn = draws.uniforms[static_cast<size_t>(i)] < active;
    if (is_drawn) weights.mask[static_cast<size_t>(i / 8)] |= static_cast<uint8_t>(1 << (i % 8));
    store(&weights.param[size(i, param)], *normal++, param);
    store(&weights.grad[size(i, param)], *normal++, param);
    store(&weights.momentum[size(i, momentum)], *normal++, momentum);
    store(&weights.average[size(i, average)], *normal++, average);
  }
  return weights;
}

template <typename T>
T multiply_add(T a, T b, T c) {
#if GRANET_X86
  if (isa() == Isa::kPortable) return static_cast<T>(static_cast<T>(a * b) + c);
#endif
  return std::fma(a, b, c);
}

// The definition, with G, V and C the compute dtypes of the parameter, of the momentum, and the wider of the two.
template <typename G, typename V>
void update_one(std::byte* param, const std::byte* grad, std::byte* momentum, Dtype param_dtype, Dtype momentum_dtype,
                const SgdOptions& o) {
  using C = std::conditional_t<(sizeof(G) > sizeof(V)), G, V>;
  const G weight = static_cast<G>(load(param, param_dtype));
  G gradient = static_cast<G>(load(grad, param_dtype)) / static_cast<G>(o.grad_scale);
  if (o.maximize) gradient = -gradient;
  if (o.weight_decay != 0) gradient = multiply_add(weight, static_cast<G>(o.weight_decay), gradient);
  C step = gradient;
  if (o.momentum != 0) {
    const V slowed = static_cast<V>(static_cast<V>(load(momentum, momentum_dtype)) * static_cast<V>(o.momentum));
    const C velocity = o.first ? step : multiply_add(step, static_cast<C>(1 - o.dampening), static_cast<C>(slowed));
    store(momentum, static_cast<double>(velocity), momentum_dtype);
    step = o.nesterov ? multiply_add(velocity, static_cast<C>(o.momentum), step) : velocity;
  }
  const C updated = multiply_add(step, static_cast<C>(-o.lr), static_cast<C>(weight));
  store(param, static_cast<double>(static_cast<G>(updated)), param_dtype);
}

// Of the weight as it is stored, in its compute dtype A.
template <typename A>
void average_one(std::byte* average, const std::byte* param, Dtype dtype, double decay) {
  const Dtype averaged = average_dtype(dtype);
  const A old = static_cast<A>(load(average, averaged)), weight = static_cast<A>(load(param, dtype));
  const A share = static_cast<A>(1 - decay);
  const A moved = share < static_cast<A>(0.5) ? multiply_add(share, weight - old, old)
                                              : multiply_add(share - 1, weight - old, weight);
  store(average, static_cast<double>(moved), averaged);
}

void update_all(Weights& weights, Dtype param, Dtype momentum, const SgdOptions& options) {
  const bool wide_param = param == Dtype::kFloat64,
             wide_momentum = options.momentum != 0 && momentum == Dtype::kFloat64;
  const auto one = wide_param ? (momentum == Dtype::kFloat64 || options.momentum == 0 ? update_one<double, double>
                                                                                      : update_one<double, float>)
                              : (wide_momentum ? update_one<float, double> : update_one<float, float>);
  for (int64_t i = 0; i < weights.numel; ++i) {
    if (!is_active(weights.mask[static_cast<size_t>(i / 8)], i)) continue;
    const auto p = static_cast<size_t>(i * item_size(param)), m = static_cast<size_t>(i * item_size(momentum));
    one(&weights.param[p], &weights.grad[p], &weights.momentum[m], param, momentum, options);
    std::byte* average = &weights.average[static_cast<size_t>(i * item_size(average_dtype(param)))];
    const auto average_it = wide_param ? average_one<double> : average_one<float>;
    average_it(average, &weights.param[p], param, options.average_decay);
  }
}

std::vector<SgdTensor> tensors_of(std::vector<Weights>& list, bool is_averaged) {
  std::vector<SgdTensor> tensors;
  for (Weights& w : list) {
    tensors.push_back({w.param.data(), w.grad.data(), w.momentum.data(), w.mask.data(), w.numel,
                       is_averaged ? w.average.data() : nullptr});
  }
  return tensors;
}

// A decay of kNoAverage stands for a step without averages.
constexpr double kNoAverage = -1;

void test_update(Dtype param, Dtype momentum, const SgdOptions& options, const Parallel& parallel) {
  const bool is_averaged = options.average_decay != kNoAverage;
  std::vector<Weights> weights, expected;
  // Around a group, a word of groups, a chunk of 65 536 weights; densities on both sides of every change of method.
  for (const int64_t numel : {0, 1, 7, 8, 9, 63, 64, 65, 1009, 33'001, 65'535, 65'536, kMostWeights}) {
    if (kAddressSanitizer && numel == 33'001) continue;  // ends inside a chunk, as 1009 does
    for (const double active : {0.0, 0.002, 0.02, 0.1, 0.5, 1.0}) {
      weights.push_back(random_weights(numel, active, param, momentum));
    }
  }
  expected = weights;
  masked_sgd(tensors_of(weights, is_averaged), param, momentum, options, parallel);
  for (size_t i = 0; i < weights.size(); ++i) {
    const Bytes averages = expected[i].average;
    update_all(expected[i], param, momentum, options);
    if (!is_averaged) expected[i].average = averages;
    expect(weights[i].param == expected[i].param, "param", param, momentum, weights[i].numel);
    expect(weights[i].momentum == expected[i].momentum, "momentum", param, momentum, weights[i].numel);
    expect(weights[i].average == expected[i].average, "average", param, momentum, weights[i].numel);
    expect(weights[i].grad == expected[i].grad, "grad", param, momentum, weights[i].numel);
  }
}

void test_inactive_weights_keep_their_bits() {
  for (const int byte : {0x00, 0x01, 0x80, 0xa5, 0xfe}) {
    std::vector<uint32_t> param(8, 0x7fa0'0001), momentum(8, 0xffa0'0001), grad(8, 0x7f80'0000);  // signalling NaN
    std::vector<uint32_t> average(8, 0x7fa0'0002);
    const auto bits = static_cast<uint8_t>(byte);
    const std::vector<uint8_t> mask = {bits};
    masked_sgd({{param.data(), grad.data(), momentum.data(), mask.data(), 8, average.data()}}, Dtype::kFloat32,
               Dtype::kFloat32, {.lr = 0.1, .momentum = 0.9, .average_decay = 0.9}, Serial());
    for (int64_t i = 0; i < 8; ++i) {
      if (is_active(bits, i)) continue;
      const auto at = static_cast<size_t>(i);
      expect(param[at] == 0x7fa0'0001 && momentum[at] == 0xffa0'0001 && average[at] == 0x7fa0'0002, "inactive bits",
             Dtype::kFloat32, Dtype::kFloat32, i);
    }
  }
}

#ifdef __linux__
// Weights on pages that must not be touched: the processor itself watches.
void test_inactive_groups_are_not_touched() {
  const int64_t page = sysconf(_SC_PAGESIZE), weights = page / 4;
  const auto map = [&] {
    void* pages =
        mmap(nullptr, static_cast<size_t>(3 * page), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(static_cast<std::byte*>(pages) + page, static_cast<size_t>(page), PROT_NONE);
    return pages;
  };
  void *param = map(), *grad = map(), *momentum = map(), *average = map();
  for (const int bits : {0x10, 0xff}) {
    std::vector<uint8_t> mask(static_cast<size_t>(3 * weights / 8), static_cast<uint8_t>(bits));
    std::fill_n(mask.begin() + weights / 8, weights / 8, uint8_t{0});
    masked_sgd({{param, grad, momentum, mask.data(), 3 * weights, average}}, Dtype::kFloat32, Dtype::kFloat32,
               {.lr = 0.1, .momentum = 0.9, .average_decay = 0.9}, Serial());
  }
  for (void* pages : {param, grad, momentum, average}) munmap(pages, static_cast<size_t>(3 * page));
}
#endif

}  // namespace

int main() {
  constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kBfloat16, Dtype::kFloat16, Dtype::kFloat64};
  constexpr SgdOptions kPlain = {.lr = 0.1, .average_decay = kNoAverage};
  constexpr SgdOptions kPlainAveraged = {.lr = 0.1, .average_decay = 0.25};  // from the weight's end
  constexpr SgdOptions kMomentum = {.lr = 0.1, .momentum = 0.9, .weight_decay = 1e-4, .average_decay = 0.999};
  constexpr SgdOptions kUndecayed = {.lr = 0.1, .momentum = 0.9, .average_decay = kNoAverage};
  constexpr SgdOptions kNesterov = {
      .lr = 0.1, .momentum = 0.9, .weight_decay = 1e-4, .nesterov = true, .average_decay = 1};
  constexpr SgdOptions kEverything = {.lr = 0.03,
                                      .momentum = 0.9,
                                      .dampening = 0.3,
                                      .weight_decay = 5e-4,
                                      .grad_scale = 12,
                                      .nesterov = true,
                                      .maximize = true,
                                      .average_decay = kNoAverage};
  constexpr SgdOptions kFirst = {.lr = 0.1, .momentum = 0.9, .dampening = 0.3, .first = true, .average_decay = 0};
  if (kThreadSanitizer) {  // has nothing to find where one thread runs; borders depend on the sizes of elements alone
    for (const Dtype param : {Dtype::kBfloat16, Dtype::kFloat32, Dtype::kFloat64}) {
      test_update(param, param, kMomentum, StdThreads(3));
      test_update(param, Dtype::kFloat32, kMomentum, StdThreads(3));
      test_update(param, param, kPlainAveraged, StdThreads(3));
    }
    return failures == 0 ? 0 : 1;
  }
  for (const Dtype param : kDtypes) {
    for (const Dtype momentum : kDtypes) {
      test_update(param, momentum, kEverything, Serial());
      test_update(param, momentum, kMomentum, StdThreads(3));
    }
    test_update(param, param, kPlain, Serial());
    test_update(param, param, kPlainAveraged, StdThreads(3));
    test_update(param, param, kUndecayed, Serial());
    test_update(param, param, kNesterov, Serial());
    test_update(param, param, kFirst, Serial());
  }
  test_inactive_weights_keep_their_bits();
#ifdef __linux__
  test_inactive_groups_are_not_touched();
#endif
  if (failures == 0) std::puts("all passed");
  return failures == 0 ? 0 : 1;
}
