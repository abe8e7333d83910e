// What the threads of a warp tell one another. All that the mask names must come to the same place with it.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "engine.h"

namespace simt {

template <typename T>
uint64_t to_word(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "a warp exchanges up to eight bytes");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  return word;
}

template <typename T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

inline uint32_t lane() { return thread_index() % kWarp; }

// The value of lane `source`, of those of `width` lanes that the thread is in; its own where that is outside.
template <typename T>
T shuffle(uint32_t mask, T value, uint32_t source, bool inside, Place place) {
  const uint64_t* words = exchange(mask, to_word(value), place);
  if (!inside) return value;
  if ((mask >> source & 1) == 0) fail("a shuffle reads a thread that its mask leaves out");
  return from_word<T>(words[source]);
}

template <typename T, typename Combine>
T reduce(uint32_t mask, T value, Combine combine, Place place) {
  const uint64_t* words = exchange(mask, to_word(value), place);
  T result = value;
  bool own = false;  // the own value is the first, so it is left out once
  for (uint32_t i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1) == 0) continue;
    if (i == lane() && !own) {
      own = true;
      continue;
    }
    result = combine(result, from_word<T>(words[i]));
  }
  return result;
}

}  // namespace simt

inline void __syncwarp(unsigned mask = 0xffffffff, simt::Place place = simt::Place::current()) {
  simt::sync_warp(mask, place);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, simt::Place place = simt::Place::current()) {
  const uint32_t first = simt::lane() / width * width;
  return simt::shuffle(mask, value, first + static_cast<uint32_t>(source) % width, true, place);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Place place = simt::Place::current()) {
  const uint32_t in_part = simt::lane() % width;
  return simt::shuffle(mask, value, simt::lane() - delta, in_part >= delta, place);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Place place = simt::Place::current()) {
  const uint32_t in_part = simt::lane() % width;
  return simt::shuffle(mask, value, simt::lane() + delta, in_part + delta < static_cast<uint32_t>(width), place);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, simt::Place place = simt::Place::current()) {
  const uint32_t source = simt::lane() ^ static_cast<uint32_t>(lanes);
  return simt::shuffle(mask, value, source, source / width <= simt::lane() / width, place);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Place place = simt::Place::current()) {
  const uint64_t* words = simt::exchange(mask, predicate != 0, place);
  unsigned ballot = 0;
  for (uint32_t i = 0; i < simt::kWarp; ++i) ballot |= (mask >> i & 1) != 0 && words[i] != 0 ? 1U << i : 0;
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate, simt::Place place = simt::Place::current()) {
  return __ballot_sync(mask, predicate, place) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt::Place place = simt::Place::current()) {
  return __ballot_sync(mask, predicate, place) == mask;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, simt::Place place = simt::Place::current()) {
  const uint64_t* words = simt::exchange(mask, simt::to_word(value), place);
  unsigned equal = 0;
  for (uint32_t i = 0; i < simt::kWarp; ++i) {
    equal |= (mask >> i & 1) != 0 && words[i] == simt::to_word(value) ? 1U << i : 0;
  }
  return equal;
}

#define GRANET_SIMT_REDUCE(name, type, expression)                                              \
  inline type name(unsigned mask, type value, simt::Place place = simt::Place::current()) {     \
    return simt::reduce(mask, value, [](type a, type b) -> type { return expression; }, place); \
  }
GRANET_SIMT_REDUCE(__reduce_add_sync, unsigned, a + b)
GRANET_SIMT_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
GRANET_SIMT_REDUCE(__reduce_max_sync, unsigned, a < b ? b : a)
GRANET_SIMT_REDUCE(__reduce_and_sync, unsigned, a& b)
GRANET_SIMT_REDUCE(__reduce_or_sync, unsigned, a | b)
GRANET_SIMT_REDUCE(__reduce_add_sync, int, a + b)
GRANET_SIMT_REDUCE(__reduce_min_sync, int, a < b ? a : b)
GRANET_SIMT_REDUCE(__reduce_max_sync, int, a < b ? b : a)
#undef GRANET_SIMT_REDUCE
