// Of each part the outer choice takes the first few in the order of key and position, so the first keep(count) of those
// are the first keep(count) of all that is eligible. The inner choice is an ordinary one, then, but that its counts are
// known only when the outer one is made. Where it will most likely end is guessed before, so that each chunk is read
// for both while it is in the cache. A part that is too small to guess is read once more.
#include "cpu/select_nested.h"

#include <algorithm>

#include "cpu/mask.h"
#include "cpu/select_chooser.h"

namespace granet::cpu {
namespace {

using Keep = std::function<int64_t(int64_t)>;

std::vector<Part> with_chosen(std::span<const Part> parts, std::span<uint8_t* const> chosen) {
  std::vector<Part> result(parts.begin(), parts.end());
  for (size_t i = 0; i < result.size(); ++i) result[i].chosen = chosen[i];
  return result;
}

// A group of its own for each part.
std::vector<Group> inner_groups(std::span<const int64_t> eligible, const Keep& keep) {
  std::vector<Group> groups;
  for (const int64_t count : eligible) {
    const int64_t i = std::ssize(groups);
    groups.push_back({i, i + 1, count, keep(count)});
  }
  return groups;
}

template <typename Key>
class Nested {
 public:
  Nested(std::span<const Part> parts, std::span<const int64_t> eligible, std::span<const Group> groups,
         std::span<uint8_t* const> inner, const Keep& keep, Rank rank, Scratch& scratch, const Parallel& parallel)
      : parts_(parts),
        keep_(keep),
        all_(all_keys<Key>(rank)),
        parallel_(parallel),
        inner_parts_(with_chosen(parts, inner)),
        outer_(parts, groups, rank, scratch, parallel),
        inner_(inner_parts_, inner_groups(eligible, keep), rank, scratch, parallel),
        is_ahead_(parts.size(), 0) {}

  std::vector<int64_t> run() {
    outer_.sample();
    outer_.guess();
    sample_inner();
    guess_ahead();
    pass();
    outer_.settle();
    outer_.finish(nullptr);
    const std::vector<int64_t> counts = set_counts();
    inner_.split(chunks_ahead(false));
    inner_.settle();
    inner_.finish(nullptr);
    return counts;
  }

 private:
  // A part that is a group of its own may have been sampled.
  void sample_inner() {
    const std::span<Search<Key>> outer = outer_.searches(), inner = inner_.searches();
    for (size_t i = 0; outer.size() == inner.size() && i < inner.size(); ++i) inner[i].sample = outer[i].sample;
    inner_.sample();
  }

  // The keys among which the outer choice most likely ends in a chunk.
  KeyRange<Key> end_in(size_t chunk) {
    const Search<Key>& outer = outer_.searches()[outer_.chunks()[chunk].group];
    if (outer.fate == Fate::kAll) return {all_.low, all_.low};
    if (outer.fate == Fate::kNone) return {all_.high, all_.high};
    return outer.range;
  }

  // Around where the inner choice ends if the outer one does at `end`, to judge by the sample; empty if it cannot.
  KeyRange<Key> range_if(const Search<Key>& search, Key end) const {
    const auto inside = std::count_if(search.sample.begin(), search.sample.end(), [=](Key key) { return key >= end; });
    const auto share = static_cast<double>(inside) / static_cast<double>(std::ssize(search.sample));
    const auto count = static_cast<int64_t>(share * static_cast<double>(search.group.eligible));
    if (count == 0) return {all_.high, all_.low};
    return bracket<Key>(search.sample, {end, all_.high}, keep_(count), count);
  }

  void guess_ahead() {
    const std::span<Search<Key>> searches = inner_.searches();
    parallel_.for_each(std::ssize(searches), [&](int64_t i) {
      Search<Key>& search = searches[static_cast<size_t>(i)];
      if (search.sample.empty()) return;
      const KeyRange<Key> end = end_in(search.begin);
      const KeyRange<Key> lower = range_if(search, end.low), upper = range_if(search, end.high);
      search.range = {std::min(lower.low, upper.low), std::max(lower.high, upper.high)};
      is_ahead_[static_cast<size_t>(i)] = search.range.low <= search.range.high;
    });
  }

  // Chunks of the parts whose inner choice is ahead, or of the others.
  std::vector<size_t> chunks_ahead(bool ahead) const {
    std::vector<size_t> which;
    for (size_t i = 0; i < inner_.chunks().size(); ++i) {
      if (is_ahead(i) == ahead) which.push_back(i);
    }
    return which;
  }

  // The chunks of both choices have the same numbers.
  void pass() {
    const std::vector<size_t> all = outer_.all_chunks(), ahead = chunks_ahead(true);
    typename Chooser<Key>::Pass outer(outer_, all), inner(inner_, ahead);
    parallel_.for_each(std::ssize(all), [&](int64_t i) {
      const auto chunk = static_cast<size_t>(i);
      if (is_ahead(chunk)) {
        Chooser<Key>::Pass::visit_both(outer, inner, chunk);
      } else {
        outer.visit(chunk);
      }
    });
    outer.finish();
    inner.finish();
  }

  // How many the outer choice has chosen of each part, by which the inner one has its own.
  std::vector<int64_t> set_counts() {
    const std::span<Search<Key>> searches = inner_.searches();
    std::vector<int64_t> counts(searches.size());
    parallel_.for_each(std::ssize(searches), [&](int64_t i) {
      const auto p = static_cast<size_t>(i);
      Search<Key>& search = searches[p];
      counts[p] = count_active(parts_[p].chosen, packed_bytes(parts_[p].numel));
      search.group.k = keep_(counts[p]);
      if (search.group.k == counts[p]) {  // all of what the outer choice has chosen
        inner_parts_[p].bits = parts_[p].chosen;
        inner_parts_[p].inverted = false;
        search.group.eligible = counts[p];
      }
      search.fate = fate_of(search.group);
      if (search.fate != Fate::kSearch) {
        is_ahead_[p] = 0;
      } else if (is_ahead_[p] == 0) {
        inner_.guess(search);
      }
    });
    return counts;
  }

  bool is_ahead(size_t chunk) const { return is_ahead_[inner_.chunks()[chunk].group] != 0; }

  std::span<const Part> parts_;
  const Keep& keep_;
  KeyRange<Key> all_;
  const Parallel& parallel_;
  std::vector<Part> inner_parts_;
  Chooser<Key> outer_, inner_;
  std::vector<uint8_t> is_ahead_;  // by part: has a range, and then a split by it
};

}  // namespace

std::vector<int64_t> choose_nested(std::span<const Part> parts, std::span<const int64_t> eligible,
                                   std::span<const Group> groups, std::span<uint8_t* const> inner,
                                   const std::function<int64_t(int64_t count)>& keep, Rank rank, Scratch& scratch,
                                   const Parallel& parallel) {
  if (needs_wide_keys(parts)) {
    return Nested<int64_t>(parts, eligible, groups, inner, keep, rank, scratch, parallel).run();
  }
  return Nested<int32_t>(parts, eligible, groups, inner, keep, rank, scratch, parallel).run();
}

}  // namespace granet::cpu
