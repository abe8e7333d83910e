// Usually one pass over the values: a sample gives two keys that most likely enclose the k-th largest; the pass counts
// and marks what is above the upper one and what is between, the candidates; the keys of the candidates, one in a
// hundred of a large tensor and one in ten of a small one, decide. If the counts prove the guess wrong, or the
// candidates are too many, histograms over all eligible keys find a narrower range that certainly holds the k-th
// largest, and the pass is repeated with that.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "common/isa.h"
#include "cpu/select_choose.h"
#include "cpu/select_chunk.h"
#include "cpu/select_rank.h"
#include "cpu/select_sample.h"
#include "cpu/select_table.h"

namespace granet::cpu {

// Below so many eligible elements all of them are candidates: a sample would not pay.
constexpr int64_t kFew = 16'384;
constexpr int64_t kCandidateShare = 4;  // at most a quarter of the eligible, for the sake of memory

inline int64_t most_candidates(int64_t eligible) { return std::max(kFew, eligible / kCandidateShare); }

// A choice by one count, as it goes on.
enum class Fate : uint8_t { kAll, kNone, kSearch };

inline Fate fate_of(const Group& group) {
  return group.k <= 0 ? Fate::kNone : group.k >= group.eligible ? Fate::kAll : Fate::kSearch;
}

template <typename Key>
struct Search {
  Group group;
  Fate fate;
  size_t begin = 0, end = 0;  // chunks
  KeyRange<Key> range;        // holds the k-th largest, or is expected to
  Split split = {0, 0};
  bool complete = true;  // the candidates' keys are all there
  Key threshold = 0;
  int64_t ties = 0;          // how many that equal the threshold stay
  bool ties_differ = false;  // not all of them do

  std::vector<Key> sample = {};

  int64_t wanted() const { return group.k - split.above; }  // among the candidates
};

// The searches of all groups, step by step: sample(), guess(), split() of all chunks, settle(), finish().
template <typename Key>
class Chooser {
 public:
  Chooser(std::span<const Part> parts, std::span<const Group> groups, Rank rank, Scratch& scratch,
          const Parallel& parallel);

  // A pass over some chunks, all of a search or none: counts and marks, and gathers candidates.
  class Pass {
   public:
    Pass(Chooser& chooser, std::span<const size_t> which);
    void visit(size_t chunk);  // one of them, on any thread
    void finish();             // when all have been visited

    // visit() of a chunk that is the same elements for both, eligible for both alike; `other` has a search there.
    static void visit_both(Pass& one, Pass& other, size_t chunk);

   private:
    static int64_t most_keys(const Chooser& chooser, std::span<const size_t> which);
    const Search<Key>& search_of(const Chunk<Key>& chunk) const { return chooser_.searches_[chunk.group]; }
    void take(Chunk<Key>& chunk, Split counts, const ChunkBits& within);

    Chooser& chooser_;
    std::span<const size_t> which_;
    Candidates<Key> candidates_;
    std::vector<std::atomic<bool>> complete_;  // by search
  };

  void sample();
  void guess();
  void guess(Search<Key>& search) const;
  void split(std::span<const size_t> which);
  void settle();
  void finish(const Done& done);

  std::vector<size_t> all_chunks() const;
  std::span<Search<Key>> searches() { return searches_; }
  std::span<const Chunk<Key>> chunks() const { return chunks_; }

 private:
  friend class Pass;

  void add_chunks(Search<Key>& search, size_t index);
  template <typename Visit>
  void for_each_search(const Visit& visit);
  bool missed(Search<Key>& search, KeyRange<Key>& known);
  void narrow(Search<Key>& search, KeyRange<Key> known);
  void find_threshold(Search<Key>& search, const Parallel& parallel);
  void share_ties(Search<Key>& search);
  void resolve(const Chunk<Key>& chunk);

  const KeyKernels<Key>& kernels(const Part& part) const { return key_kernels<Key>(table_, rank_, part.type); }
  std::span<Chunk<Key>> chunks(const Search<Key>& search) {
    return std::span(chunks_).subspan(search.begin, search.end - search.begin);
  }

  std::span<const Part> parts_;
  Rank rank_;
  Scratch& scratch_;
  const Parallel& parallel_;
  const SelectTable& table_;
  std::vector<Search<Key>> searches_;
  std::vector<Chunk<Key>> chunks_;
};

template <typename Key>
Chooser<Key>::Chooser(std::span<const Part> parts, std::span<const Group> groups, Rank rank, Scratch& scratch,
                      const Parallel& parallel)
    : parts_(parts),
      rank_(rank),
      scratch_(scratch),
      parallel_(parallel),
      table_(*GRANET_FOR_ISA(&select_portable, &select_avx2, &select_avx512)) {
  for (const Group& group : groups) {
    searches_.push_back({.group = group, .fate = fate_of(group), .range = all_keys<Key>(rank)});
    add_chunks(searches_.back(), searches_.size() - 1);
  }
}

template <typename Key>
void Chooser<Key>::add_chunks(Search<Key>& search, size_t index) {
  search.begin = chunks_.size();
  for (int64_t p = search.group.begin; p < search.group.end; ++p) {
    const Part& part = parts_[static_cast<size_t>(p)];
    for (int64_t first = 0; first < part.numel; first += kChunk) {
      chunks_.push_back({.part = &part, .group = index, .first = first, .count = std::min(kChunk, part.numel - first)});
    }
  }
  search.end = chunks_.size();
}

template <typename Key>
std::vector<size_t> Chooser<Key>::all_chunks() const {
  std::vector<size_t> all(chunks_.size());
  std::iota(all.begin(), all.end(), size_t{0});
  return all;
}

// Repeats the pass where it has to be, and finds the thresholds.
template <typename Key>
void Chooser<Key>::settle() {
  for (const bool guess_again : {true, false}) {
    std::vector<size_t> which;
    for (Search<Key>& search : searches_) {
      KeyRange<Key> known;
      if (search.fate != Fate::kSearch || !missed(search, known)) continue;
      if (guess_again && search.complete) {
        search.range = bracket<Key>(search.sample, known, search.wanted(), search.split.within);
      } else {
        narrow(search, known);
      }
      for (size_t i = search.begin; i < search.end; ++i) which.push_back(i);
    }
    if (!which.empty()) split(which);
  }
  for_each_search([&](Search<Key>& search, const Parallel& parallel) { find_threshold(search, parallel); });
  for (Search<Key>& search : searches_) {
    if (search.ties_differ) share_ties(search);
  }
}

template <typename Key>
void Chooser<Key>::finish(const Done& done) {
  parallel_.for_each(std::ssize(chunks_), [&](int64_t i) {
    const Chunk<Key>& chunk = chunks_[static_cast<size_t>(i)];
    if (searches_[chunk.group].fate == Fate::kSearch) resolve(chunk);
    if (done) done(chunk.part - parts_.data(), chunk.first, chunk.count);
  });
}

// Threads work together on a single search, or each on a search of its own.
template <typename Key>
template <typename Visit>
void Chooser<Key>::for_each_search(const Visit& visit) {
  const Serial serial;
  const bool single = searches_.size() == 1;
  const Parallel& outer = single ? static_cast<const Parallel&>(serial) : parallel_;
  outer.for_each(std::ssize(searches_), [&](int64_t i) {
    Search<Key>& search = searches_[static_cast<size_t>(i)];
    if (search.fate == Fate::kSearch) visit(search, single ? parallel_ : serial);
  });
}

// Keys of the searches that are long enough, unless there are some.
template <typename Key>
void Chooser<Key>::sample() {
  struct Task {
    size_t search;
    int64_t begin, end;  // runs
  };
  std::vector<SampledRuns> runs;
  std::vector<Task> tasks;
  for (size_t s = 0; s < searches_.size(); ++s) {
    const Group& group = searches_[s].group;
    runs.emplace_back(parts_.subspan(static_cast<size_t>(group.begin), static_cast<size_t>(group.end - group.begin)));
    if (searches_[s].fate != Fate::kSearch || group.eligible <= kFew || !searches_[s].sample.empty()) continue;
    for (int64_t begin = 0; begin < runs[s].runs(); begin += kRunsOfTask) {
      tasks.push_back({s, begin, std::min(begin + kRunsOfTask, runs[s].runs())});
    }
  }
  std::vector<std::vector<Key>> samples(tasks.size());
  parallel_.for_each(std::ssize(tasks), [&](int64_t i) {
    const Task& task = tasks[static_cast<size_t>(i)];
    samples[static_cast<size_t>(i)] =
        sample_runs<Key>(runs[task.search].list(task.begin, task.end),
                         [&](const Part& part) -> const KeyKernels<Key>& { return kernels(part); });
  });
  for (size_t i = 0; i < tasks.size(); ++i) {
    std::vector<Key>& sample = searches_[tasks[i].search].sample;
    sample.insert(sample.end(), samples[i].begin(), samples[i].end());
  }
}

// A range that most likely holds the k-th largest, by the sample; without one, all keys.
template <typename Key>
void Chooser<Key>::guess(Search<Key>& search) const {
  search.range = all_keys<Key>(rank_);
  if (search.sample.empty() || search.group.eligible <= kFew) return;
  search.range = bracket<Key>(search.sample, search.range, search.group.k, search.group.eligible);
}

template <typename Key>
void Chooser<Key>::guess() {
  for_each_search([&](Search<Key>& search, const Parallel&) { guess(search); });
}

template <typename Key>
void Chooser<Key>::split(std::span<const size_t> which) {
  Pass pass(*this, which);
  parallel_.for_each(std::ssize(which), [&](int64_t i) { pass.visit(which[static_cast<size_t>(i)]); });
  pass.finish();
}

template <typename Key>
Chooser<Key>::Pass::Pass(Chooser& chooser, std::span<const size_t> which)
    : chooser_(chooser),
      which_(which),
      candidates_(most_keys(chooser, which), std::ssize(which), chooser.scratch_),
      complete_(chooser.searches_.size()) {
  for (auto& flag : complete_) flag = true;
}

template <typename Key>
int64_t Chooser<Key>::Pass::most_keys(const Chooser& chooser, std::span<const size_t> which) {
  int64_t keys = 0;
  for (const size_t i : which) {
    const Search<Key>& search = chooser.searches_[chooser.chunks_[i].group];
    const int64_t eligible = search.group.eligible;
    if (i == search.begin && search.fate == Fate::kSearch) keys += std::min(eligible, most_candidates(eligible));
  }
  return keys;
}

template <typename Key>
void Chooser<Key>::Pass::visit(size_t i) {
  Chunk<Key>& chunk = chooser_.chunks_[i];
  const Search<Key>& search = search_of(chunk);
  if (search.fate != Fate::kSearch) {
    fill(chunk, search.fate == Fate::kAll);
    return;
  }
  ChunkBits within;
  Split counts;
  const Marks<Key> marks = {search.range, chunk.chosen(), within.data()};
  chooser_.kernels(*chunk.part).split[0](chunk.slice(), &marks, &counts);
  take(chunk, counts, within);
}

template <typename Key>
void Chooser<Key>::Pass::visit_both(Pass& one, Pass& other, size_t i) {
  Chunk<Key>& first = one.chooser_.chunks_[i];
  Chunk<Key>& second = other.chooser_.chunks_[i];
  if (one.search_of(first).fate != Fate::kSearch) {
    one.visit(i);
    other.visit(i);
    return;
  }
  ChunkBits within[2];
  Split counts[2];
  const Marks<Key> marks[] = {{one.search_of(first).range, first.chosen(), within[0].data()},
                              {other.search_of(second).range, second.chosen(), within[1].data()}};
  one.chooser_.kernels(*first.part).split[1](first.slice(), marks, counts);
  one.take(first, counts[0], within[0]);
  other.take(second, counts[1], within[1]);
}

template <typename Key>
void Chooser<Key>::Pass::take(Chunk<Key>& chunk, Split counts, const ChunkBits& within) {
  const KeyKernels<Key>& kernels = chooser_.kernels(*chunk.part);
  if (!cpu::take(chunk, counts, within, search_of(chunk).range, kernels, candidates_)) {
    complete_[chunk.group].store(false, std::memory_order_relaxed);
  }
}

template <typename Key>
void Chooser<Key>::Pass::finish() {
  for (const size_t i : which_) {
    const Chunk<Key>& chunk = chooser_.chunks_[i];
    Search<Key>& search = chooser_.searches_[chunk.group];
    if (i == search.begin) search.split = {0, 0};
    search.split.above += chunk.split.above;
    search.split.within += chunk.split.within;
    search.complete = complete_[chunk.group];
  }
}

// Whether the last split does not settle the search. If so, `known` is a range that does hold the k-th largest, and
// search.split tells how many are above and within that.
template <typename Key>
bool Chooser<Key>::missed(Search<Key>& search, KeyRange<Key>& known) {
  const KeyRange<Key> all = all_keys<Key>(rank_);
  const int64_t upper = search.split.above + search.split.within;
  if (search.split.above >= search.group.k) {
    known = {static_cast<Key>(search.range.high + 1), all.high};
    search.split = {0, search.split.above};
  } else if (upper < search.group.k) {
    known = {all.low, static_cast<Key>(search.range.low - 1)};
    search.split = {upper, search.group.eligible - upper};
  } else {
    known = search.range;
    return !search.complete;
  }
  return true;
}

// Cuts `known` down until the elements inside are few enough to be candidates, or all equal.
template <typename Key>
void Chooser<Key>::narrow(Search<Key>& search, KeyRange<Key> known) {
  const std::span<Chunk<Key>> all = chunks(search);
  // A task counts at most 2^32 elements: a sixty-fourth of any memory there is.
  const int64_t tasks = std::min<int64_t>(64, std::ssize(all));
  std::vector<DigitCounts> counts(static_cast<size_t>(tasks));
  while (search.split.within > most_candidates(search.group.eligible) && !known.is_single()) {
    const Digits<Key> digits(known);
    parallel_.for_each(tasks, [&](int64_t task) {
      DigitCounts& count = counts[static_cast<size_t>(task)];
      count.fill(0);
      for (int64_t i = std::ssize(all) * task / tasks; i < std::ssize(all) * (task + 1) / tasks; ++i) {
        const Chunk<Key>& chunk = all[static_cast<size_t>(i)];
        kernels(*chunk.part).count(chunk.slice(), digits, count.data());
      }
    });
    const RankedDigit found = ranked_digit(counts, search.wanted());
    search.split = {search.split.above + found.above, found.equal};
    known = digits.part(found.digit);
  }
  search.range = known;
}

template <typename Key>
void Chooser<Key>::find_threshold(Search<Key>& search, const Parallel& parallel) {
  Ranked<Key> found = {search.range.low, 0, search.split.within};
  if (!search.range.is_single()) {
    std::vector<std::span<const Key>> lists;
    for (const Chunk<Key>& chunk : chunks(search)) lists.push_back(chunk.candidates);
    found = ranked_key<Key>(lists, search.range, search.wanted(), parallel);
  }
  search.threshold = found.key;
  search.ties = search.wanted() - found.above;
  search.ties_differ = search.ties < found.equal;
}

// The first of the elements that equal the threshold stay.
template <typename Key>
void Chooser<Key>::share_ties(Search<Key>& search) {
  const std::span<Chunk<Key>> all = chunks(search);
  parallel_.for_each(std::ssize(all), [&](int64_t i) {
    Chunk<Key>& chunk = all[static_cast<size_t>(i)];
    chunk.ties = search.range.is_single()
                     ? chunk.split.within
                     : std::count(chunk.candidates.begin(), chunk.candidates.end(), search.threshold);
  });
  int64_t left = search.ties;
  for (Chunk<Key>& chunk : all) {
    chunk.ties = std::min(chunk.ties, left);
    left -= chunk.ties;
  }
}

template <typename Key>
void Chooser<Key>::resolve(const Chunk<Key>& chunk) {
  const Search<Key>& search = searches_[chunk.group];
  if (search.range.is_single()) {
    limit_equal(chunk, kernels(*chunk.part), search.range);
  } else {
    choose_candidates(chunk, search.threshold);
  }
}

}  // namespace granet::cpu
