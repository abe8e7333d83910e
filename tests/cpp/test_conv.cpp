// Tests of csrc/cpu/conv.h against the definition of a convolution, on tensors of exactly the sizes that the contracts
// name, so that a sanitizer sees the first byte read or written beyond them.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "common/bits.h"
#include "common/isa.h"
#include "cpu/active.h"
#include "cpu/conv.h"
#include "cpu/mask.h"
#include "cpu/stencil_index.h"
#include "sanitizers.h"
#include "threads.h"

namespace {

using namespace granet;
using namespace granet::cpu;
using Floats = std::vector<float>;

int failures = 0;
int places[3] = {};  // problems read in place: pointwise, and not; and packed
int pairs = 0;       // gradients of contiguous inputs whose images are interleaved and whose columns are in pairs
std::mt19937 generator(0);

int64_t pick(std::initializer_list<int64_t> choices) {
  return *(choices.begin() + std::uniform_int_distribution<size_t>(0, choices.size() - 1)(generator));
}

Floats random_floats(int64_t count) {
  std::normal_distribution<float> draw;
  Floats values(static_cast<size_t>(count));
  for (float& value : values) value = draw(generator);
  return values;
}

// An owned image tensor (images, channels, h, w), contiguous or channels_last.
struct Images {
  Floats values;
  int64_t channels;
  Pair size;
  bool channels_last;

  ImageView view() {
    const int64_t pixels = size.h * size.w;
    if (channels_last) {
      return {values.data(), Element::kFloat32, pixels * channels, 1, size.w * channels, channels, 0};
    }
    return {values.data(), Element::kFloat32, pixels * channels, pixels, size.w, 1, 0};
  }
  ImageView pixels_view() {
    ImageView flat = view();
    flat.y_stride = flat.x_stride;
    flat.pixels = size.h * size.w;
    return flat;
  }
  float& at(int64_t n, int64_t c, int64_t y, int64_t x) {
    const ImageView v = view();
    return values[static_cast<size_t>(n * v.image_stride + c * v.channel_stride + y * v.y_stride + x * v.x_stride)];
  }
};

Images images(int64_t batch, int64_t channels, Pair size, bool channels_last, bool random) {
  const int64_t count = batch * channels * size.h * size.w;
  return {random ? random_floats(count) : Floats(static_cast<size_t>(count), NAN), channels, size, channels_last};
}

struct Problem {
  ConvShape shape;
  Floats weight;  // contiguous, 0 where inactive
  std::vector<uint8_t> mask;
};

// Random weights, and a random mask.
Problem problem_of(const ConvShape& s, double density) {
  Problem p{.shape = s, .weight = random_floats(s.weights()), .mask = {}};
  std::bernoulli_distribution active(density);
  std::vector<uint8_t> bits(p.weight.size());
  for (size_t i = 0; i < bits.size(); ++i) {
    bits[i] = active(generator);
    if (!bits[i]) p.weight[i] = 0.0f;
  }
  p.mask.resize(static_cast<size_t>(mask_bytes(s.weights())));
  pack_mask(bits.data(), s.weights(), p.mask.data());
  return p;
}

Problem random_problem() {
  ConvShape s{};
  s.groups = pick({1, 1, 2, 3});
  s.batch = pick({1, 2, 5, 8, 16, 17});
  s.channels = s.groups * pick({1, 3, 8, 13});
  s.out_channels = s.groups * pick({1, 2, 7, 11});
  s.kernel = {pick({1, 1, 3, 5}), pick({1, 1, 3, 4})};
  s.stride = {pick({1, 1, 2, 3}), pick({1, 1, 2})};
  s.padding = {pick({0, 1, 2}), pick({0, 1, 3})};
  s.dilation = {pick({1, 1, 2}), pick({1, 1, 3})};
  if (pick({0, 1}) == 1) s.kernel = s.stride = {1, 1}, s.padding = {0, 0};
  if (pick({0, 1}) == 1) {  // output and input have the same pixels
    s.stride = {1, 1};
    if (s.kernel.w % 2 == 0) s.kernel.w = 3;
    s.padding = {(s.kernel.h - 1) * s.dilation.h / 2, (s.kernel.w - 1) * s.dilation.w / 2};
  }
  s.input = {(s.kernel.h - 1) * s.dilation.h + pick({1, 2, 7, 15}),
             (s.kernel.w - 1) * s.dilation.w + pick({1, 4, 7, 9, 14, 22, 37})};
  return problem_of(s, static_cast<double>(pick({0, 1, 3, 10})) / 10);
}

// multiply(weight, input element, output element) for every product of a convolution.
template <typename Multiply>
void for_each_product(const ConvShape& s, Images& input, Images& output, const Multiply& multiply) {
  const int64_t group_outputs = s.out_channels / s.groups;
  for (int64_t n = 0; n < s.batch; ++n) {
    for (int64_t o = 0; o < s.out_channels; ++o) {
      for (int64_t i = 0; i < output.size.h * output.size.w; ++i) {
        for (int64_t e = 0; e < s.filter_size(); ++e) {
          const int64_t c = e / (s.kernel.h * s.kernel.w);
          const int64_t kh = e / s.kernel.w % s.kernel.h;
          const int64_t kw = e % s.kernel.w;
          const int64_t y = i / output.size.w * s.stride.h + kh * s.dilation.h - s.padding.h;
          const int64_t x = i % output.size.w * s.stride.w + kw * s.dilation.w - s.padding.w;
          if (y < 0 || y >= s.input.h || x < 0 || x >= s.input.w) continue;
          multiply(static_cast<size_t>(o * s.filter_size() + e),
                   input.at(n, o / group_outputs * s.group_channels() + c, y, x),
                   output.at(n, o, i / output.size.w, i % output.size.w));
        }
      }
    }
  }
}

void expect_close(const char* what, const Floats& got, const Floats& expected, const Problem& p) {
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::abs(got[i] - expected[i]) <= 1e-3f * (1 + std::abs(expected[i]))) continue;
    ++failures;
    std::printf("FAILED: %s[%zu] = %g, expected %g; %lldx%lld kernel, %lld channels\n", what, i,
                static_cast<double>(got[i]), static_cast<double>(expected[i]), static_cast<long long>(p.shape.kernel.h),
                static_cast<long long>(p.shape.kernel.w), static_cast<long long>(p.shape.channels));
    return;
  }
}

struct BuiltIndex {
  std::vector<int64_t> begin;
  std::vector<int32_t> offset;
  std::vector<int32_t> rank;   // or
  std::vector<int64_t> first;  // where entries are in runs
  std::vector<int32_t> positions;
  Floats values;
  Stencil stencil;
  Plan plan;

  bool in_runs() const { return !first.empty(); }
  StencilEntries entries() const {
    return {stencil.rows(), begin.data(), offset.data(), in_runs() ? first.data() : begin.data(), values.data()};
  }
  const int32_t* ranks() const { return in_runs() ? nullptr : rank.data(); }
};

BuiltIndex build(const Problem& p, const ConvShape& shape, Direction direction, bool in_place) {
  BuiltIndex index;
  const int64_t active_count = count_weights(p.mask.data(), shape.weights());
  index.stencil = direction == Direction::kForward ? forward_stencil(shape) : input_gradient_stencil(shape);
  index.plan = plan_for(index.stencil, active_count, in_place);
  index.begin.resize(static_cast<size_t>(index.plan.blocks * index.stencil.rows() + 1));
  const auto count = static_cast<size_t>(
      count_entries(p.mask.data(), shape, WeightOrder::kContiguous, direction, index.plan, index.begin.data()));
  index.offset.resize(count);
  // What is in runs may be ranked as well.
  const auto groups = static_cast<int64_t>(index.begin.size()) - 1;
  const bool in_runs =
      entries_in_runs(WeightOrder::kContiguous, direction, index.plan, groups, active_count) && pick({0, 1}) == 1;
  if (in_runs) {
    index.first.resize(index.begin.size() - 1);
  } else {
    index.rank.resize(count);
  }
  index.positions.resize(count);
  list_active(p.mask.data(), shape.weights(), index.positions.data());
  fill_entries(p.mask.data(), shape, WeightOrder::kContiguous, direction, index.plan,
               {index.begin.data(), index.offset.data(), in_runs ? nullptr : index.rank.data(),
                in_runs ? index.first.data() : nullptr});
  index.values.resize(count);
  gather(p.weight.data(), Element::kFloat32, {index.positions.data(), active_count, true}, false, index.values.data(),
         Serial());
  if (in_runs) return index;
  const Floats active = index.values;
  gather(active.data(), Element::kFloat32, {index.rank.data(), active_count, false}, false, index.values.data(),
         Serial());
  return index;
}

// One column of all pixels, as the adaptor hands on pointwise convolutions that are packed.
ConvShape flattened(const ConvShape& s) {
  ConvShape flat = s;
  flat.batch = 1;
  flat.input = {s.batch * s.input.h * s.input.w, 1};
  return flat;
}

bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

void check(const Problem& p, bool last, const Parallel& parallel) {
  const ConvShape& s = p.shape;
  const bool pointwise = s.kernel.h * s.kernel.w * s.stride.h * s.stride.w == 1 && s.padding.h + s.padding.w == 0;
  const bool in_place = !last && can_read_in_place(s);
  places[in_place ? (pointwise ? 0 : 1) : 2] += 1;
  const ConvShape shape = pointwise && !in_place ? flattened(s) : s;
  const auto view = [&](Images& tensor) { return pointwise || in_place ? tensor.pixels_view() : tensor.view(); };
  Images input = images(s.batch, s.channels, s.input, last, true);
  Images output = images(s.batch, s.out_channels, s.output(), last, false);
  const Floats bias = random_floats(s.out_channels);

  const bool adds = pick({0, 1}) == 1;
  Images residual = images(s.batch, s.out_channels, s.output(), last, true);
  const BuiltIndex forward = build(p, shape, Direction::kForward, in_place);
  run_stencil(forward.stencil, forward.plan, forward.entries(), view(input), bias.data(),
              {adds ? residual.values.data() : nullptr, true}, view(output), parallel);
  Images expected = output;
  for (int64_t n = 0; n < s.batch; ++n) {
    for (int64_t i = 0; i < s.out_channels * output.size.h * output.size.w; ++i) {
      const int64_t pixels = output.size.h * output.size.w;
      expected.at(n, i / pixels, i % pixels / output.size.w, i % output.size.w) = bias[static_cast<size_t>(i / pixels)];
    }
  }
  for_each_product(s, input, expected, [&](size_t w, float x, float& y) { y += p.weight[w] * x; });
  for (size_t i = 0; i < expected.values.size(); ++i) {
    expected.values[i] = std::max(expected.values[i] + (adds ? residual.values[i] : 0.0f), 0.0f);
  }
  expect_close("output", output.values, expected.values, p);

  Images grad_output = images(s.batch, s.out_channels, s.output(), last, true);
  Images grad_input = images(s.batch, s.channels, s.input, last, false);
  const BuiltIndex backward = build(p, shape, Direction::kInputGradient, in_place);
  if (!last && backward.plan.lanes > 1 && backward.stencil.spread.w == 2) ++pairs;
  run_stencil(backward.stencil, backward.plan, backward.entries(), view(grad_output), nullptr, {nullptr, false},
              view(grad_input), parallel);
  Images expected_input = images(s.batch, s.channels, s.input, last, true);
  std::fill(expected_input.values.begin(), expected_input.values.end(), 0.0f);
  for_each_product(s, expected_input, grad_output, [&](size_t w, float& x, float y) { x += p.weight[w] * y; });
  expect_close("gradient of the input", grad_input.values, expected_input.values, p);

  const auto count = static_cast<int64_t>(forward.offset.size());
  Floats partial(static_cast<size_t>(gradient_parts(forward.plan) * count));
  Floats gradient(static_cast<size_t>(count));
  correlate_stencil(forward.stencil, forward.plan, forward.entries(), forward.ranks(), count, view(input),
                    view(grad_output), partial.data(), gradient.data(), parallel);
  Floats products(p.weight.size());
  for_each_product(s, input, grad_output, [&](size_t w, float x, float y) { products[w] += x * y; });
  for (size_t w = 0; w < products.size(); ++w) products[w] = p.weight[w] == 0.0f ? 0.0f : products[w];
  const auto expect_weight_gradient = [&](const char* what) {
    Floats spread_gradient(products.size(), 7.0f);
    spread(gradient.data(), {p.mask.data(), s.weights(), forward.positions.data(), count}, spread_gradient.data(),
           Element::kFloat32, parallel);
    expect_close(what, spread_gradient, products, p);
  };
  expect_weight_gradient("gradient of the weight");

  Images at_once = images(s.batch, s.channels, s.input, last, false);
  partial.resize(static_cast<size_t>(gradient_parts(backward.plan) * count));
  std::fill(gradient.begin(), gradient.end(), 7.0f);
  differentiate_stencil(backward.stencil, backward.plan, backward.entries(), backward.ranks(), count, view(grad_output),
                        view(input), view(at_once), partial.data(), gradient.data(), parallel);
  expect_weight_gradient("gradient of the weight, at once with the input's");
  if (!same_bits(at_once.values, grad_input.values)) {
    ++failures;
    std::printf("FAILED: gradients at once change that of the input\n");
  }
}

void test_threads_change_nothing() {
  Problem p = random_problem();
  while (p.shape.weights() < 500) p = random_problem();
  const BuiltIndex index = build(p, p.shape, Direction::kForward, can_read_in_place(p.shape));
  const BuiltIndex backward = build(p, p.shape, Direction::kInputGradient, can_read_in_place(p.shape));
  Images input = images(p.shape.batch, p.shape.channels, p.shape.input, false, true);
  Images grad_output = images(p.shape.batch, p.shape.out_channels, p.shape.output(), false, true);
  const auto count = static_cast<int64_t>(index.offset.size());
  std::vector<Floats> results, gradients;
  for (int threads : {1, 2, 3, 8}) {
    Images output = images(p.shape.batch, p.shape.out_channels, p.shape.output(), false, false);
    run_stencil(index.stencil, index.plan, index.entries(), input.view(), nullptr, {nullptr, false}, output.view(),
                StdThreads(threads));
    results.push_back(output.values);
    Floats partial(static_cast<size_t>(gradient_parts(index.plan) * count)), gradient(static_cast<size_t>(count));
    correlate_stencil(index.stencil, index.plan, index.entries(), index.ranks(), count, input.view(),
                      grad_output.view(), partial.data(), gradient.data(), StdThreads(threads));
    gradients.push_back(gradient);
    Images grad_input = images(p.shape.batch, p.shape.channels, p.shape.input, false, false);
    partial.resize(static_cast<size_t>(gradient_parts(backward.plan) * count));
    differentiate_stencil(backward.stencil, backward.plan, backward.entries(), backward.ranks(), count,
                          grad_output.view(), input.view(), grad_input.view(), partial.data(), gradient.data(),
                          StdThreads(threads));
    gradients.back().insert(gradients.back().end(), gradient.begin(), gradient.end());
    gradients.back().insert(gradients.back().end(), grad_input.values.begin(), grad_input.values.end());
  }
  for (size_t i = 1; i < results.size(); ++i) {
    if (same_bits(results[i], results[0]) && same_bits(gradients[i], gradients[0])) continue;
    ++failures;
    std::printf("FAILED: the number of threads changes the output or the gradient\n");
  }
}

void test_every_way_to_read(int problems, int fewest_threads) {
  for (int i = 0; i < problems; ++i) check(random_problem(), pick({0, 1}) == 1, StdThreads(fewest_threads + i % 3));
  const bool masks_loads = isa() == Isa::kAvx512;
  const int enough = problems / 40;
  const bool shifted = masks_loads ? places[1] >= enough : places[1] == 0;
  if (places[0] >= enough && places[2] >= enough && shifted) return;
  ++failures;
  std::printf("FAILED: %d pointwise and %d other problems read in place, %d packed\n", places[0], places[1], places[2]);
}

// Images with fewer pixels than the largest tile: in place where they fill vectors.
void test_small_images_in_place() {
  for (const Pair input : {Pair{8, 8}, {8, 10}, {12, 8}, {8, 14}, {10, 10}, {7, 7}}) {
    for (const int64_t kernel : {1, 3}) {
      const ConvShape shape = {.batch = 3,
                               .channels = 5,
                               .out_channels = 7,
                               .input = input,
                               .kernel = {kernel, kernel},
                               .stride = {1, 1},
                               .padding = {kernel / 2, kernel / 2},
                               .dilation = {1, 1},
                               .groups = 1};
      const bool fills = input.h * input.w % kWidestVector == 0;
      check(problem_of(shape, 0.3), false, Serial());
      if (can_read_in_place(shape) == (fills && (kernel == 1 || isa() == Isa::kAvx512))) continue;
      ++failures;
      std::printf("FAILED: %lldx%lld pixels in place, or not\n", static_cast<long long>(input.h),
                  static_cast<long long>(input.w));
    }
  }
}

// As many small images as a vector has lanes, and more: even and odd columns are unpacked at once.
void test_strides_of_small_images() {
  for (const int64_t side : {1, 2, 4, 7, 8, 9, 15}) {
    for (const int64_t kernel : {1, 3}) {
      for (const int64_t stride : {1, 2}) {
        for (const int64_t batch : {16, 33}) {
          const ConvShape shape = {.batch = batch,
                                   .channels = 5,
                                   .out_channels = 7,
                                   .input = {side, side},
                                   .kernel = {kernel, kernel},
                                   .stride = {stride, 2},
                                   .padding = {kernel / 2, kernel / 2},
                                   .dilation = {1, 1},
                                   .groups = 1};
          check(problem_of(shape, 0.3), false, Serial());
        }
      }
    }
  }
  if (pairs >= 10) return;
  ++failures;
  std::printf("FAILED: %d gradients of interleaved images in pairs of columns\n", pairs);
}

}  // namespace

int main() {
  if (kThreadSanitizer) {  // has nothing to find where one thread runs, and takes long: fewer problems are drawn
    test_every_way_to_read(60, 2);
    for (int i = 0; i < 4; ++i) test_threads_change_nothing();
    return failures == 0 ? 0 : 1;
  }
  test_every_way_to_read(200, 1);
  test_small_images_in_place();
  test_strides_of_small_images();
  for (int i = 0; i < 10; ++i) test_threads_change_nothing();
  if (failures == 0) std::printf("conv: all passed\n");
  return failures == 0 ? 0 : 1;
}
