// Usually one pass over the values: a sample gives two keys that most likely enclose the k-th largest; the pass counts
// and marks what is above the upper one and what is between, the candidates; the keys of the candidates, one or two in
// a hundred, decide. If the counts prove the guess wrong, or the candidates are too many, histograms over all eligible
// keys find a narrower range that certainly holds the k-th largest, and the pass is repeated with that.
#include "cpu/select_choose.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "common/isa.h"
#include "cpu/select_chunk.h"
#include "cpu/select_rank.h"
#include "cpu/select_sample.h"
#include "cpu/select_table.h"

namespace granet::cpu {
namespace {

// Below so many eligible elements all of them are candidates: a sample would not pay.
constexpr int64_t kFew = 16'384;
constexpr int64_t kCandidateShare = 8;  // at most an eighth of the eligible, for the sake of memory

int64_t most_candidates(int64_t eligible) { return std::max(kFew, eligible / kCandidateShare); }

template <typename Key>
class Chooser {
 public:
  Chooser(std::span<const Part> parts, std::span<const Group> groups, Rank rank, Scratch& scratch,
          const Parallel& parallel);
  void run(const Done& done);

 private:
  enum class Fate : uint8_t { kAll, kNone, kSearch };

  struct State {
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

  void add_chunks(State& state, size_t index);
  template <typename Visit>
  void for_each_search(const Visit& visit);
  void guess();
  void split(const std::vector<size_t>& which);
  bool missed(State& state, KeyRange<Key>& known);
  void narrow(State& state, KeyRange<Key> known);
  void find_threshold(State& state, const Parallel& parallel);
  void share_ties(State& state);
  void resolve(const Chunk<Key>& chunk);

  const KeyKernels<Key>& kernels(const Part& part) const { return key_kernels<Key>(table_, rank_, part.type); }
  std::span<Chunk<Key>> chunks(const State& state) {
    return std::span(chunks_).subspan(state.begin, state.end - state.begin);
  }

  std::span<const Part> parts_;
  Rank rank_;
  Scratch& scratch_;
  const Parallel& parallel_;
  const SelectTable& table_;
  std::vector<State> states_;
  std::vector<Chunk<Key>> chunks_;
};

template <typename Key>
Chooser<Key>::Chooser(std::span<const Part> parts, std::span<const Group> groups, Rank rank, Scratch& scratch,
                      const Parallel& parallel)
    : parts_(parts),
      rank_(rank),
      scratch_(scratch),
      parallel_(parallel),
      table_(*for_isa(&select_portable, &select_avx2, &select_avx512)) {
  for (const Group& group : groups) {
    const Fate fate = group.k <= 0 ? Fate::kNone : group.k >= group.eligible ? Fate::kAll : Fate::kSearch;
    states_.push_back({.group = group, .fate = fate, .range = all_keys<Key>(rank)});
    add_chunks(states_.back(), states_.size() - 1);
  }
}

template <typename Key>
void Chooser<Key>::add_chunks(State& state, size_t index) {
  state.begin = chunks_.size();
  for (int64_t p = state.group.begin; p < state.group.end; ++p) {
    const Part& part = parts_[static_cast<size_t>(p)];
    for (int64_t first = 0; first < part.numel; first += kChunk) {
      chunks_.push_back({.part = &part, .group = index, .first = first, .count = std::min(kChunk, part.numel - first)});
    }
  }
  state.end = chunks_.size();
}

template <typename Key>
void Chooser<Key>::run(const Done& done) {
  guess();
  std::vector<size_t> which(chunks_.size());
  for (size_t i = 0; i < which.size(); ++i) which[i] = i;
  split(which);

  for (const bool guess_again : {true, false}) {
    which.clear();
    for (State& state : states_) {
      KeyRange<Key> known;
      if (state.fate != Fate::kSearch || !missed(state, known)) continue;
      if (guess_again && state.complete) {
        state.range = bracket<Key>(state.sample, known, state.wanted(), state.split.within, parallel_);
      } else {
        narrow(state, known);
      }
      for (size_t i = state.begin; i < state.end; ++i) which.push_back(i);
    }
    if (!which.empty()) split(which);
  }

  for_each_search([&](State& state, const Parallel& parallel) { find_threshold(state, parallel); });
  for (State& state : states_) {
    if (state.ties_differ) share_ties(state);
  }
  parallel_.for_each(std::ssize(chunks_), [&](int64_t i) {
    const Chunk<Key>& chunk = chunks_[static_cast<size_t>(i)];
    if (states_[chunk.group].fate == Fate::kSearch) resolve(chunk);
    if (done) done(chunk.part - parts_.data(), chunk.first, chunk.count);
  });
}

// Threads work together on a single search, or each on a search of its own.
template <typename Key>
template <typename Visit>
void Chooser<Key>::for_each_search(const Visit& visit) {
  const Serial serial;
  const bool single = states_.size() == 1;
  const Parallel& outer = single ? static_cast<const Parallel&>(serial) : parallel_;
  outer.for_each(std::ssize(states_), [&](int64_t i) {
    State& state = states_[static_cast<size_t>(i)];
    if (state.fate == Fate::kSearch) visit(state, single ? parallel_ : serial);
  });
}

template <typename Key>
void Chooser<Key>::guess() {
  struct Task {
    size_t state;
    int64_t begin, end;  // runs
  };
  std::vector<SampledRuns> runs;
  std::vector<Task> tasks;
  for (size_t s = 0; s < states_.size(); ++s) {
    const Group& group = states_[s].group;
    runs.emplace_back(parts_.subspan(static_cast<size_t>(group.begin), static_cast<size_t>(group.end - group.begin)));
    if (states_[s].fate != Fate::kSearch || group.eligible <= kFew) continue;
    for (int64_t begin = 0; begin < runs[s].runs(); begin += kRunsOfTask) {
      tasks.push_back({s, begin, std::min(begin + kRunsOfTask, runs[s].runs())});
    }
  }
  if (tasks.empty()) return;
  std::vector<std::vector<Key>> samples(tasks.size());
  parallel_.for_each(std::ssize(tasks), [&](int64_t i) {
    const Task& task = tasks[static_cast<size_t>(i)];
    samples[static_cast<size_t>(i)] =
        sample_runs<Key>(runs[task.state].list(task.begin, task.end),
                         [&](const Part& part) -> const KeyKernels<Key>& { return kernels(part); });
  });
  for (size_t i = 0; i < tasks.size(); ++i) {
    std::vector<Key>& sample = states_[tasks[i].state].sample;
    sample.insert(sample.end(), samples[i].begin(), samples[i].end());
  }
  for_each_search([&](State& state, const Parallel& parallel) {
    state.range = bracket<Key>(state.sample, state.range, state.group.k, state.group.eligible, parallel);
  });
}

template <typename Key>
void Chooser<Key>::split(const std::vector<size_t>& which) {
  int64_t keys = 0;
  for (size_t i = 0; i < which.size(); ++i) {
    const size_t group = chunks_[which[i]].group;
    if (i == 0 || chunks_[which[i - 1]].group != group) {
      const State& state = states_[group];
      if (state.fate == Fate::kSearch) keys += std::min(state.group.eligible, most_candidates(state.group.eligible));
    }
  }
  Candidates<Key> candidates(keys, std::ssize(which), scratch_);
  std::vector<std::atomic<bool>> complete(states_.size());
  for (auto& flag : complete) flag = true;
  parallel_.for_each(std::ssize(which), [&](int64_t i) {
    Chunk<Key>& chunk = chunks_[which[static_cast<size_t>(i)]];
    const State& state = states_[chunk.group];
    if (state.fate != Fate::kSearch) {
      fill(chunk, state.fate == Fate::kAll);
    } else if (!cpu::split(chunk, kernels(*chunk.part), state.range, candidates)) {
      complete[chunk.group].store(false, std::memory_order_relaxed);
    }
  });
  for (const size_t i : which) {
    State& state = states_[chunks_[i].group];
    if (i == state.begin) state.split = {0, 0};
    state.split.above += chunks_[i].split.above;
    state.split.within += chunks_[i].split.within;
    state.complete = complete[chunks_[i].group];
  }
}

// Whether the last split does not settle the search. If so, `known` is a range that does hold the k-th largest, and
// state.split tells how many are above and within that.
template <typename Key>
bool Chooser<Key>::missed(State& state, KeyRange<Key>& known) {
  const KeyRange<Key> all = all_keys<Key>(rank_);
  const int64_t upper = state.split.above + state.split.within;
  if (state.split.above >= state.group.k) {
    known = {static_cast<Key>(state.range.high + 1), all.high};
    state.split = {0, state.split.above};
  } else if (upper < state.group.k) {
    known = {all.low, static_cast<Key>(state.range.low - 1)};
    state.split = {upper, state.group.eligible - upper};
  } else {
    known = state.range;
    return !state.complete;
  }
  return true;
}

// Cuts `known` down until the elements inside are few enough to be candidates, or all equal.
template <typename Key>
void Chooser<Key>::narrow(State& state, KeyRange<Key> known) {
  const std::span<Chunk<Key>> all = chunks(state);
  // A task counts at most 2^32 elements: a sixty-fourth of any memory there is.
  const int64_t tasks = std::min<int64_t>(64, std::ssize(all));
  std::vector<DigitCounts> counts(static_cast<size_t>(tasks));
  while (state.split.within > most_candidates(state.group.eligible) && !known.is_single()) {
    const Digits<Key> digits(known);
    parallel_.for_each(tasks, [&](int64_t task) {
      DigitCounts& count = counts[static_cast<size_t>(task)];
      count.fill(0);
      for (int64_t i = std::ssize(all) * task / tasks; i < std::ssize(all) * (task + 1) / tasks; ++i) {
        const Chunk<Key>& chunk = all[static_cast<size_t>(i)];
        kernels(*chunk.part).count(chunk.slice(), digits, count.data());
      }
    });
    const RankedDigit found = ranked_digit(counts, state.wanted());
    state.split = {state.split.above + found.above, found.equal};
    known = digits.part(found.digit);
  }
  state.range = known;
}

template <typename Key>
void Chooser<Key>::find_threshold(State& state, const Parallel& parallel) {
  Ranked<Key> found = {state.range.low, 0, state.split.within};
  if (!state.range.is_single()) {
    std::vector<std::span<const Key>> lists;
    for (const Chunk<Key>& chunk : chunks(state)) lists.push_back(chunk.candidates);
    found = ranked_key<Key>(lists, state.range, state.wanted(), parallel);
  }
  state.threshold = found.key;
  state.ties = state.wanted() - found.above;
  state.ties_differ = state.ties < found.equal;
}

// The first of the elements that equal the threshold stay.
template <typename Key>
void Chooser<Key>::share_ties(State& state) {
  const std::span<Chunk<Key>> all = chunks(state);
  parallel_.for_each(std::ssize(all), [&](int64_t i) {
    Chunk<Key>& chunk = all[static_cast<size_t>(i)];
    chunk.ties = state.range.is_single()
                     ? chunk.split.within
                     : std::count(chunk.candidates.begin(), chunk.candidates.end(), state.threshold);
  });
  int64_t left = state.ties;
  for (Chunk<Key>& chunk : all) {
    chunk.ties = std::min(chunk.ties, left);
    left -= chunk.ties;
  }
}

template <typename Key>
void Chooser<Key>::resolve(const Chunk<Key>& chunk) {
  const State& state = states_[chunk.group];
  if (state.range.is_single()) {
    limit_equal(chunk, kernels(*chunk.part), state.range);
  } else {
    choose_candidates(chunk, state.threshold);
  }
}

}  // namespace

void choose(std::span<const Part> parts, std::span<const Group> groups, Rank rank, const Done& done, Scratch& scratch,
            const Parallel& parallel) {
  const bool wide =
      std::any_of(parts.begin(), parts.end(), [](const Part& p) { return p.type == FloatType::kFloat64; });
  if (wide) {
    Chooser<int64_t>(parts, groups, rank, scratch, parallel).run(done);
  } else {
    Chooser<int32_t>(parts, groups, rank, scratch, parallel).run(done);
  }
}

}  // namespace granet::cpu
