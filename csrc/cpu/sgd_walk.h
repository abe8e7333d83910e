// How a chunk's groups are walked, whatever is computed of each: compiled once for each instruction set.
//
// `Work` has group<all>(chunk, g, mask), which computes the eight weights of group g, all of them or those whose bit
// is set, and prefetch<level>(chunk, g), which fetches what that needs.
#pragma once

#include "common/prefetch.h"
#include "common/simd_dtypes.h"
#include "cpu/sgd_list.h"

namespace granet::cpu::GRANET_ISA {

// Words of the mask, 256 bytes of each fp32 tensor, by which the lines of every group are fetched ahead where that is
// done (sgd.cpp), into the first level. When it was new it took 0.93 of the time on one thread (8 to 12 words alike; 4
// and 6, or the second level, gained nothing), and as long on two, which wait for memory; on which Zen is not certain.
constexpr int64_t kWordsAhead = 10;

constexpr uint32_t kAll = 0xff;

// Every group of the chunk, except for words without an active weight. The groups of a word are not told apart: at
// 90 % random sparsity a branch for each cannot be foreseen, and made the step take 1.4 times as long.
template <typename Work, typename Chunk>
inline void all_groups(const Work& work, const Chunk chunk) {
  const int64_t whole = chunk.group_count / kWordGroups * kWordGroups;
  for (int64_t g = 0; g < whole; g += kWordGroups) {
    uint64_t word;
    __builtin_memcpy(&word, chunk.mask + g, sizeof word);
    for (int64_t i = 0; i < kWordGroups && chunk.fetches_ahead; ++i) {
      work.template prefetch<kFirstLevel>(chunk, g + kWordsAhead * kWordGroups + i);
    }
    if (word == ~uint64_t{0}) {
      for (int64_t i = 0; i < kWordGroups; ++i) work.template group<true>(chunk, g + i, kAll);
    } else if (word != 0) {
      for (int64_t i = 0; i < kWordGroups; ++i) {
        work.template group<false>(chunk, g + i, static_cast<uint8_t>(word >> (i * kMaxLanes)));
      }
    }
  }
  for (int64_t g = whole; g < chunk.group_count; ++g) {
    if (chunk.mask[g] != 0) work.template group<false>(chunk, g, chunk.mask[g]);
  }
}

// The processor's own prefetchers would fetch the wrong lines. With 28 % of the lines in use the second level of
// caches takes 0.6 of the time of prefetching into the first, which gained nothing.
template <typename Work, typename Chunk>
inline void take_turns(const Work& work, const Chunk& chunk, const GroupList& now, const GroupList& next) {
  const int64_t both = now.size() < next.size() ? now.size() : next.size();
  for (int64_t i = 0; i < both; ++i) {
    work.template prefetch<kSecondLevel>(chunk, next[i]);
    work.template group<false>(chunk, now[i], chunk.mask[now[i]]);
  }
  for (int64_t i = both; i < now.size(); ++i) work.template group<false>(chunk, now[i], chunk.mask[now[i]]);
  for (int64_t i = both; i < next.size(); ++i) work.template prefetch<kSecondLevel>(chunk, next[i]);
}

// The groups that have an active weight: those of a list, in turn with fetching those of the next one.
template <typename Work, typename Chunk>
inline void listed_groups(const Work& work, const Chunk chunk) {
  const int64_t words = chunk.group_count / kWordGroups;
  GroupList lists[2];
  for (int64_t turn = -1; turn < kStride; ++turn) {
    const GroupList& now = lists[turn & 1];
    GroupList& next = lists[(turn + 1) & 1];
    next.take(chunk.mask, turn + 1 < kStride ? words : 0, turn + 1);
    take_turns(work, chunk, now, next);
  }
  for (int64_t g = words * kWordGroups; g < chunk.group_count; ++g) {
    if (chunk.mask[g] != 0) work.template group<false>(chunk, g, chunk.mask[g]);
  }
}

// A vector of results: of all lanes, or of those whose bit is set, where the others keep their `old` bits.
template <int64_t n, bool all, typename T>
inline void write(T* address, const Lanes<Bits<T>, n>& bits, const Lanes<Bits<T>, n>& old, uint32_t mask) {
  if constexpr (all) {
    store_bits<n>(address, bits);
  } else {
    store_where<n>(address, bits, old, mask);
  }
}

}  // namespace granet::cpu::GRANET_ISA
