// A guess at where the k-th largest key lies, from a sample. It costs nothing if it is wrong but time: the caller
// counts.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <span>
#include <vector>

#include "common/bits.h"
#include "common/radix.h"
#include "cpu/select_choose.h"
#include "cpu/select_rank.h"
#include "cpu/select_table.h"

namespace granet::cpu {

// A run is the eight elements of one byte of a mask. Reading runs takes time in proportion to their number, what lies
// between the bounds takes time in proportion to the number of elements and to the inverse of its root: together least
// where runs grow as elements to the power of 2/3. On a Zen 4 8192 runs, 64 Ki elements, were best for 25 million:
// twice as many took as much longer to read as they saved.
constexpr double kRunsPerByte = 0.38;  // of a mask, to the power of 2/3
constexpr int64_t kBytesOfRun = 16;    // at most every 16th is read
constexpr int64_t kRunsOfTask = 1024;

inline int64_t runs_of(int64_t bytes) {
  const double root = std::cbrt(static_cast<double>(bytes));
  return std::min(static_cast<int64_t>(kRunsPerByte * root * root), bytes / kBytesOfRun);
}

constexpr double kDeviations =
    3;  // runs are not independent draws, and a wrong guess costs a pass over what it was about

// Multiples of the golden ratio, modulo 1, in 32 bits: they fall evenly, and together with no stride of a tensor.
inline uint64_t jitter(int64_t run) { return static_cast<uint64_t>(run) * 0x9e37'79b9'7f4a'7c15 >> 32; }

// The mask bytes of the parts of one group, counted through.
class SampledRuns {
 public:
  explicit SampledRuns(std::span<const Part> parts) : parts_(parts) {
    ends_.reserve(parts.size());
    for (const Part& part : parts) ends_.push_back(bytes_ += mask_bytes(part.numel));
    runs_ = runs_of(bytes_);
    if (runs_ > 0) step_ = (static_cast<uint64_t>(bytes_) << kFraction) / static_cast<uint64_t>(runs_);
  }

  int64_t runs() const { return runs_; }

  struct Run {
    const Part* part;
    int64_t byte;
  };

  // SampledRuns [begin, end): one byte at random out of each of equal stretches.
  std::vector<Run> list(int64_t begin, int64_t end) const {
    std::vector<Run> result;
    result.reserve(static_cast<size_t>(end - begin));
    size_t part = 0;
    for (int64_t run = begin; run < end; ++run) {
      const int64_t first = start(run);
      const auto width = static_cast<uint64_t>(start(run + 1) - first);
      const int64_t byte = first + static_cast<int64_t>(jitter(run) * width >> 32);
      while (byte >= ends_[part]) ++part;
      result.push_back({&parts_[part], byte - (ends_[part] - mask_bytes(parts_[part].numel))});
    }
    return result;
  }

 private:
  static constexpr int kFraction = 16;  // bits behind the point: with more, a product could pass 64 bits

  // Fixed-point numbers, because divisions would take as long as reading the runs.
  int64_t start(int64_t run) const { return static_cast<int64_t>(static_cast<uint64_t>(run) * step_ >> kFraction); }

  std::span<const Part> parts_;
  std::vector<int64_t> ends_;
  int64_t bytes_ = 0;
  int64_t runs_ = 0;
  uint64_t step_ = 0;  // bytes from run to run
};

constexpr size_t item_size(FloatType type) {
  return type == FloatType::kFloat64 ? 8 : type == FloatType::kFloat32 ? 4 : 2;
}

// The eligible keys of the runs; the odd elements behind the last eight of a tensor are left out.
// kernels_of(part): the kernels for its format.
template <typename Key, typename KernelsOf>
std::vector<Key> sample_runs(std::span<const SampledRuns::Run> runs, const KernelsOf& kernels_of) {
  constexpr size_t kAhead = 16;                                // each run is a cache line of its own
  std::vector<Key> sample(runs.size() * kWeightsPerByte + 1);  // one is written ahead
  Key* next = sample.data();
  for (size_t i = 0; i < runs.size(); ++i) {
    if (i + kAhead < runs.size()) {
      const auto& [part, byte] = runs[i + kAhead];
      const size_t offset = static_cast<size_t>(byte * kWeightsPerByte) * item_size(part->type);
      __builtin_prefetch(static_cast<const char*>(part->values) + offset);
    }
    const auto& [part, byte] = runs[i];
    unsigned eligible = part->bits == nullptr ? 0 : part->bits[byte];
    if (part->inverted) eligible = ~eligible;
    eligible &= kAllActive;
    if (eligible == 0 || (byte + 1) * kWeightsPerByte > part->numel) continue;
    Key keys[kWeightsPerByte];
    kernels_of(*part).keys(part->values, byte * kWeightsPerByte, keys);
    for (const Key key : keys) {
      *next = key;
      next += eligible & 1;
      eligible >>= 1;
    }
  }
  sample.resize(static_cast<size_t>(next - sample.data()));
  return sample;
}

// Order statistics of keys, from 1 at the largest, to within a digit of their range.
template <typename Key>
class RankedSample {
 public:
  // Of `keys`, at least one and less than 2^32.
  explicit RankedSample(std::span<const Key> keys) : keys_(keys), digits_(range_of(keys)) {
    for (const Key key : keys) ++counts_[static_cast<size_t>(digits_.digit(key))];
  }

  int64_t size() const { return std::ssize(keys_); }

  // The keys that share the digit of the `rank`-th, all of one number if they are more than `most`: equal to it then.
  struct Place {
    KeyRange<Key> range;
    int64_t count;
  };
  Place at(double rank, int64_t most) const {
    const int64_t wanted = std::clamp<int64_t>(static_cast<int64_t>(rank), 1, size());
    const RankedDigit found = ranked_digit({&counts_, 1}, wanted);
    const KeyRange<Key> part = digits_.part(found.digit);
    if (found.equal <= most || part.is_single()) return {part, found.equal};
    std::vector<Key> inside;
    std::copy_if(keys_.begin(), keys_.end(), std::back_inserter(inside),
                 [=](Key key) { return part.low <= key && key <= part.high; });
    const std::vector<std::span<const Key>> lists = {inside};
    const Ranked<Key> exact = ranked_key<Key>(lists, part, wanted - found.above, Serial());
    return {{exact.key, exact.key}, exact.equal};
  }

 private:
  static KeyRange<Key> range_of(std::span<const Key> keys) {
    KeyRange<Key> range = {keys[0], keys[0]};
    for (const Key key : keys) range = {std::min(range.low, key), std::max(range.high, key)};
    return range;
  }

  std::span<const Key> keys_;
  Digits<Key> digits_;
  DigitCounts counts_ = {};
};

// Keys between which, in all likelihood, the k-th largest is of `eligible` ones that are all inside `range`, to judge
// by those of the sample that are.
template <typename Key>
KeyRange<Key> bracket(std::span<const Key> sample, KeyRange<Key> range, int64_t k, int64_t eligible) {
  std::vector<Key> inside;
  inside.reserve(sample.size());
  std::copy_if(sample.begin(), sample.end(), std::back_inserter(inside),
               [=](Key key) { return range.low <= key && key <= range.high; });
  if (inside.empty()) return range;
  const RankedSample<Key> ranked(inside);
  const double share = static_cast<double>(k) / static_cast<double>(eligible);
  const auto size = static_cast<double>(ranked.size());
  const double margin = kDeviations * std::sqrt(size * share * (1 - share)) + kDeviations;

  // A number that many elements share would, as a bound, make all of them candidates. If it is the likely answer, the
  // range is that number alone; otherwise it is left out.
  const int64_t many = ranked.size() / 16;
  const auto middle = ranked.at(share * size, many);
  if (middle.count > many) return middle.range;
  KeyRange<Key> result = range;
  const auto most = std::min(many, static_cast<int64_t>(margin) / 4);  // more would widen the range by as much
  if (share * size - margin >= 1) {
    const auto high = ranked.at(share * size - margin, most);
    result.high = high.count > many ? high.range.high - 1 : high.range.high;
  }
  if (share * size + margin <= size) {
    const auto low = ranked.at(share * size + margin, most);
    result.low = low.count > many ? low.range.low + 1 : low.range.low;
  }
  return result;
}

}  // namespace granet::cpu
