#include <algorithm>
#include <cstddef>

#include "common/bfloat16.h"
#include "cpu/slab.h"
#include "cpu/slab_parts.h"

namespace granet::cpu {
namespace {

// Adds a pixel to the last piece, or to a new one where `element` of the runs does not follow that in each image.
void add_pixel(std::vector<Piece>& pieces, const Run* images, int64_t element, int64_t position) {
  Piece* piece = pieces.empty() ? nullptr : &pieces.back();
  const bool goes_on = piece != nullptr && piece->count < kMostPixels &&
                       piece->images->origin + piece->first + piece->count == images->origin + element;
  if (!goes_on) piece = &pieces.emplace_back(Piece{images, element, 0, {}});
  piece->positions[piece->count++] = position;
}

// The pixels of a tile, as many of them together as go on in each image: the end of a row and the start of the next.
std::vector<Piece> pieces_of(const Runs& runs, int64_t position, int64_t count) {
  std::vector<Piece> pieces;
  const auto lanes = static_cast<size_t>(runs.lanes);
  for (size_t r = 0; r < runs.runs.size(); r += lanes) {
    const Run& run = runs.runs[r];
    const RunPart part = part_of(run, runs.lanes, position, count);
    for (int64_t i = part.begin; i < part.end; ++i) {
      add_pixel(pieces, &run, i, run.position + i * runs.lanes - position);
    }
  }
  return pieces;
}

// Those of even and odd columns in turn, the sums of the odd ones `apart` floats behind. Backward passes of 3x3 and 1x1
// layers of stride 2, at 16 x 16 and 8 x 8, took 0.65 to 0.9 of the time of unpacking them element by element.
std::vector<Piece> pieces_of_columns(const Runs& even, const Runs& odd, int64_t apart, int64_t position,
                                     int64_t count) {
  std::vector<Piece> pieces;
  const auto lanes = static_cast<size_t>(even.lanes);
  for (size_t r = 0; r < even.runs.size(); r += lanes) {
    const Run& run = even.runs[r];
    const RunPart evens = part_of(run, even.lanes, position, count);
    const RunPart odds = part_of(odd.runs[r], odd.lanes, position, count);
    for (int64_t i = evens.begin; i < evens.end; ++i) {
      const int64_t at = run.position + i * even.lanes - position;
      add_pixel(pieces, &run, 2 * i, at);
      if (i < odds.end) add_pixel(pieces, &run, 2 * i + 1, apart + at);
    }
  }
  return pieces;
}

// visit(element of the target, sums, length) for the parts of runs that lie in positions [position, position + count).
template <typename Visit>
void for_each_part(const Runs& runs, const float* sums, int64_t position, int64_t count, const Visit& visit) {
  for (const Run& run : runs.runs) {
    const RunPart part = part_of(run, runs.lanes, position, count);
    if (part.begin >= part.end) continue;
    visit(run.origin + part.begin * runs.step, sums + (run.position + part.begin * runs.lanes - position),
          part.end - part.begin);
  }
}

void unpack_floats(const Runs& runs, const ImageView& view, const float* sums, int64_t width, int64_t position,
                   int64_t count, int64_t first, int64_t channels) {
  float* base = static_cast<float*>(view.data) + first * view.channel_stride;
  // With as many lanes as a vector has, a tile begins with the first of the images.
  if (runs.interleaved && runs.step == 1 && runs.lanes == slab_kernels().lanes) {
    const std::vector<Piece> pieces = pieces_of(runs, position, count);
    return slab_kernels().unpack_images(
        {pieces.data(), static_cast<int64_t>(pieces.size()), sums, width, channels, base, view.channel_stride});
  }
  if (view.channel_stride == 1 && channels > 1) {
    const std::vector<PixelVector> vectors = pixel_vectors(runs, position, count);
    return slab_kernels().unpack_pixels(
        {vectors.data(), static_cast<int64_t>(vectors.size()), channels, sums, width, base});
  }
  for_each_part(runs, sums, position, count, [&](int64_t at, const float* from, int64_t length) {
    for (int64_t c = 0; c < channels; ++c) {
      float* target = base + at + c * view.channel_stride;
      const float* row = from + c * width;
      if (runs.lanes == 1 && runs.step == 1) {
        std::copy_n(row, length, target);
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

// Whether their rows have the same positions, and together are floats next to one another.
bool are_in_pairs(const Runs& even, const Runs& odd, const ImageView& view) {
  return view.element == Element::kFloat32 && view.x_stride == 1 && even.step == 2 && odd.step == 2 &&
         even.runs.size() == odd.runs.size();
}

}  // namespace

void unpack_columns(const Runs& even, const Runs& odd, const ImageView& view, const Finish& finish, float* sums,
                    int64_t apart, int64_t width, int64_t position, int64_t count, int64_t first, int64_t channels) {
  const bool interleaved = even.interleaved && even.lanes == slab_kernels().lanes;
  if (finish.relu || finish.residual != nullptr || !are_in_pairs(even, odd, view) ||
      !(interleaved || even.lanes == 1)) {
    unpack(even, view, finish, sums, width, position, count, first, channels);
    return unpack(odd, view, finish, sums + apart, width, position, count, first, channels);
  }
  float* target = static_cast<float*>(view.data) + first * view.channel_stride;
  if (interleaved) {
    const std::vector<Piece> pieces = pieces_of_columns(even, odd, apart, position, count);
    return slab_kernels().unpack_images(
        {pieces.data(), static_cast<int64_t>(pieces.size()), sums, width, channels, target, view.channel_stride});
  }
  std::vector<ColumnPair> pairs;
  for (size_t r = 0; r < even.runs.size(); ++r) {
    const Run& run = even.runs[r];
    const RunPart evens = part_of(run, 1, position, count), odds = part_of(odd.runs[r], 1, position, count);
    if (evens.begin >= evens.end) continue;
    pairs.push_back({run.position + evens.begin - position, run.origin + 2 * evens.begin, evens.end - evens.begin,
                     odds.end - odds.begin});
  }
  slab_kernels().unpack_columns(
      {pairs.data(), static_cast<int64_t>(pairs.size()), channels, sums, apart, width, target, view.channel_stride});
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
