// What is done to one chunk of a tensor: a task, on any thread.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <span>
#include <type_traits>

#include "common/bits.h"
#include "cpu/scratch.h"
#include "cpu/select_choose.h"
#include "cpu/select_table.h"

namespace granet::cpu {

constexpr int64_t kWordBytes = sizeof(uint64_t);

using ChunkBits = std::array<uint8_t, kChunk / kWeightsPerByte>;
static_assert(kChunk <= int64_t{1} << 16, "places in a chunk are 16 bits");

template <typename Key>
struct Chunk {
  const Part* part;
  size_t group;
  int64_t first;
  int64_t count;
  Split split = {0, 0};
  std::span<const Key> candidates = {};  // keys, in order; none if the range is a single key
  const uint16_t* places = nullptr;      // their elements, counted from `first`
  int64_t ties = INT64_MAX;              // at most so many that equal the threshold stay

  Slice slice() const { return {part->values, part->bits, part->inverted ? ~uint64_t{0} : 0, first, count}; }
  uint8_t* chosen() const { return part->chosen + first / kWeightsPerByte; }
};

template <typename Key>
const KeyKernels<Key>& key_kernels(const SelectTable& table, Rank rank, FloatType type) {
  const auto row = static_cast<size_t>(rank), column = static_cast<size_t>(type);
  if constexpr (std::is_same_v<Key, int32_t>) return table.narrow[row][column];
  if constexpr (std::is_same_v<Key, int64_t>) return table.wide[row][column];
}

// The candidates of many chunks, which take their room in the order in which threads come by.
template <typename Key>
class Candidates {
 public:
  // Room for `most` in all of `chunks` chunks.
  Candidates(int64_t most, int64_t chunks, Scratch& scratch)
      : size_(most + chunks * kGatherAhead),
        keys_(scratch.take<Key>(static_cast<size_t>(size_))),
        places_(scratch.take<uint16_t>(static_cast<size_t>(size_))) {}

  // Those of `chunk` where `within` is set. False if there is no room.
  bool gather(Chunk<Key>& chunk, const ChunkBits& within, const KeyKernels<Key>& kernels) {
    const int64_t room = chunk.split.within + kGatherAhead;
    const int64_t at = used_.fetch_add(room, std::memory_order_relaxed);
    if (at + room > size_) return false;
    kernels.gather(chunk.slice(), within.data(), keys_ + at, places_ + at);
    chunk.candidates = {keys_ + at, static_cast<size_t>(chunk.split.within)};
    chunk.places = places_ + at;
    return true;
  }

 private:
  int64_t size_;
  Key* keys_;
  uint16_t* places_;
  std::atomic<int64_t> used_ = 0;
};

// The eligible bits of the block at element `first`.
inline uint64_t eligible_bits(const Part& part, int64_t first) {
  const uint64_t bits = part.bits == nullptr ? 0 : load_word(part.bits + first / kWeightsPerByte);
  const int64_t count = std::min(kBlock, part.numel - first);
  return (part.inverted ? ~bits : bits) & (~uint64_t{0} >> (kBlock - count));
}

// Zeros behind the last word of a mask, if the chunk is the last of its tensor.
inline void pad(const Part& part, int64_t end) {
  if (end < part.numel) return;
  const int64_t words = ceil_div(part.numel, kBlock);
  std::fill(part.chosen + words * kWordBytes, part.chosen + packed_bytes(part.numel), uint8_t{0});
}

// Chooses all that is eligible, or nothing.
template <typename Key>
void fill(const Chunk<Key>& chunk, bool all) {
  const Part& part = *chunk.part;
  for (int64_t first = chunk.first; first < chunk.first + chunk.count; first += kBlock) {
    store_word(part.chosen + first / kWeightsPerByte, all ? eligible_bits(part, first) : 0);
  }
  pad(part, chunk.first + chunk.count);
}

// Chooses what a split by `range` has counted and marked in chunk.chosen() and `within`: what is above; what is within
// becomes a candidate, or if the range is a single key is chosen too, unless resolve() finds that there are too many.
// False if there is no room for the candidates.
template <typename Key>
bool take(Chunk<Key>& chunk, Split counts, const ChunkBits& within, KeyRange<Key> range, const KeyKernels<Key>& kernels,
          Candidates<Key>& candidates) {
  chunk.split = counts;
  pad(*chunk.part, chunk.first + chunk.count);
  chunk.candidates = {};
  if (range.is_single()) {
    uint8_t* chosen = chunk.chosen();
    for (int64_t i = 0; i < ceil_div(chunk.count, kBlock) * kWordBytes; i += kWordBytes) {
      store_word(chosen + i, load_word(chosen + i) | load_word(within.data() + i));
    }
    return true;
  }
  return chunk.split.within == 0 || candidates.gather(chunk, within, kernels);
}

// Of the elements that equal the only candidate the first chunk.ties stay: chosen were all of them.
template <typename Key>
void limit_equal(const Chunk<Key>& chunk, const KeyKernels<Key>& kernels, KeyRange<Key> range) {
  if (chunk.ties >= chunk.split.within) return;
  ChunkBits equal;
  uint8_t* chosen = chunk.chosen();
  const Marks<Key> marks = {range, chosen, equal.data()};
  Split counts;
  kernels.split[0](chunk.slice(), &marks, &counts);
  int64_t left = chunk.ties;
  for (int64_t i = 0; left > 0; i += kWordBytes) {
    uint64_t bits = load_word(equal.data() + i), first = 0;
    for (; bits != 0 && left > 0; --left) {
      first |= bits & (~bits + 1);
      bits &= bits - 1;
    }
    store_word(chosen + i, load_word(chosen + i) | first);
  }
}

// Chooses the candidates above the threshold and the first chunk.ties of those that equal it.
template <typename Key>
void choose_candidates(const Chunk<Key>& chunk, Key threshold) {
  uint8_t* chosen = chunk.chosen();
  int64_t ties = chunk.ties;
  for (size_t i = 0; i < chunk.candidates.size(); ++i) {
    const Key key = chunk.candidates[i];
    const bool tie = key == threshold;
    const unsigned stays = (key > threshold) | (tie & (ties > 0));
    ties -= tie;
    const unsigned place = chunk.places[i];
    chosen[place / kWeightsPerByte] |= static_cast<uint8_t>(stays << place % kWeightsPerByte);
  }
}

}  // namespace granet::cpu
