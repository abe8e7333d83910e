#include "cpu/slab.h"

#include <algorithm>
#include <cstring>

#include "common/bfloat16.h"
#include "common/bits.h"

namespace granet::cpu {
namespace {

using Four = float __attribute__((vector_size(16)));

constexpr int64_t kLineBytes = 64;

template <Element>
struct Stored;

template <>
struct Stored<Element::kFloat32> {
  using Type = float;
  static float load(float value) { return value; }
};

template <>
struct Stored<Element::kBFloat16> {
  using Type = uint16_t;
  static float load(uint16_t bits) { return bfloat16_to_float(bits); }
};

template <Element kElement>
Four load_four(const typename Stored<kElement>::Type* source) {
  if constexpr (kElement == Element::kFloat32) {
    Four vector;
    std::memcpy(&vector, source, sizeof vector);
    return vector;
  } else {
    return Four{Stored<kElement>::load(source[0]), Stored<kElement>::load(source[1]), Stored<kElement>::load(source[2]),
                Stored<kElement>::load(source[3])};
  }
}

void store_four(float* target, Four vector) { std::memcpy(target, &vector, sizeof vector); }

void transpose(Four& a, Four& b, Four& c, Four& d) {
  const Four ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  const Four ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Four cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  const Four cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  a = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
  b = __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
  c = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
  d = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
}

// Rows are short: a call of the library's memcpy or memset would take longer than the copy.
void copy_floats(float* target, const float* source, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    store_four(target + i, load_four<Element::kFloat32>(source + i));
    store_four(target + i + 4, load_four<Element::kFloat32>(source + i + 4));
  }
  for (; i < count; ++i) target[i] = source[i];
}

void fill_zero(float* target, int64_t count) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) store_four(target + i, Four{});
  for (; i < count; ++i) target[i] = 0.0f;
}

// Every other float.
void copy_even(float* target, const float* source, int64_t count) {
  int64_t i = 0;
  for (; i + 5 <= count; i += 4) {  // the eighth float of a pair of vectors may be beyond the tensor
    const Four a = load_four<Element::kFloat32>(source + 2 * i);
    const Four b = load_four<Element::kFloat32>(source + 2 * i + 4);
    store_four(target + i, __builtin_shufflevector(a, b, 0, 2, 4, 6));
  }
  for (; i < count; ++i) target[i] = source[2 * i];
}

template <Element kElement>
void copy_run(const typename Stored<kElement>::Type* source, int64_t step, float* target, int64_t lanes,
              int64_t length) {
  if constexpr (kElement == Element::kFloat32) {
    if (lanes == 1 && step == 1) return copy_floats(target, source, length);
    if (lanes == 1 && step == 2) return copy_even(target, source, length);
  }
  for (int64_t i = 0; i < length; ++i) target[i * lanes] = Stored<kElement>::load(source[i * step]);
}

// Runs whose elements lie next to one another, of four images that are interleaved.
template <Element kElement>
void copy_four_images(const Run* runs, const typename Stored<kElement>::Type* source, int64_t step, float* target,
                      int64_t lanes) {
  const int64_t length = runs[0].length;
  const auto* s0 = source + runs[0].origin;
  const auto* s1 = source + runs[1].origin;
  const auto* s2 = source + runs[2].origin;
  const auto* s3 = source + runs[3].origin;
  float* t = target + runs[0].position;
  int64_t i = 0;
  if (step == 1) {
    for (; i + 4 <= length; i += 4, t += 4 * lanes) {
      Four a = load_four<kElement>(s0 + i), b = load_four<kElement>(s1 + i);
      Four c = load_four<kElement>(s2 + i), d = load_four<kElement>(s3 + i);
      transpose(a, b, c, d);
      store_four(t, a);
      store_four(t + lanes, b);
      store_four(t + 2 * lanes, c);
      store_four(t + 3 * lanes, d);
    }
  }
  for (; i < length; ++i, t += lanes) {
    const int64_t at = i * step;
    store_four(t, Four{Stored<kElement>::load(s0[at]), Stored<kElement>::load(s1[at]), Stored<kElement>::load(s2[at]),
                       Stored<kElement>::load(s3[at])});
  }
}

// The lines of a run. The processor's prefetchers lose the thread at the end of every short row: fetching those of the
// next channel while one is packed took 0.85 of the time of a layer at 56 x 56, 98 % sparse.
template <typename Value>
void fetch(const Run& run, const Value* source, int64_t step) {
  const auto* begin = reinterpret_cast<const char*>(source + run.origin);
  const auto* end = reinterpret_cast<const char*>(source + run.origin + run.length * step);
  for (const char* line = begin; line < end; line += kLineBytes) __builtin_prefetch(line);
}

// `ahead`: elements from this plane to the one that is packed next.
template <Element kElement>
void pack_plane(const Runs& runs, const typename Stored<kElement>::Type* source, int64_t ahead, float* slab) {
  const size_t count = runs.runs.size();
  size_t i = 0;
  if (runs.interleaved) {
    for (; i + 4 <= count; i += 4) {
      for (size_t lane = i; lane < i + 4; ++lane) fetch(runs.runs[lane], source + ahead, runs.step);
      copy_four_images<kElement>(&runs.runs[i], source, runs.step, slab, runs.lanes);
    }
  }
  for (; i < count; ++i) {
    const Run& run = runs.runs[i];
    fetch(run, source + ahead, runs.step);
    copy_run<kElement>(source + run.origin, runs.step, slab + run.position, runs.lanes, run.length);
  }
}

// target[j * target_step + i] = source[i * source_step + j] for i, j < 4.
template <Element kElement>
void transpose_block(const typename Stored<kElement>::Type* source, int64_t source_step, float* target,
                     int64_t target_step) {
  Four a = load_four<kElement>(source), b = load_four<kElement>(source + source_step);
  Four c = load_four<kElement>(source + 2 * source_step), d = load_four<kElement>(source + 3 * source_step);
  transpose(a, b, c, d);
  store_four(target, a);
  store_four(target + target_step, b);
  store_four(target + 2 * target_step, c);
  store_four(target + 3 * target_step, d);
}

// block(pixel, channel) for every four of both, single(pixel, channel) for the rest: eight pixels at a time, all
// channels of them. For pixels whose channels lie next to one another: with a power of two between two pixels the lines
// of a channel share a few places of each cache, and with all pixels of four channels at a time 32 pixels of 2048
// channels took 0.6 ns an element instead of 0.1.
template <typename Block, typename Single>
void for_each_block(int64_t pixels, int64_t channels, const Block& block, const Single& single) {
  constexpr int64_t kPixels = 8;
  const int64_t in_fours = pixels / 4 * 4;
  const int64_t channels_in_fours = channels / 4 * 4;
  for (int64_t first = 0; first < in_fours; first += kPixels) {
    const int64_t end = std::min(in_fours, first + kPixels);
    for (int64_t c = 0; c < channels_in_fours; c += 4) {
      for (int64_t i = first; i < end; i += 4) block(i, c);
    }
  }
  for (int64_t i = 0; i < pixels; ++i) {
    for (int64_t c = i < in_fours ? channels_in_fours : 0; c < channels; ++c) single(i, c);
  }
}

// Channels next to one another in memory, each into a plane.
template <Element kElement>
void pack_neighbours(const Run& run, const typename Stored<kElement>::Type* source, int64_t step, int64_t channels,
                     int64_t plane, float* target) {
  for_each_block(
      run.length, channels,
      [&](int64_t i, int64_t c) {
        transpose_block<kElement>(source + i * step + c, step, target + c * plane + i, plane);
      },
      [&](int64_t i, int64_t c) { target[c * plane + i] = Stored<kElement>::load(source[i * step + c]); });
}

// The way back, from rows of sums.
void unpack_neighbours(const float* sums, int64_t width, int64_t pixels, int64_t channels, float* target,
                       int64_t step) {
  for_each_block(
      pixels, channels,
      [&](int64_t i, int64_t c) {
        transpose_block<Element::kFloat32>(sums + c * width + i, width, target + i * step + c, step);
      },
      [&](int64_t i, int64_t c) { target[i * step + c] = sums[c * width + i]; });
}

// Of interleaved images: four channels next to one another in memory, into four planes.
template <Element kElement>
void pack_four_planes(const Runs& runs, const typename Stored<kElement>::Type* source, int64_t plane, float* slab) {
  for (const Run& run : runs.runs) {
    const auto* s = source + run.origin;
    float* t = slab + run.position;
    for (int64_t i = 0; i < run.length; ++i, s += runs.step, t += runs.lanes) {
      for (int64_t c = 0; c < 4; ++c) t[c * plane] = Stored<kElement>::load(s[c]);
    }
  }
}

template <Element kElement>
void pack_planes(const Runs& runs, const ImageView& view, int64_t channels, int64_t plane, float* slab) {
  const auto* source = static_cast<const typename Stored<kElement>::Type*>(view.data);
  for (int64_t c = 0; c < channels; ++c) {
    for (const Gap& gap : runs.gaps) fill_zero(slab + c * plane + gap.position, gap.length);
  }
  if (view.channel_stride == 1 && runs.lanes == 1) {
    for (const Run& run : runs.runs) {
      pack_neighbours<kElement>(run, source + run.origin, runs.step, channels, plane, slab + run.position);
    }
    return;
  }
  int64_t c = 0;
  if (view.channel_stride == 1) {
    for (; c + 4 <= channels; c += 4) pack_four_planes<kElement>(runs, source + c, plane, slab + c * plane);
  }
  for (; c < channels; ++c) {
    const int64_t ahead = c + 1 < channels ? view.channel_stride : 0;
    pack_plane<kElement>(runs, source + c * view.channel_stride, ahead, slab + c * plane);
  }
}

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
  constexpr int kToWrite = 1;  // __builtin_prefetch's word for it
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

// One column of pixels, in pieces that end with an image.
void add_pixel_runs(const RunsOf& what, const ImageView& view, Runs& result) {
  result.step = view.y_stride;
  const int64_t end = std::min(what.first_row + what.rows, what.size.h);
  for (int64_t y = what.first_row; y < end;) {
    const int64_t pixel = y % view.pixels;
    const int64_t length = std::min(end - y, view.pixels - pixel);
    result.runs.push_back({y - what.first_row, length, y / view.pixels * view.image_stride + pixel * view.y_stride});
    y += length;
  }
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

}  // namespace

Runs make_runs(const RunsOf& what, const ImageView& view) {
  Runs result{{}, {}, what.lanes, what.scale.w * view.x_stride, false};
  const auto add_gap = [&](int64_t position, int64_t length) {
    if (length <= 0) return;
    if (!result.gaps.empty() && result.gaps.back().position + result.gaps.back().length == position) {
      result.gaps.back().length += length;
    } else {
      result.gaps.push_back({position, length});
    }
  };
  if (view.pixels != 0) {
    add_pixel_runs(what, view, result);
    const int64_t covered = std::max<int64_t>(0, std::min(what.rows, what.size.h - what.first_row));
    add_gap(covered, what.floats - covered);
    return result;
  }
  const int64_t shift = what.before.w - what.phase.w;
  const int64_t first = ceil_div(std::max<int64_t>(0, shift), what.scale.w);
  const int64_t last = std::min(what.columns, ceil_div(std::max<int64_t>(0, what.size.w + shift), what.scale.w));
  const int64_t images = std::min(what.lanes, what.images - what.first_image);
  const int64_t row_floats = what.row * what.lanes;
  result.interleaved = images == what.lanes && images % 4 == 0;
  for (int64_t t = 0; t < what.rows; ++t) {
    const int64_t y = (what.first_row + t) * what.scale.h + what.phase.h - what.before.h;
    const bool empty = y < 0 || y >= what.size.h || last <= first;
    if (empty || images < what.lanes) {
      add_gap(t * row_floats, row_floats);
    } else {
      add_gap(t * row_floats, first * what.lanes);
      add_gap(t * row_floats + last * what.lanes, row_floats - last * what.lanes);
    }
    for (int64_t lane = 0; lane < images && !empty; ++lane) {
      result.runs.push_back({t * row_floats + first * what.lanes + lane, last - first,
                             (what.first_image + lane) * view.image_stride + y * view.y_stride +
                                 (first * what.scale.w - shift) * view.x_stride});
    }
  }
  add_gap(what.rows * row_floats, what.floats - what.rows * row_floats);
  return result;
}

void pack(const Runs& runs, const ImageView& view, int64_t channels, int64_t plane, float* slab) {
  const bool floating = view.element == Element::kFloat32;
  (floating ? pack_planes<Element::kFloat32> : pack_planes<Element::kBFloat16>)(runs, view, channels, plane, slab);
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
