// Vectors of a few lanes of any dtype: to and from memory, to and from the dtype that is computed in.
//
// Included behind common/target_*.h, like common/simd.h. `Lanes<T, n>` is a vector of n numbers; n is chosen so that
// the widest vector of a kernel fills a register, and no vector is wider than eight lanes, one mask byte.
#pragma once

#ifndef GRANET_ISA
#error "include common/target_portable.h, target_avx2.h or target_avx512.h first"
#endif

namespace granet::cpu::GRANET_ISA {

constexpr int64_t kMaxLanes = 8;  // the weights of a mask byte

template <typename T>
constexpr int64_t kLanesOf =
    kVectorBytes / static_cast<int64_t>(sizeof(T)) < kMaxLanes ? kVectorBytes / static_cast<int64_t>(sizeof(T))
                                                               : kMaxLanes;

template <typename T, int64_t n>
struct LanesOf {
  typedef T type __attribute__((vector_size(n * sizeof(T))));
};

template <typename T, int64_t n>
using Lanes = typename LanesOf<T, n>::type;

struct Bfloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// What numbers of a dtype are computed in, and the integer that holds their bits.
template <typename T>
struct Traits {
  using Compute = float;
  using Bits = uint16_t;
};
template <>
struct Traits<float> {
  using Compute = float;
  using Bits = uint32_t;
};
template <>
struct Traits<double> {
  using Compute = double;
  using Bits = uint64_t;
};

template <typename T>
using Compute = typename Traits<T>::Compute;
template <typename T>
using Bits = typename Traits<T>::Bits;

template <bool first, typename A, typename B>
struct Choice {
  using type = A;
};
template <typename A, typename B>
struct Choice<false, A, B> {
  using type = B;
};

template <typename A, typename B>
using Larger = typename Choice<(sizeof(A) >= sizeof(B)), A, B>::type;

template <typename A, typename B>
constexpr bool kSame = false;
template <typename A>
constexpr bool kSame<A, A> = true;

template <typename To, typename From>
inline To reinterpret(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <int64_t n, typename T>
inline Lanes<Bits<T>, n> load_bits(const T* address) {
  Lanes<Bits<T>, n> bits;
  __builtin_memcpy(&bits, address, sizeof bits);
  return bits;
}

template <int64_t n, typename T>
inline void store_bits(T* address, const Lanes<Bits<T>, n>& bits) {
  __builtin_memcpy(address, &bits, sizeof bits);
}

// All ones in the lanes whose bit is set in the low n bits of `mask`.
template <typename Word, int64_t n>
inline Lanes<Word, n> lanes_where(uint32_t mask) {
  Lanes<Word, n> bit_of_lane;
  for (int64_t i = 0; i < n; ++i) bit_of_lane[i] = static_cast<Word>(1U << i);
  return reinterpret<Lanes<Word, n>>((bit_of_lane & static_cast<Word>(mask)) == bit_of_lane);
}

// Where the low n bits of `mask` are set, the bits in memory become `bits`; elsewhere they stay `old`, which they are.
template <int64_t n, typename T>
inline void store_where(T* address, const Lanes<Bits<T>, n>& bits, [[maybe_unused]] const Lanes<Bits<T>, n>& old,
                        uint32_t mask) {
#if GRANET_AVX512
  const auto lanes = static_cast<__mmask8>(mask);
  if constexpr (n == 8 && sizeof(T) == 2) {
    return _mm_mask_storeu_epi16(address, lanes, reinterpret<Lanes<long long, 2>>(bits));
  }
  if constexpr (n == 8 && sizeof(T) == 4) {
    return _mm256_mask_storeu_epi32(address, lanes, reinterpret<Lanes<long long, 4>>(bits));
  }
  if constexpr (n == 8 && sizeof(T) == 8) {
    return _mm512_mask_storeu_epi64(address, lanes, reinterpret<Lanes<long long, 8>>(bits));
  }
#elif GRANET_AVX2
  if constexpr (n == 8 && sizeof(T) == 4) {  // each lane's bit becomes its sign, which is what a blend looks at
    const __m256i to_sign = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    const __m256i chosen = _mm256_sllv_epi32(_mm256_set1_epi32(static_cast<int32_t>(mask)), to_sign);
    const __m256 result =
        _mm256_blendv_ps(reinterpret<__m256>(old), reinterpret<__m256>(bits), reinterpret<__m256>(chosen));
    return _mm256_storeu_ps(reinterpret_cast<float*>(address), result);
  }
#endif
  const Lanes<Bits<T>, n> written = lanes_where<Bits<T>, n>(mask);
  store_bits<n>(address, (bits & written) | (old & ~written));
}

// ---- one number: the lanes that have no instruction ---------------------------------------------

inline float float16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 0x1f;
  const uint32_t fraction = half & 0x3ff;
  if (exponent == 0) {  // zero and subnormal: fraction * 2^-24, exact in fp32
    const float magnitude = static_cast<float>(fraction) * 0x1p-24F;
    return reinterpret<float>(reinterpret<uint32_t>(magnitude) | sign);
  }
  const uint32_t biased = exponent == 0x1f ? 0xff : exponent + (127 - 15);
  const uint32_t quiet = exponent == 0x1f && fraction != 0 ? 0x40'0000 : 0;
  return reinterpret<float>(sign | biased << 23 | fraction << 13 | quiet);
}

// To nearest, ties to even; NaN keeps its sign and the head of its payload, and is made quiet.
inline uint16_t float_to_float16(float number) {
  const uint32_t bits = reinterpret<uint32_t>(number);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fff'ffff;
  if (magnitude > 0x7f80'0000) return static_cast<uint16_t>(sign | 0x7e00 | ((magnitude >> 13) & 0x3ff));
  if (magnitude >= 0x4780'0000) return static_cast<uint16_t>(sign | 0x7c00);  // from 65536 on: infinity
  if (magnitude < 0x3880'0000) {  // below 2^-14: adding 0.5 shifts the unit of the last place to 2^-24 and rounds
    const float shifted = reinterpret<float>(magnitude) + 0.5F;
    return static_cast<uint16_t>(sign | (reinterpret<uint32_t>(shifted) - 0x3f00'0000));
  }
  const uint32_t odd = (magnitude >> 13) & 1;
  return static_cast<uint16_t>(sign | ((magnitude - (uint32_t{127 - 15} << 23) + 0xfff + odd) >> 13));
}

// ---- decode, encode ------------------------------------------------------------------------------

template <typename To, int64_t n, typename From>
inline Lanes<To, n> convert(const Lanes<From, n>& from) {
  return __builtin_convertvector(from, Lanes<To, n>);
}

// Specialised for each dtype: the numbers behind bits, and the bits nearest to numbers.
template <typename T, int64_t n>
struct Coding {  // float and double
  using Numbers = Lanes<T, n>;
  using Words = Lanes<Bits<T>, n>;
  static Numbers decode(const Words& words) { return reinterpret<Numbers>(words); }
  static Words encode(const Numbers& numbers) { return reinterpret<Words>(numbers); }
};

template <int64_t n>
struct Coding<Bfloat16, n> {
  using Numbers = Lanes<float, n>;
  using Words = Lanes<uint16_t, n>;
  using Wide = Lanes<uint32_t, n>;

  static Numbers decode(const Words& words) {
    return reinterpret<Numbers>(convert<uint32_t, n, uint16_t>(words) << 16);
  }

  // To nearest, ties to even; NaN keeps its sign and the head of its payload, and is made quiet.
  static Words encode(const Numbers& numbers) {
    const Wide bits = reinterpret<Wide>(numbers);
    const Wide rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const Wide is_nan = reinterpret<Wide>(numbers != numbers);
    const Wide chosen = (rounded & ~is_nan) | ((bits | 0x40'0000) & is_nan);
    return convert<uint16_t, n, uint32_t>(chosen >> 16);
  }
};

template <int64_t n>
struct Coding<Float16, n> {
  using Numbers = Lanes<float, n>;
  using Words = Lanes<uint16_t, n>;

  static Numbers decode(const Words& words) {
#if GRANET_AVX2
    if constexpr (n == 8) return _mm256_cvtph_ps(reinterpret<Lanes<long long, 2>>(words));
#endif
    Numbers numbers;
    for (int64_t i = 0; i < n; ++i) numbers[i] = float16_to_float(words[i]);
    return numbers;
  }

  static Words encode(const Numbers& numbers) {
#if GRANET_AVX2
    if constexpr (n == 8) {
      const Lanes<long long, 2> words = _mm256_cvtps_ph(numbers, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      return reinterpret<Words>(words);
    }
#endif
    Words words;
    for (int64_t i = 0; i < n; ++i) words[i] = float_to_float16(numbers[i]);
    return words;
  }
};

// ---- a * b + c ------------------------------------------------------------------------------------

#if GRANET_AVX2 || defined(__ARM_FEATURE_FMA)
inline float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
inline float multiply_add(float a, float b, float c) { return a * b + c; }
inline double multiply_add(double a, double b, double c) { return a * b + c; }
#endif

// Rounded once where the instruction set can: as PyTorch's kernels, which fuse from AVX2 on and on Arm.
template <typename T, int64_t n>
inline Lanes<T, n> multiply_add(const Lanes<T, n>& a, const Lanes<T, n>& b, const Lanes<T, n>& c) {
  Lanes<T, n> sum;
#if GRANET_AVX512
  if constexpr (sizeof(sum) == 64 && sizeof(T) == sizeof(double)) return _mm512_fmadd_pd(a, b, c);
#endif
#if GRANET_AVX2
  if constexpr (sizeof(sum) == 32 && sizeof(T) == sizeof(double)) return _mm256_fmadd_pd(a, b, c);
  if constexpr (sizeof(sum) == 32 && sizeof(T) == sizeof(float)) return _mm256_fmadd_ps(a, b, c);
#endif
  for (int64_t i = 0; i < n; ++i) sum[i] = multiply_add(a[i], b[i], c[i]);
  return sum;
}

}  // namespace granet::cpu::GRANET_ISA
