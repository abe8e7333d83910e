#include "cpu/select_choose.h"

#include <algorithm>

#include "cpu/select_chooser.h"

namespace granet::cpu {
namespace {

template <typename Key>
void choose_by(std::span<const Part> parts, std::span<const Group> groups, Rank rank, const Done& done,
               Scratch& scratch, const Parallel& parallel) {
  Chooser<Key> chooser(parts, groups, rank, scratch, parallel);
  chooser.sample();
  chooser.guess();
  chooser.split(chooser.all_chunks());
  chooser.settle();
  chooser.finish(done);
}

}  // namespace

bool needs_wide_keys(std::span<const Part> parts) {
  return std::any_of(parts.begin(), parts.end(), [](const Part& p) { return p.type == FloatType::kFloat64; });
}

void choose(std::span<const Part> parts, std::span<const Group> groups, Rank rank, const Done& done, Scratch& scratch,
            const Parallel& parallel) {
  if (needs_wide_keys(parts)) {
    choose_by<int64_t>(parts, groups, rank, done, scratch, parallel);
  } else {
    choose_by<int32_t>(parts, groups, rank, done, scratch, parallel);
  }
}

}  // namespace granet::cpu
