// What packing and unpacking a slab share: elements as floats, four at a time, and blocks of four by four.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/bfloat16.h"
#include "cpu/slab.h"

namespace granet::cpu {

using Four = float __attribute__((vector_size(16)));

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

inline void store_four(float* target, Four vector) { std::memcpy(target, &vector, sizeof vector); }

inline void transpose(Four& a, Four& b, Four& c, Four& d) {
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
inline void copy_floats(float* target, const float* source, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    store_four(target + i, load_four<Element::kFloat32>(source + i));
    store_four(target + i + 4, load_four<Element::kFloat32>(source + i + 4));
  }
  for (; i < count; ++i) target[i] = source[i];
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
inline void for_each_block(int64_t pixels, int64_t channels, const Block& block, const Single& single) {
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

}  // namespace granet::cpu
