// Tests of csrc/cuda/sgd.h, run on the host: the formula in double, tensors on either side of a tile and a chunk, and
// what must not be touched.
#include "cuda/sgd.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "device.h"
#include "sanitizers.h"

namespace {

using namespace granet;

constexpr std::array<int64_t, 10> kSizes = {0, 1, 33, 1023, 1024, 1025, 8191, 8192, 8193, 20'000};

struct Case {
  const char* name;
  cuda::SgdOptions options;
};

template <typename Param>
using Average = std::conditional_t<std::is_same_v<Param, double>, double, float>;

template <typename Param, typename Momentum>
struct Tensor {
  std::vector<Param> param, grad;
  std::vector<Momentum> momentum;
  std::vector<Average<Param>> average;
  Bytes mask, packed;
};

template <typename Param, typename Momentum>
Tensor<Param, Momentum> tensor(int64_t numel, size_t offset, double active) {
  Tensor<Param, Momentum> t;
  const auto with_offset = static_cast<int64_t>(offset) + numel;
  t.param = random_numbers<Param>(with_offset);
  t.grad = random_numbers<Param>(with_offset);
  std::reverse(t.grad.begin(), t.grad.end());
  t.momentum = random_numbers<Momentum>(with_offset);
  t.average = random_numbers<Average<Param>>(with_offset);
  std::rotate(t.average.begin(), t.average.begin() + with_offset / 3, t.average.end());
  t.mask = random_mask(numel, active);
  t.packed = pack(t.mask);
  for (size_t i = t.mask.size(); i < 8 * t.packed.size(); ++i) {  // bits of no weight, which must not matter
    t.packed[i >> 3] |= static_cast<uint8_t>(1 << (i & 7));
  }
  for (size_t i = 0; i < t.mask.size(); ++i) {  // whoever lets the inactive in shows
    if (t.mask[i] == 0) t.grad[offset + i] = std::numeric_limits<Param>::quiet_NaN();
  }
  return t;
}

template <typename Param, typename Momentum>
void expect_step(const Tensor<Param, Momentum>& old, const Tensor<Param, Momentum>& now, size_t offset,
                 const cuda::SgdOptions& options, const std::string& name) {
  const double scale = options.grad_scale.number, bound = sizeof(Param) == 8 ? 1e-14 : 1e-5;
  for (size_t i = 0; i < old.param.size(); ++i) {
    const bool is_active = i >= offset && old.mask[i - offset] != 0;
    double weight = old.param[i], velocity = old.momentum[i], average = old.average[i];
    if (is_active) {
      double step = (options.maximize ? -1 : 1) * static_cast<double>(old.grad[i]) / scale;
      step += options.weight_decay * weight;
      if (options.momentum != 0) {
        velocity = options.first ? step : options.momentum * velocity + (1 - options.dampening) * step;
        step = options.nesterov ? step + options.momentum * velocity : velocity;
      }
      weight -= options.lr.number * step;
      if (options.is_averaged) average += (1 - options.average_decay) * (now.param[i] - average);
    }
    const double tolerance = is_active ? bound : 0;
    if (!(std::fabs(now.param[i] - weight) <= tolerance) || !(std::fabs(now.momentum[i] - velocity) <= tolerance) ||
        !(std::fabs(now.average[i] - average) <= tolerance)) {
      return expect(false, name, static_cast<int64_t>(old.param.size()));
    }
  }
}

template <typename Param, typename Momentum>
void test_step(const Case& test, Dtype param, Dtype momentum, size_t offset, double active) {
  std::vector<Tensor<Param, Momentum>> tensors;
  for (const int64_t numel : kSizes) tensors.push_back(tensor<Param, Momentum>(numel, offset, active));
  const auto old = tensors;
  const bool has_momentum = test.options.momentum != 0;
  cuda::TableRows rows(3 + has_momentum + test.options.is_averaged, /*further=*/0, cuda::kSgdChunk);
  for (size_t t = 0; t < tensors.size(); ++t) {
    rows.begin_row(kSizes[t]);
    rows.add(tensors[t].param.data() + offset);
    rows.add(tensors[t].grad.data() + offset);
    rows.add(tensors[t].packed.data());
    if (has_momentum) rows.add(tensors[t].momentum.data() + offset);
    if (test.options.is_averaged) rows.add(tensors[t].average.data() + offset);
  }
  WrittenTable table(rows);
  const cudaError_t error = cuda::launch_masked_sgd(table.get(), param, momentum, test.options, nullptr);
  expect(error == cudaSuccess, test.name, -1);
  for (size_t t = 0; t < tensors.size(); ++t) expect_step(old[t], tensors[t], offset, test.options, test.name);
}

// Numbers that lie on the device, and the flag that stops everything.
void test_scalars() {
  const float lr = 0.25F, scale = 4, no_inf = 0, inf = 1;
  for (const float* found_inf : {&no_inf, &inf}) {
    auto one = tensor<float, float>(1500, 0, 0.5);
    const auto old = one;
    cuda::TableRows rows(/*lists=*/4, /*further=*/0, cuda::kSgdChunk);
    rows.begin_row(1500);
    rows.add(one.param.data());
    rows.add(one.grad.data());
    rows.add(one.packed.data());
    rows.add(one.average.data());
    WrittenTable table(rows);
    cuda::SgdOptions options = {.lr = {.number = 99, .address = &lr},
                                .grad_scale = {.number = 99, .address = &scale},
                                .found_inf = found_inf,
                                .is_averaged = true,
                                .average_decay = 0.5};
    expect(cuda::launch_masked_sgd(table.get(), Dtype::kFloat32, Dtype::kFloat32, options, nullptr) == cudaSuccess,
           "scalars", 0);
    options.lr = {.number = lr};
    options.grad_scale = {.number = scale};
    if (*found_inf == 0) {
      expect_step(old, one, 0, options, "scalars on the device");
    } else {
      expect(one.param == old.param && one.average == old.average, "nothing changes where a gradient is infinite", 0);
    }
  }
}

}  // namespace

int main() {
  const std::array<Case, 9> cases = {{
      {"plain", {.lr = {.number = 0.1}}},
      {"momentum", {.lr = {.number = 0.1}, .momentum = 0.9, .weight_decay = 0.01}},
      {"first", {.lr = {.number = 0.1}, .momentum = 0.9, .dampening = 0.5, .first = true}},
      {"dampening", {.lr = {.number = 0.1}, .momentum = 0.9, .dampening = 0.5}},
      {"nesterov", {.lr = {.number = 0.1}, .momentum = 0.9, .nesterov = true}},
      {"maximize", {.lr = {.number = 0.1}, .weight_decay = 0.5, .grad_scale = {.number = 8}, .maximize = true}},
      {"average", {.lr = {.number = 0.1}, .is_averaged = true, .average_decay = 0.9}},
      {"average, momentum", {.lr = {.number = 0.1}, .momentum = 0.9, .is_averaged = true, .average_decay = 0.999}},
      {"average, small decay", {.lr = {.number = 0.1}, .momentum = 0.9, .is_averaged = true, .average_decay = 0.25}},
  }};
  for (const Case& test : cases) test_step<float, float>(test, Dtype::kFloat32, Dtype::kFloat32, 0, 0.1);
  for (const size_t offset : {0, 1}) {
    for (const double active : {0.0, 0.5, 1.0}) {
      if (kThreadSanitizer && active != 0.5) continue;  // a thread of the device costs a millisecond
      test_step<float, float>(cases[1], Dtype::kFloat32, Dtype::kFloat32, offset, active);
      test_step<double, double>(cases[4], Dtype::kFloat64, Dtype::kFloat64, offset, active);
    }
    test_step<float, double>(cases[1], Dtype::kFloat32, Dtype::kFloat64, offset, 0.3);
    test_step<float, float>(cases[7], Dtype::kFloat32, Dtype::kFloat32, offset, 0.3);
    test_step<double, double>(cases[8], Dtype::kFloat64, Dtype::kFloat64, offset, 0.3);
    test_step<double, double>(cases[6], Dtype::kFloat64, Dtype::kFloat64, offset, 0.3);
  }
  test_scalars();
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
