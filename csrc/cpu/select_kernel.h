// Passes over keys, for one instruction set: see select_table.h for what each does.
#pragma once

#include "common/radix.h"
#include "cpu/select_table.h"

#ifndef GRANET_ISA
#error "include common/target_portable.h, target_avx2.h or target_avx512.h first"
#endif

namespace granet::cpu::GRANET_ISA {

// How far ahead numbers are fetched, 5 KiB of fp32: a page and a bit, since the processor's own prefetchers stop at the
// end of each page, and what is done with a block is too long for the next one's loads to be under way. On a Zen 4
// choosing takes 0.8 of the time on one thread (16 to 64 blocks alike, 4 gain half of it), on two 0.9.
constexpr int64_t kBlocksAhead = 20;

GRANET_INLINE uint64_t load_word(const uint8_t* address) {
  uint64_t word;
  __builtin_memcpy(&word, address, sizeof word);
  return word;
}

GRANET_INLINE void store_word(uint8_t* address, uint64_t word) { __builtin_memcpy(address, &word, sizeof word); }

GRANET_INLINE uint64_t low_bits(int64_t count) { return ~uint64_t{0} >> (kBlock - count); }  // count in [1, 64]

GRANET_INLINE int64_t ones(uint64_t word) {
  if constexpr (kVectorBytes > 16) return __builtin_popcountll(word);
  // Without the instruction the compiler would call a function that looks up every byte.
  word -= (word >> 1) & 0x5555'5555'5555'5555;
  word = (word & 0x3333'3333'3333'3333) + ((word >> 2) & 0x3333'3333'3333'3333);
  word = (word + (word >> 4)) & 0x0f0f'0f0f'0f0f'0f0f;
  return static_cast<int64_t>(word * 0x0101'0101'0101'0101 >> 56);
}

// `typedef`, because GCC ignores the attribute in an alias of a type that depends on a parameter.
template <typename Lane, int64_t bytes = kVectorBytes>
struct Vector {
  static constexpr int64_t kLanes = bytes / static_cast<int64_t>(sizeof(Lane));
  typedef Lane Type __attribute__((vector_size(bytes)));
};

// Bit i is 1 where lane i of a > lane i of b. The builtins have the same names in GCC and Clang; a macro that tells the
// instruction set does not, for GCC's pragma leaves __AVX2__ undefined.
template <typename Key, int64_t bytes = kVectorBytes>
GRANET_INLINE uint64_t greater(typename Vector<Key, bytes>::Type a, typename Vector<Key, bytes>::Type b) {
#if defined(__x86_64__)
  using Floats = typename Vector<float, bytes>::Type;
  using Doubles = typename Vector<double, bytes>::Type;
  constexpr bool kNarrow = sizeof(Key) == sizeof(float);
  if constexpr (bytes == 64) {
    constexpr int kGreater = 6;
    if constexpr (kNarrow) return __builtin_ia32_cmpd512_mask(a, b, kGreater, 0xffff);
    using Longs = typename Vector<long long, bytes>::Type;  // int64_t is another type of the same size
    if constexpr (!kNarrow) return __builtin_ia32_cmpq512_mask((Longs)a, (Longs)b, kGreater, 0xff);
  } else if constexpr (bytes == 32) {
    if constexpr (kNarrow) return static_cast<unsigned>(__builtin_ia32_movmskps256((Floats)(a > b)));
    if constexpr (!kNarrow) return static_cast<unsigned>(__builtin_ia32_movmskpd256((Doubles)(a > b)));
  } else {
    if constexpr (kNarrow) return static_cast<unsigned>(__builtin_ia32_movmskps((Floats)(a > b)));
    if constexpr (!kNarrow) return static_cast<unsigned>(__builtin_ia32_movmskpd((Doubles)(a > b)));
  }
#else
  const auto lanes = a > b;
  uint64_t bits = 0;
  for (int64_t i = 0; i < Vector<Key, bytes>::kLanes; ++i) bits |= static_cast<uint64_t>(lanes[i] & 1) << i;
  return bits;
#endif
}

// The lines of a block, which may lie behind the end.
template <typename Bits>
GRANET_INLINE void fetch(const Bits* block) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(Bits));
  for (int64_t i = 0; i < kBlock; i += kLine) __builtin_prefetch(block + i);
}

// The keys above `bound` among 64.
template <typename Key>
GRANET_INLINE uint64_t greater_bits(const Key* keys, Key bound) {
  using Keys = typename Vector<Key>::Type;
  const Keys bounds = bound - Keys{};
  uint64_t bits = 0;
  for (int64_t i = 0; i < kBlock; i += Vector<Key>::kLanes) {
    Keys lanes;
    __builtin_memcpy(&lanes, keys + i, sizeof lanes);
    bits |= greater<Key>(lanes, bounds) << i;
  }
  return bits;
}

// The passes for numbers of one format, ranked one way, with keys of one width.
template <typename Format, Rank rank, typename Key>
struct Passes {
  using Bits = typename Format::Bits;

  static GRANET_INLINE Key key(const void* values, int64_t i) {
    return key_of<Format, rank, Key>(static_cast<const Bits*>(values)[i]);
  }

  static void keys(const void* values, int64_t first, Key* keys) {
    for (int64_t i = 0; i < 8; ++i) keys[i] = key(values, first + i);
  }

  // The keys of the block at element `first`; those from `count` on are left as they are.
  static GRANET_INLINE void block_keys(const void* values, int64_t first, int64_t count, Key* block) {
    if (count == kBlock) {  // of a length that the compiler knows
      for (int64_t i = 0; i < kBlock; ++i) block[i] = key(values, first + i);
    } else {
      for (int64_t i = 0; i < count; ++i) block[i] = key(values, first + i);
    }
  }

  // visit(place in the slice, eligible bits, 64 keys) for each block; keys of a block without eligible elements are
  // stale.
  template <typename Visit>
  static GRANET_INLINE void for_each_block(const Slice& slice, const Visit& visit) {
    alignas(64) Key block[kBlock] = {};
    for (int64_t i = 0; i < slice.count; i += kBlock) {
      const int64_t first = slice.first + i;
      const int64_t count = slice.count - i < kBlock ? slice.count - i : kBlock;
      const uint64_t bits = slice.bits == nullptr ? 0 : load_word(slice.bits + first / 8);
      const uint64_t eligible = (bits ^ slice.flip) & low_bits(count);
      fetch(static_cast<const Bits*>(slice.values) + first + kBlocksAhead * kBlock);
      if (eligible != 0) block_keys(slice.values, first, count, block);
      visit(i, eligible, block);
    }
  }

  template <int ranges>
  static void split(const Slice& slice, const Marks<Key>* marks, Split* counts) {
    Split totals[ranges] = {};
    Marks<Key> all[ranges];  // what is stored could lie over `marks`, for all that the compiler knows
    for (int i = 0; i < ranges; ++i) all[i] = marks[i];
    for_each_block(slice, [&](int64_t place, uint64_t eligible, const Key* block) {
      for (int i = 0; i < ranges; ++i) {
        const auto& [range, above, within] = all[i];
        uint64_t high = 0, low = 0;
        if (eligible != 0) {
          const bool open = range.low == KeyTraits<Key>::kLowest;
          high = greater_bits(block, range.high) & eligible;
          low = (open ? eligible : greater_bits(block, static_cast<Key>(range.low - 1)) & eligible) & ~high;
        }
        store_word(above + place / 8, high);
        store_word(within + place / 8, low);
        totals[i].above += ones(high);
        totals[i].within += ones(low);
      }
    });
    for (int i = 0; i < ranges; ++i) counts[i] = totals[i];
  }

  // The first two places of a block are written whether they are there or not: a branch for each would be guessed wrong
  // about once a block. Keys come after all places, in a loop without such guesses.
  static void gather(const Slice& slice, const uint8_t* within, Key* keys, uint16_t* places) {
    static_assert(kGatherAhead == 2);
    constexpr uint64_t kLast = uint64_t{1} << (kBlock - 1);  // some place, if there is none
    uint16_t* next = places;
    for (int64_t i = 0; i < slice.count; i += kBlock) {
      const uint64_t bits = load_word(within + i / 8);
      const uint64_t without_first = bits & (bits - 1);
      next[0] = static_cast<uint16_t>(i + __builtin_ctzll(bits | kLast));
      next[1] = static_cast<uint16_t>(i + __builtin_ctzll(without_first | kLast));
      int64_t done = 2;
      for (uint64_t rest = without_first & (without_first - 1); rest != 0; rest &= rest - 1) {
        next[done++] = static_cast<uint16_t>(i + __builtin_ctzll(rest));
      }
      next += ones(bits);
    }
    for (int64_t c = 0; c < next - places; ++c) keys[c] = key(slice.values, slice.first + places[c]);
  }

  // Even and odd elements have counters of their own: an increment waits for the one before it on the same counter,
  // and with equal numbers that is all of them.
  static void count(const Slice& slice, const Digits<Key>& digits, uint32_t* counts) {
    using Unsigned = typename KeyTraits<Key>::Unsigned;
    uint32_t odd[kDigits + 1] = {};
    uint32_t even[kDigits + 1] = {};  // the last one counts what is outside
    const Unsigned span = digits.span();
    for_each_block(slice, [&](int64_t, uint64_t eligible, const Key* block) {
      if (eligible == 0) return;
      for (int64_t i = 0; i < kBlock; i += 2) {
        const Unsigned a = digits.offset(block[i]), b = digits.offset(block[i + 1]);
        ++even[a <= span && (eligible >> i & 1) != 0 ? static_cast<int64_t>(a >> digits.shift) : kDigits];
        ++odd[b <= span && (eligible >> i & 2) != 0 ? static_cast<int64_t>(b >> digits.shift) : kDigits];
      }
    });
    for (int64_t i = 0; i < kDigits; ++i) counts[i] += even[i] + odd[i];
  }

  static constexpr KeyKernels<Key> kernels() { return {keys, {split<1>, split<2>}, gather, count}; }
};

// Zeroing, one cache line (64 bytes, if the tensor begins at one) at a time.
template <typename Bits>
struct Zero {
  static constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(Bits));  // elements
  static constexpr int64_t kByteOfMask = 8 * sizeof(Bits);                   // the eight elements that it covers
  static constexpr int64_t kBytes = kVectorBytes < kByteOfMask ? kVectorBytes : kByteOfMask;
  static constexpr int64_t kLanes = Vector<Bits, kBytes>::kLanes;
  using Lanes = typename Vector<Bits, kBytes>::Type;

  static GRANET_INLINE Lanes kept_lanes(uint64_t keep) {
    Lanes lane_bits = {};
    for (int64_t i = 0; i < kLanes; ++i) lane_bits[i] = static_cast<Bits>(1 << i);  // a constant
    const Lanes byte = static_cast<Bits>(keep & 0xff) - Lanes{};
    return (Lanes)((byte & lane_bits) == lane_bits);
  }

  static GRANET_INLINE bool any(Lanes lanes) {
#if GRANET_AVX2
    if constexpr (sizeof(Lanes) == 32) return _mm256_testz_si256((__m256i)lanes, (__m256i)lanes) == 0;
#endif
    uint64_t words[sizeof(Lanes) / sizeof(uint64_t)];
    __builtin_memcpy(words, &lanes, sizeof words);
    uint64_t result = 0;
    for (const uint64_t word : words) result |= word;
    return result != 0;
  }

  static GRANET_INLINE void line(Bits* values, uint64_t keep) {
#if GRANET_AVX512
    const __m512i lanes = _mm512_loadu_si512(values), zeros = _mm512_setzero_si512();
    // Where about half of the lines change, a branch around the store costs more than a store of no lanes.
    if constexpr (sizeof(Bits) == 2) {
      _mm512_mask_storeu_epi16(values, _mm512_test_epi16_mask(lanes, lanes) & ~static_cast<__mmask32>(keep), zeros);
    } else if constexpr (sizeof(Bits) == 4) {
      const __mmask16 lost = _mm512_test_epi32_mask(lanes, lanes) & ~static_cast<__mmask16>(keep);
      _mm512_mask_storeu_epi32(values, lost, zeros);
    } else {
      const __mmask8 lost = _mm512_test_epi64_mask(lanes, lanes) & ~static_cast<__mmask8>(keep);
      _mm512_mask_storeu_epi64(values, lost, zeros);
    }
#else
    constexpr int64_t kVectors = kLine / kLanes;
    Lanes vectors[kVectors], lost = {};
    for (int64_t v = 0; v < kVectors; ++v) {
      Lanes lanes;
      __builtin_memcpy(&lanes, values + v * kLanes, sizeof lanes);
      vectors[v] = lanes & kept_lanes(keep >> v * kLanes);
      lost |= lanes ^ vectors[v];
    }
    // Without a branch, too: a line that stays as it is is stored elsewhere. Of an update of 25.5 million weights with
    // AVX2 zeroing takes 20 ms, with a branch 44.
    alignas(64) Bits elsewhere[kLine];
    Bits* target = any(lost) ? values : elsewhere;
    for (int64_t v = 0; v < kVectors; ++v) __builtin_memcpy(target + v * kLanes, &vectors[v], sizeof(Lanes));
#endif
  }

  static void run(void* values, int64_t first, int64_t count, const uint8_t* keep) {
    for (int64_t i = 0; i < count; i += kBlock) {
      const uint64_t word = load_word(keep + (first + i) / 8);
      Bits* block = static_cast<Bits*>(values) + first + i;
      fetch(block + kBlocksAhead * kBlock);
      if (count - i < kBlock) {
        for (int64_t j = 0; j < count - i; ++j) block[j] = (word >> j & 1) != 0 ? block[j] : Bits{0};
      } else if (~word != 0) {
        for (int64_t j = 0; j < kBlock; j += kLine) line(block + j, word >> j);
      }
    }
  }
};

template <Rank rank>
constexpr void fill(SelectTable& table) {
  auto& narrow = table.narrow[static_cast<int>(rank)];
  auto& wide = table.wide[static_cast<int>(rank)];
  narrow[static_cast<int>(FloatType::kFloat32)] = Passes<Float32, rank, int32_t>::kernels();
  narrow[static_cast<int>(FloatType::kBFloat16)] = Passes<BFloat16, rank, int32_t>::kernels();
  narrow[static_cast<int>(FloatType::kFloat16)] = Passes<Float16, rank, int32_t>::kernels();
  wide[static_cast<int>(FloatType::kFloat32)] = Passes<Float32, rank, int64_t>::kernels();
  wide[static_cast<int>(FloatType::kBFloat16)] = Passes<BFloat16, rank, int64_t>::kernels();
  wide[static_cast<int>(FloatType::kFloat16)] = Passes<Float16, rank, int64_t>::kernels();
  wide[static_cast<int>(FloatType::kFloat64)] = Passes<Float64, rank, int64_t>::kernels();
}

constexpr SelectTable select_table() {
  SelectTable table = {};
  fill<Rank::kMagnitude>(table);
  fill<Rank::kGain>(table);
  fill<Rank::kSigned>(table);
  table.zero[1] = Zero<uint16_t>::run;
  table.zero[2] = Zero<uint32_t>::run;
  table.zero[3] = Zero<uint64_t>::run;
  return table;
}

}  // namespace granet::cpu::GRANET_ISA
