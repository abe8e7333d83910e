// Rows of floats in vectors: part of one, elements spread over its lanes, every other one, and several rows transposed.
//
// Included behind common/simd.h.
#pragma once

#ifndef GRANET_ISA
#error "include common/target_portable.h, target_avx2.h or target_avx512.h first"
#endif

namespace granet::cpu::GRANET_ISA {

#if GRANET_AVX512
inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(_bzhi_u32(0xffff, static_cast<uint32_t>(count < kLanes ? count : kLanes)));
}
#endif

// The first `count` >= 0 floats, at most a vector, and zeros. Nothing behind them is read.
inline Floats load_first(const float* address, int64_t count) {
#if GRANET_AVX512
  return Floats(_mm512_maskz_loadu_ps(first_lanes(count), address));
#elif GRANET_AVX2
  if (count >= kLanes) return load(address);  // a masked load takes several times as long
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return Floats(_mm256_maskload_ps(address, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane)));
#else
  Floats vector{};
  for (int64_t i = 0; i < kLanes && i < count; ++i) vector[i] = address[i];
  return vector;
#endif
}

// The same of bfloat16, by their bits, as floats.
inline Floats load_first(const uint16_t* address, int64_t count) {
#if GRANET_AVX512
  const __m256i bits = _mm256_maskz_loadu_epi16(first_lanes(count), address);  // GCC 12 warns of forms without masks
  return reinterpret_cast<Floats>(Ints(_mm512_maskz_cvtepu16_epi32(0xffff, bits)) << 16);
#else
#if GRANET_AVX2
  if (count >= kLanes) {
    const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(address));
    return reinterpret_cast<Floats>(Ints(_mm256_cvtepu16_epi32(all)) << 16);
  }
#endif
  Ints bits{};
  for (int64_t i = 0; i < kLanes; ++i) bits[i] = i < count ? static_cast<int32_t>(uint32_t{address[i]} << 16) : 0;
  return reinterpret_cast<Floats>(bits);
#endif
}

// The first `count` > 0 lanes, at most a vector.
inline void store_first(float* address, Floats vector, int64_t count) {
  if (count >= kLanes) return store(address, vector);
#if GRANET_AVX512
  _mm512_mask_storeu_ps(address, first_lanes(count), vector);
#else
  float lanes[kLanes];  // AMD's masked stores take a dozen cycles with AVX2
  store(lanes, vector);
  int64_t i = 0;
  if ((count & 4) != 0) __builtin_memcpy(address, lanes, 16), i = 4;
  if ((count & 2) != 0) __builtin_memcpy(address + i, lanes + i, 8), i += 2;
  if ((count & 1) != 0) address[i] = lanes[i];
#endif
}

#if GRANET_AVX2 && !GRANET_AVX512
// For each set of lanes, which of the elements that are put into them each one takes, in their order.
struct Expansions {
  int8_t element[256][8];
};
constexpr Expansions expansions() {
  Expansions table{};
  for (int lanes = 0; lanes < 256; ++lanes) {
    int8_t next = 0;
    for (int lane = 0; lane < 8; ++lane) table.element[lanes][lane] = (lanes >> lane & 1) != 0 ? next++ : int8_t{-1};
  }
  return table;
}
constexpr Expansions kExpansions = expansions();
#endif

// Elements in the lanes that they are for.
inline Floats expanded(Floats vector, Floats elements, uint32_t lanes) {
#if GRANET_AVX512
  return Floats(_mm512_mask_expand_ps(vector, static_cast<__mmask16>(lanes), elements));
#elif GRANET_AVX2
  const __m256i element = _mm256_cvtepi8_epi32(_mm_loadu_si64(kExpansions.element[lanes]));
  const __m256 placed = _mm256_permutevar8x32_ps(elements, element);
  return Floats(_mm256_blendv_ps(placed, vector, _mm256_castsi256_ps(element)));
#else
  for (int64_t lane = 0, next = 0; lane < kLanes; ++lane) {
    if ((lanes >> lane & 1) != 0) vector[lane] = elements[next++];
  }
  return vector;
#endif
}

// a0 b0 a1 b1 … of the lower half of the lanes, and of the upper half.
inline Floats interleave_low(Floats a, Floats b) {
#if GRANET_AVX512
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif GRANET_AVX2
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}

inline Floats interleave_high(Floats a, Floats b) {
#if GRANET_AVX512
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif GRANET_AVX2
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// The lanes of even number of two vectors that follow one another.
inline Floats evens(Floats a, Floats b) {
#if GRANET_AVX512
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#elif GRANET_AVX2
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
#else
  return __builtin_shufflevector(a, b, 0, 2, 4, 6);
#endif
}

// Lane by lane, what the vectors hold: behind one another, kRows elements of lane 0, of lane 1, … So with as many rows
// as lanes each vector becomes what was a lane, and with half as many two of them.
template <int64_t kRows>
inline void transpose(Floats (&rows)[kRows]) {
  static_assert(kRows <= kLanes && (kRows & (kRows - 1)) == 0);
#pragma GCC unroll 4
  for (int64_t left = kRows; left > 1; left /= 2) {
    Floats next[kRows];
#pragma GCC unroll 8
    for (int64_t i = 0; i < kRows / 2; ++i) {
      next[2 * i] = interleave_low(rows[i], rows[i + kRows / 2]);
      next[2 * i + 1] = interleave_high(rows[i], rows[i + kRows / 2]);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kRows; ++i) rows[i] = next[i];
  }
}

}  // namespace granet::cpu::GRANET_ISA
