#include "cpu/stencil_index.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "common/bits.h"
#include "cpu/active.h"
#include "cpu/stencil_tables.h"

namespace granet::cpu {
namespace {

// Of a source plane, as an entry has it.
int64_t plane_offset(const Plan& plan, int64_t plane) {
  return plan.shifted ? plane * plan.plane << kShiftBits : plane * plan.plane;
}

// Where one element of a filter leads, whichever filter it is of: the filter's own part is added.
struct Step {
  int64_t channel;  // forward: source channel within the group
  int64_t row;      // input gradient: target row within the group's channels
  int64_t offset;   // of its shift and phase, and forward of its source plane within the group
};

class Steps {
 public:
  Steps(const ConvShape& shape, WeightOrder order, Direction direction, const Plan& plan)
      : shape_(shape), plan_(plan), gradient_before_(input_gradient_stencil(shape).before) {
    steps_.reserve(static_cast<size_t>(shape.filter_size()));
    const int64_t c_outer = order == WeightOrder::kContiguous ? shape.group_channels() : 1;
    const int64_t c_inner = order == WeightOrder::kContiguous ? 1 : shape.group_channels();
    for (int64_t c0 = 0; c0 < c_outer; ++c0) {
      for (int64_t kh = 0; kh < shape.kernel.h; ++kh) {
        for (int64_t kw = 0; kw < shape.kernel.w; ++kw) {
          for (int64_t c1 = 0; c1 < c_inner; ++c1) {
            const int64_t channel = c0 + c1;
            steps_.push_back(direction == Direction::kForward ? forward(channel, kh, kw) : backward(channel, kh, kw));
          }
        }
      }
    }
  }
  const Step& operator[](int64_t element) const { return steps_[static_cast<size_t>(element)]; }

 private:
  int64_t shift(int64_t h, int64_t w) const { return (h * plan_.row + w) * plan_.lanes; }

  Step forward(int64_t channel, int64_t kh, int64_t kw) const {
    if (plan_.shifted) return {channel, 0, plane_offset(plan_, channel) + kh * shape_.kernel.w + kw};
    const int64_t y = kh * shape_.dilation.h;
    const int64_t x = kw * shape_.dilation.w;
    const int64_t phase = y % shape_.stride.h * shape_.stride.w + x % shape_.stride.w;
    const int64_t plane = channel * shape_.stride.h * shape_.stride.w + phase;
    return {channel, 0, plane_offset(plan_, plane) + shift(y / shape_.stride.h, x / shape_.stride.w)};
  }

  // Input pixel stride * q + a, with padding a + padding - dilation * k a multiple of the stride, takes output pixel
  // q + (a + padding - dilation * k) / stride.
  Step backward(int64_t channel, int64_t kh, int64_t kw) const {
    const auto phase_of = [](int64_t k, int64_t dilation, int64_t stride, int64_t padding) {
      const int64_t remainder = (dilation * k - padding) % stride;
      return remainder < 0 ? remainder + stride : remainder;
    };
    if (plan_.shifted) return {0, channel, kh * shape_.kernel.w + kw};
    const int64_t a = phase_of(kh, shape_.dilation.h, shape_.stride.h, shape_.padding.h);
    const int64_t b = phase_of(kw, shape_.dilation.w, shape_.stride.w, shape_.padding.w);
    const int64_t up = floor_div(a + shape_.padding.h - shape_.dilation.h * kh, shape_.stride.h) + gradient_before_.h;
    const int64_t left = floor_div(b + shape_.padding.w - shape_.dilation.w * kw, shape_.stride.w) + gradient_before_.w;
    return {0, (channel * shape_.stride.h + a) * shape_.stride.w + b, shift(up, left)};
  }

  const ConvShape& shape_;
  const Plan& plan_;
  Pair gradient_before_;  // of the input gradient's stencil
  std::vector<Step> steps_;
};

// entry(filter, element of the filter) for every active weight, in storage order.
template <typename Entry>
void for_each_entry(const uint8_t* mask, const ConvShape& shape, const Entry& entry) {
  const int64_t size = shape.filter_size();
  int64_t filter = 0;
  int64_t first = 0;  // weight of the filter
  for_each_active(mask, shape.weights(), [&](int64_t weight) {
    while (weight - first >= size) first += size, ++filter;
    entry(filter, weight - first);
  });
}

struct Entry {
  int64_t row;
  int64_t channel;  // of the source
  int64_t offset;
};

class Entries {
 public:
  Entries(const ConvShape& shape, WeightOrder order, Direction direction, const Plan& plan)
      : steps_(shape, order, direction, plan), shape_(shape), plan_(plan), forward_(direction == Direction::kForward) {}

  Entry of(int64_t filter, int64_t element) const {
    const Step& step = steps_[element];
    const int64_t first_channel = filter / (shape_.out_channels / shape_.groups) * shape_.group_channels();
    const int64_t phases = shape_.stride.h * shape_.stride.w;
    if (forward_) {
      return {filter, first_channel + step.channel, plane_offset(plan_, first_channel * phases) + step.offset};
    }
    return {first_channel * phases + step.row, filter, plane_offset(plan_, filter) + step.offset};
  }

 private:
  Steps steps_;
  const ConvShape& shape_;
  const Plan& plan_;
  bool forward_;
};

int64_t rows_of(const ConvShape& shape, Direction direction) {
  return direction == Direction::kForward ? shape.out_channels : shape.channels * shape.stride.h * shape.stride.w;
}

}  // namespace

// A filter's weights lie together, and where channels are the slowest of it, so do those of a block of channels.
bool entries_in_runs(WeightOrder order, Direction direction, const Plan& plan, int64_t groups, int64_t entries) {
  constexpr int64_t kShortestRun = 16;  // values: shorter runs would read a cache line each, in every tile
  if (direction != Direction::kForward) return false;
  return plan.blocks == 1 || (order == WeightOrder::kContiguous && entries >= kShortestRun * groups);
}

int64_t count_entries(const uint8_t* mask, const ConvShape& shape, WeightOrder order, Direction direction,
                      const Plan& plan, int64_t* begin) {
  const int64_t rows = rows_of(shape, direction);
  const int64_t groups = plan.blocks * rows;
  std::fill_n(begin, groups + 1, int64_t{0});
  const Entries entries(shape, order, direction, plan);
  for_each_entry(mask, shape, [&](int64_t filter, int64_t element) {
    const Entry entry = entries.of(filter, element);
    ++begin[entry.channel / plan.block * rows + entry.row + 1];
  });
  for (int64_t i = 0; i < groups; ++i) begin[i + 1] += begin[i];
  return begin[groups];
}

void fill_entries(const uint8_t* mask, const ConvShape& shape, WeightOrder order, Direction direction, const Plan& plan,
                  const StencilIndex& index) {
  const int64_t rows = rows_of(shape, direction);
  const Entries entries(shape, order, direction, plan);
  std::vector<int64_t> next(index.begin, index.begin + plan.blocks * rows);
  if (index.first != nullptr) std::fill_n(index.first, plan.blocks * rows, int64_t{0});
  int32_t rank = 0;
  for_each_entry(mask, shape, [&](int64_t filter, int64_t element) {
    const Entry entry = entries.of(filter, element);
    const int64_t group = entry.channel / plan.block * rows + entry.row;
    const int64_t at = next[static_cast<size_t>(group)]++;
    index.offset[at] = static_cast<int32_t>(entry.offset);
    if (index.rank != nullptr) index.rank[at] = rank;
    if (index.first != nullptr && at == index.begin[group]) index.first[group] = rank;
    ++rank;
  });
}

bool offsets_fit(const Stencil& stencil, const Plan& plan) {
  return plane_offset(plan, stencil.channels * stencil.phases()) <= std::numeric_limits<int32_t>::max();
}

}  // namespace granet::cpu
