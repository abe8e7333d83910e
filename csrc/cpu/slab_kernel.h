// Packing and unpacking of planes (slab.h), compiled once for each instruction set. `Value` is what the source holds: a
// float, or the bits of a bfloat16.

#include "common/prefetch.h"
#include "common/simd.h"
#include "common/simd_rows.h"
#include "cpu/slab_tables.h"

namespace granet::cpu::GRANET_ISA {

// `count` elements, at most a vector, kStep apart, and zeros. Nothing behind the last one is read.
template <int64_t kStep, typename Value>
Floats load_elements(const Value* source, int64_t count) {
  if constexpr (kStep == 1) return load_first(source, count);
  const int64_t floats = 2 * count - 1;  // 0 elements are not asked for
  return evens(load_first(source, floats), load_first(source + kLanes, floats > kLanes ? floats - kLanes : 0));
}

// The elements of a part, and whatever is behind them.
template <int64_t kStep, typename Value>
Floats load_part(const PackedVector& part, const Value* source) {
  if (!part.is_whole) return load_elements<kStep>(source, __builtin_popcount(part.lanes));
  if constexpr (kStep == 1) return load_first(source, kLanes);
  return evens(load_first(source, kLanes), load_first(source + kLanes, kLanes));
}

template <typename Value, int64_t kStep>
void pack_rows_of(const PackRows& task) {
  constexpr uint32_t kAll = (1u << kLanes) - 1;
  const PackedVector* part = task.parts;
  const PackedVector* const end = part + task.part_count;
  const auto* const source = static_cast<const Value*>(task.source);
  const Value* const next = source + task.ahead;
  for (float* target = task.plane; part != end; target += kLanes) {
    Floats vector{};
    do {
      // The processor's prefetchers lose the thread at the end of every short row: fetching the next channel's while
      // one is packed took 0.85 of the time of a layer at 56 x 56, 98 % sparse.
      for (int64_t i = 0; i < kStep; ++i) __builtin_prefetch(next + part->origin + i * kLanes);
      if (part->lanes == 0) continue;
      const Floats elements = load_part<kStep>(*part, source + part->origin);
      vector = part->lanes == kAll ? elements : expanded(vector, elements, part->lanes);
    } while (!part++->is_last);
    store(target, vector);
  }
}

template <typename Value>
void fetch_run(const Run& run, const Value* source, int64_t step) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(Value));
  const Value* begin = source + run.origin;
  for (int64_t i = 0; i < run.length * step; i += kLine) __builtin_prefetch(begin + i);
}

inline void fill_gaps(const PackImages& task) {
  for (const Gap* gap = task.gaps; gap != task.gaps + task.gap_count; ++gap) {
    for (int64_t i = 0; i < gap->length; i += kLanes) store(task.plane + gap->position + i, Floats{});
  }
}

// Whether the rows of all images go on where those before them end: images are a constant distance apart, so that the
// first one tells.
inline bool continues(const Run* run, int64_t step) { return run[kLanes].origin == run->origin + run->length * step; }

template <typename Value, int64_t kStep>
void pack_images_of(const PackImages& task) {
  const auto* const source = static_cast<const Value*>(task.source);
  fill_gaps(task);
  const Run* const end = task.runs + task.run_count;
  for (const Run* run = task.runs; run != end;) {
    // All rows from here on that go on in each image: short ones then fill a vector together.
    const Run* first = run;
    int64_t left = 0;
    for (bool more = true; more; run += kLanes) {
      left += run->length;
      more = run + kLanes != end && continues(run, kStep);
      for (int64_t image = 0; image < kLanes && task.ahead != 0; ++image) {
        fetch_run(run[image], source + task.ahead, kStep);
      }
    }
    const Run* row = first;
    int64_t column = 0;
    for (int64_t i = 0; left > 0; i += kLanes, left -= kLanes) {
      Floats rows[kLanes];
#pragma GCC unroll 16
      for (int64_t image = 0; image < kLanes; ++image) {
        rows[image] = load_elements<kStep>(source + first[image].origin + i * kStep, left);
      }
      transpose(rows);
#pragma GCC unroll 16
      for (int64_t pixel = 0; pixel < kLanes; ++pixel) {
        if (pixel >= left) break;
        store(task.plane + row->position + column * kLanes, rows[pixel]);
        if (++column == row->length) row += kLanes, column = 0;
      }
    }
  }
}

template <typename Value>
void pack_rows(const PackRows& task) {
  (task.step == 1 ? pack_rows_of<Value, 1> : pack_rows_of<Value, 2>)(task);
}

template <typename Value>
void pack_images(const PackImages& task) {
  (task.step == 1 ? pack_images_of<Value, 1> : pack_images_of<Value, 2>)(task);
}

// What is packed or unpacked 96 channels later, from the pixels of a vector or of the next one, is fetched meanwhile:
// the processor's prefetchers do not follow sixteen pixels at once. Out of cold caches, into the second level: packing
// took 0.55 to 0.7 of the time of fetching the next vector's pixels into the first, 128 to 3136 pixels of 64 to 4096
// channels on a Zen 4; unpacking 0.55 to 0.95 of the time of not fetching, and fetching to write did not help there.
struct Ahead {
  const int64_t* origin;
  int64_t channel;
};
inline Ahead ahead_of(const PixelVector* vector, const PixelVector* end, int64_t channels, int64_t channel) {
  constexpr int64_t kChannelsAhead = 96;
  const int64_t visited = (channels + kLanes - 1) / kLanes * kLanes, then = channel + kChannelsAhead;
  if (then < visited || vector + 1 == end) return {vector->origin, then};
  return {vector[1].origin, then - visited};
}

template <typename Value>
void pack_pixels(const PackPixels& task) {
  const auto* const source = static_cast<const Value*>(task.source);
  const PixelVector* const end = task.vectors + task.vector_count;
  for (int64_t v = 0; v < task.vector_count; ++v) {
    const int64_t* origin = task.vectors[v].origin;
    float* target = task.slab + v * kLanes;
    for (int64_t c = 0; c < task.channels; c += kLanes, target += kLanes * task.plane) {
      const int64_t count = task.channels - c < kLanes ? task.channels - c : kLanes;
      const Ahead ahead = ahead_of(task.vectors + v, end, task.channels, c);
      Floats rows[kLanes];
#pragma GCC unroll 16
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        rows[lane] = origin[lane] < 0 ? Floats{} : load_first(source + origin[lane] + c, count);
        __builtin_prefetch(source + ahead.origin[lane] + ahead.channel, kToRead, kSecondLevel);
      }
      transpose(rows);
#pragma GCC unroll 16
      for (int64_t k = 0; k < kLanes; ++k) {
        if (k < count) store(target + k * task.plane, rows[k]);
      }
    }
  }
}

inline void unpack_pixels(const UnpackPixels& task) {
  const PixelVector* const end = task.vectors + task.vector_count;
  for (int64_t v = 0; v < task.vector_count; ++v) {
    const int64_t* origin = task.vectors[v].origin;
    const float* from = task.sums + v * kLanes;
    for (int64_t c = 0; c < task.channels; c += kLanes, from += kLanes * task.width) {
      const int64_t count = task.channels - c < kLanes ? task.channels - c : kLanes;
      const Ahead ahead = ahead_of(task.vectors + v, end, task.channels, c);
      Floats rows[kLanes];
#pragma GCC unroll 16
      for (int64_t k = 0; k < kLanes; ++k) {
        rows[k] = k < count ? load(from + k * task.width) : Floats{};
        __builtin_prefetch(task.target + ahead.origin[k] + ahead.channel, kToRead, kSecondLevel);
      }
      transpose(rows);
#pragma GCC unroll 16
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        if (origin[lane] >= 0) store_first(task.target + origin[lane] + c, rows[lane], count);
      }
    }
  }
}

inline void unpack_piece(const Piece& piece, const float* sums, float* target) {
  constexpr int64_t kPixels = kLanes < kMostPixels ? kLanes : kMostPixels;
  constexpr int64_t kImages = kLanes / kPixels;  // in a vector, once transposed
  static_assert(kImages == (GRANET_AVX512 ? 2 : 1) && kPixels <= 8);
  for (int64_t i = 0; i < piece.count; i += kPixels) {
    const int64_t count = piece.count - i < kPixels ? piece.count - i : kPixels;
    Floats pixels[kPixels];
#pragma GCC unroll 8
    for (int64_t k = 0; k < kPixels; ++k) pixels[k] = k < count ? load(sums + piece.positions[i + k]) : Floats{};
    transpose(pixels);
#pragma GCC unroll 8
    for (int64_t k = 0; k < kPixels; ++k) {
#if GRANET_AVX512
      const auto in_piece = static_cast<__mmask8>((1u << count) - 1);
      const Run* images = piece.images + k * kImages;
      const __m256 a = __builtin_shufflevector(pixels[k], pixels[k], 0, 1, 2, 3, 4, 5, 6, 7);
      const __m256 b = __builtin_shufflevector(pixels[k], pixels[k], 8, 9, 10, 11, 12, 13, 14, 15);
      _mm256_mask_storeu_ps(target + images[0].origin + piece.first + i, in_piece, a);
      _mm256_mask_storeu_ps(target + images[1].origin + piece.first + i, in_piece, b);
#else
      store_first(target + piece.images[k].origin + piece.first + i, pixels[k], count);
#endif
    }
  }
}

inline void unpack_images(const UnpackImages& task) {
  constexpr int64_t kChannelsAhead = 2;
  for (const Piece* piece = task.pieces; piece != task.pieces + task.piece_count; ++piece) {
    for (int64_t c = 0; c < task.channels; ++c) {
      float* target = task.target + c * task.channel_stride;
      if (c + kChannelsAhead < task.channels) {
        const float* later = target + kChannelsAhead * task.channel_stride + piece->first;
        for (int64_t image = 0; image < kLanes; ++image) {
          __builtin_prefetch(later + piece->images[image].origin, kToWrite);
        }
      }
      unpack_piece(*piece, task.sums + c * task.width, target);
    }
  }
}

// Elements of `even` and `odd` in turn: `count` of both together.
inline void interleave(const float* even, const float* odd, int64_t count, float* target) {
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
    const int64_t left = count - i;
    const Floats a = load_first(even + i / 2, (left + 1) / 2), b = load_first(odd + i / 2, left / 2);
    store_first(target + i, interleave_low(a, b), left);
    if (left > kLanes) store_first(target + i + kLanes, interleave_high(a, b), left - kLanes);
  }
}

inline void unpack_columns(const UnpackColumns& task) {
  constexpr int64_t kChannelsAhead = 4;  // 0.92 of the time without
  constexpr int64_t kLineFloats = 16;
  for (const ColumnPair* pair = task.pairs; pair != task.pairs + task.pair_count; ++pair) {
    const float* even = task.sums + pair->position;
    float* target = task.target + pair->origin;
    const int64_t count = pair->evens + pair->odds;
    for (int64_t c = 0; c < task.channels; ++c, even += task.width, target += task.channel_stride) {
      const float* later = target + kChannelsAhead * task.channel_stride;
      for (int64_t i = 0; i < count && c + kChannelsAhead < task.channels; i += kLineFloats) {
        __builtin_prefetch(later + i, kToWrite);
      }
      interleave(even, even + task.apart, count, target);
    }
  }
}

template <typename Value>
constexpr PackKernels kPackKernels = {pack_rows<Value>, pack_images<Value>, pack_pixels<Value>};

constexpr SlabKernels kSlabKernels = {kPackKernels<float>, kPackKernels<uint16_t>, unpack_images,
                                      unpack_pixels,       unpack_columns,         kLanes};

}  // namespace granet::cpu::GRANET_ISA
