#include <algorithm>
#include <cstddef>

#include "common/bits.h"
#include "common/prefetch.h"
#include "cpu/slab.h"
#include "cpu/slab_copy.h"

namespace granet::cpu {
namespace {

// The part of a run that lies in positions [position, position + count): elements [begin, end).
struct Part {
  int64_t begin;
  int64_t end;
};
Part part_of(const Run& run, int64_t lanes, int64_t position, int64_t count) {
  const int64_t begin = std::max<int64_t>(0, ceil_div(std::max<int64_t>(0, position - run.position), lanes));
  const int64_t last = position + count - run.position;
  const int64_t end = last <= 0 ? 0 : std::min(run.length, ceil_div(last, lanes));
  return {begin, std::max(begin, end)};
}

// Four images that are interleaved in `from`, each a run of pixels next to one another: elements [begin, end) of each.
void unpack_four_images(const Run* runs, const Part& part, int64_t lanes, const float* from, float* target) {
  int64_t i = part.begin;
  for (; i + 4 <= part.end; i += 4, from += 4 * lanes) {
    Four a = load_four<Element::kFloat32>(from), b = load_four<Element::kFloat32>(from + lanes);
    Four c = load_four<Element::kFloat32>(from + 2 * lanes), d = load_four<Element::kFloat32>(from + 3 * lanes);
    transpose(a, b, c, d);
    store_four(target + runs[0].origin + i, a);
    store_four(target + runs[1].origin + i, b);
    store_four(target + runs[2].origin + i, c);
    store_four(target + runs[3].origin + i, d);
  }
  for (; i < part.end; ++i, from += lanes) {
    for (int64_t lane = 0; lane < 4; ++lane) target[runs[lane].origin + i] = from[lane];
  }
}

// Float rows of pixels next to one another, of `lanes` interleaved images; a tile covers the same pixels of all of
// them.
void unpack_images(const Runs& runs, const ImageView& view, const float* sums, int64_t width, int64_t position,
                   int64_t count, int64_t first, int64_t channels) {
  constexpr int64_t kChannelsAhead = 2;
  for (size_t r = 0; r < runs.runs.size(); r += 4) {
    const Run* four = &runs.runs[r];
    const Part part = part_of(four[0], runs.lanes, position, count);
    if (part.begin >= part.end) continue;
    const float* from = sums + (four[0].position + part.begin * runs.lanes - position);
    for (int64_t c = 0; c < channels; ++c) {
      float* target = static_cast<float*>(view.data) + (first + c) * view.channel_stride;
      if (c + kChannelsAhead < channels) {
        const float* later = target + kChannelsAhead * view.channel_stride + part.begin;
        for (int lane = 0; lane < 4; ++lane) __builtin_prefetch(later + four[lane].origin, kToWrite);
      }
      unpack_four_images(four, part, runs.lanes, from + c * width, target);
    }
  }
}

// piece(element of the target, sums, length) for the parts of runs that lie in positions [position, position + count).
template <typename Piece>
void for_each_part(const Runs& runs, const float* sums, int64_t position, int64_t count, const Piece& piece) {
  for (const Run& run : runs.runs) {
    const Part part = part_of(run, runs.lanes, position, count);
    if (part.begin >= part.end) continue;
    piece(run.origin + part.begin * runs.step, sums + (run.position + part.begin * runs.lanes - position),
          part.end - part.begin);
  }
}

// Rows of sums into channels next to one another in memory.
void unpack_neighbours(const float* sums, int64_t width, int64_t pixels, int64_t channels, float* target,
                       int64_t step) {
  for_each_block(
      pixels, channels,
      [&](int64_t i, int64_t c) {
        transpose_block<Element::kFloat32>(sums + c * width + i, width, target + i * step + c, step);
      },
      [&](int64_t i, int64_t c) { target[i * step + c] = sums[c * width + i]; });
}

void unpack_floats(const Runs& runs, const ImageView& view, const float* sums, int64_t width, int64_t position,
                   int64_t count, int64_t first, int64_t channels) {
  // With as many lanes as a vector has, a tile begins with the first of the images.
  if (runs.interleaved && runs.step == 1 && position % runs.lanes == 0 && count % runs.lanes == 0) {
    return unpack_images(runs, view, sums, width, position, count, first, channels);
  }
  float* base = static_cast<float*>(view.data) + first * view.channel_stride;
  for_each_part(runs, sums, position, count, [&](int64_t at, const float* from, int64_t length) {
    if (view.channel_stride == 1 && runs.lanes == 1) {
      return unpack_neighbours(from, width, length, channels, base + at, runs.step);
    }
    for (int64_t c = 0; c < channels; ++c) {
      float* target = base + at + c * view.channel_stride;
      const float* row = from + c * width;
      if (runs.lanes == 1 && runs.step == 1) {
        copy_floats(target, row, length);
      } else {
        for (int64_t i = 0; i < length; ++i) target[i * runs.step] = row[i * runs.lanes];
      }
    }
  });
}

// Rounded once, so finished on the way.
void unpack_bfloat16(const Runs& runs, const ImageView& view, const Finish& finish, const float* sums, int64_t width,
                     int64_t position, int64_t count, int64_t first, int64_t channels) {
  for_each_part(runs, sums, position, count, [&](int64_t at, const float* from, int64_t length) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t to = at + (first + c) * view.channel_stride;
      auto* target = static_cast<uint16_t*>(view.data) + to;
      const auto* residual = finish.residual == nullptr ? nullptr : static_cast<const uint16_t*>(finish.residual) + to;
      for (int64_t i = 0; i < length; ++i) {
        float value = from[c * width + i * runs.lanes];
        if (residual != nullptr) value += bfloat16_to_float(residual[i * runs.step]);
        if (finish.relu && value < 0.0f) value = 0.0f;  // a NaN stays
        target[i * runs.step] = float_to_bfloat16(value);
      }
    }
  });
}

void clamp_negative(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = values[i] < 0.0f ? 0.0f : values[i];  // a NaN stays
}

// What was just unpacked, and is still in the cache, + residual, max 0 where relu: along whatever lies in one piece.
void add_residual(const Runs& runs, const ImageView& view, const Finish& finish, const float* sums, int64_t position,
                  int64_t count, int64_t first, int64_t channels) {
  float* target = static_cast<float*>(view.data) + first * view.channel_stride;
  const float* residual = static_cast<const float*>(finish.residual) + first * view.channel_stride;
  const auto add = [&](int64_t at, int64_t length) {
    for (int64_t i = 0; i < length; ++i) target[at + i] += residual[at + i];
    if (finish.relu) clamp_negative(target + at, length);
  };
  for_each_part(runs, sums, position, count, [&](int64_t at, const float*, int64_t length) {
    if (view.channel_stride == 1) {
      for (int64_t i = 0; i < length; ++i) add(at + i * runs.step, channels);
    } else if (runs.step == 1) {
      for (int64_t c = 0; c < channels; ++c) add(at + c * view.channel_stride, length);
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t i = 0; i < length; ++i) add(at + c * view.channel_stride + i * runs.step, 1);
      }
    }
  });
}

// The lines of so many floats.
void fetch_to_write(const float* target, int64_t count) {
  constexpr int64_t kLineFloats = 16;
  for (int64_t i = 0; i < count; i += kLineFloats) __builtin_prefetch(target + i, kToWrite);
}

// Rows of floats next to one another.
bool are_in_pairs(const Runs& even, const Runs& odd, const ImageView& view) {
  const auto is_plain = [](const Runs& runs) { return runs.lanes == 1 && runs.step == 2; };
  return view.element == Element::kFloat32 && is_plain(even) && is_plain(odd) && view.x_stride == 1 &&
         even.runs.size() == odd.runs.size();
}

// target[2 * i] = even[i] and target[2 * i + 1] = odd[i], of which there is one less where the row ends with an even
// one.
void interleave(const float* even, const float* odd, int64_t evens, int64_t odds, float* target) {
  int64_t i = 0;
  for (; i + 4 <= odds; i += 4) {
    const Four a = load_four<Element::kFloat32>(even + i), b = load_four<Element::kFloat32>(odd + i);
    store_four(target + 2 * i, __builtin_shufflevector(a, b, 0, 4, 1, 5));
    store_four(target + 2 * i + 4, __builtin_shufflevector(a, b, 2, 6, 3, 7));
  }
  for (; i < evens; ++i) {
    target[2 * i] = even[i];
    if (i < odds) target[2 * i + 1] = odd[i];
  }
}

}  // namespace

void unpack_columns(const Runs& even, const Runs& odd, const ImageView& view, const Finish& finish, float* sums,
                    int64_t apart, int64_t width, int64_t position, int64_t count, int64_t first, int64_t channels) {
  if (finish.relu || finish.residual != nullptr || !are_in_pairs(even, odd, view)) {
    unpack(even, view, finish, sums, width, position, count, first, channels);
    return unpack(odd, view, finish, sums + apart, width, position, count, first, channels);
  }
  constexpr int64_t kChannelsAhead = 4;  // 0.92 of the time without
  for (size_t r = 0; r < even.runs.size(); ++r) {
    const Run& run = even.runs[r];
    const Part evens = part_of(run, 1, position, count), odds = part_of(odd.runs[r], 1, position, count);
    if (evens.begin >= evens.end) continue;
    float* target = static_cast<float*>(view.data) + first * view.channel_stride + run.origin + 2 * evens.begin;
    const float* from = sums + (run.position + evens.begin - position);
    for (int64_t c = 0; c < channels; ++c, target += view.channel_stride, from += width) {
      if (c + kChannelsAhead < channels) {
        fetch_to_write(target + kChannelsAhead * view.channel_stride, evens.end - evens.begin + odds.end - odds.begin);
      }
      interleave(from, from + apart, evens.end - evens.begin, odds.end - odds.begin, target);
    }
  }
}

void unpack(const Runs& runs, const ImageView& view, const Finish& finish, float* sums, int64_t width, int64_t position,
            int64_t count, int64_t first, int64_t channels) {
  if (view.element == Element::kBFloat16) {
    return unpack_bfloat16(runs, view, finish, sums, width, position, count, first, channels);
  }
  const bool relu_first = finish.relu && finish.residual == nullptr;
  for (int64_t c = 0; c < channels && relu_first; ++c) clamp_negative(sums + c * width, count);
  unpack_floats(runs, view, sums, width, position, count, first, channels);
  if (finish.residual != nullptr) add_residual(runs, view, finish, sums, position, count, first, channels);
}

}  // namespace granet::cpu
