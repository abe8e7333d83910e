// The r-th largest of integers that are in memory already, by digits.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "common/radix.h"
#include "cpu/parallel.h"

namespace granet::cpu {

using DigitCounts = std::array<uint32_t, kDigits>;

template <typename Key>
struct Ranked {
  Key key;
  int64_t above;  // how many are larger
  int64_t equal;
};

// The part that holds the `rank`-th largest (from 1), how many are above it, and in it.
struct RankedDigit {
  int64_t digit;
  int64_t above;
  int64_t equal;
};

inline RankedDigit ranked_digit(std::span<const DigitCounts> counts, int64_t rank) {
  int64_t above = 0;
  for (int64_t digit = kDigits - 1;; --digit) {
    int64_t equal = 0;
    for (const DigitCounts& some : counts) equal += some[static_cast<size_t>(digit)];
    if (above + equal >= rank || digit == 0) return {digit, above, equal};
    above += equal;
  }
}

// As ranked_key(), which see, of keys that are few.
template <typename Key>
Ranked<Key> ranked_of_few(std::span<const std::span<const Key>> lists, int64_t rank) {
  std::vector<Key> keys;
  for (const auto& list : lists) keys.insert(keys.end(), list.begin(), list.end());
  std::nth_element(keys.begin(), keys.begin() + (rank - 1), keys.end(), std::greater<Key>());
  const Key key = keys[static_cast<size_t>(rank - 1)];
  const auto above = std::count_if(keys.begin(), keys.end(), [=](Key other) { return other > key; });
  return {key, above, std::count(keys.begin(), keys.end(), key)};
}

// `lists`: at least `rank` keys (from 1) in all, each inside `range`, less than 2^32 in one list.
template <typename Key>
Ranked<Key> ranked_key(std::span<const std::span<const Key>> lists, KeyRange<Key> range, int64_t rank,
                       const Parallel& parallel) {
  constexpr int64_t kMostTasks = 16;  // each has counters of 16 KiB, which one thread adds up
  constexpr int64_t kLeastKeys = 16'384;
  constexpr int64_t kFewKeys = 1024;  // to clear and to scan the counters costs about what sorting these does
  int64_t total = 0;
  for (const auto& list : lists) total += std::ssize(list);
  if (total <= kFewKeys) return ranked_of_few(lists, rank);
  const int64_t tasks = std::clamp<int64_t>(total / kLeastKeys, 1, std::min<int64_t>(kMostTasks, std::ssize(lists)));
  const auto for_each_list = [&](int64_t task, const auto& visit) {
    const auto bound = [&](int64_t t) { return static_cast<size_t>(std::ssize(lists) * t / tasks); };
    for (size_t i = bound(task); i < bound(task + 1); ++i) visit(lists[i]);
  };
  const Digits<Key> digits(range);
  std::vector<DigitCounts> counts(static_cast<size_t>(tasks));
  parallel.for_each(tasks, [&](int64_t task) {
    DigitCounts& count = counts[static_cast<size_t>(task)];
    count.fill(0);
    for_each_list(task, [&](std::span<const Key> list) {
      for (const Key key : list) ++count[static_cast<size_t>(digits.digit(key))];
    });
  });
  const RankedDigit found = ranked_digit(counts, rank);
  const KeyRange<Key> part = digits.part(found.digit);
  if (part.is_single()) return {part.low, found.above, found.equal};

  std::vector<std::vector<Key>> rest(static_cast<size_t>(tasks));
  parallel.for_each(tasks, [&](int64_t task) {
    for_each_list(task, [&](std::span<const Key> list) {
      for (const Key key : list) {
        if (digits.digit(key) == found.digit) rest[static_cast<size_t>(task)].push_back(key);
      }
    });
  });
  const std::vector<std::span<const Key>> rest_lists(rest.begin(), rest.end());
  Ranked<Key> result = ranked_key<Key>(rest_lists, part, rank - found.above, parallel);
  result.above += found.above;
  return result;
}

}  // namespace granet::cpu
