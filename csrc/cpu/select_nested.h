// Two choices, the second among what the first has chosen, in one pass over the values.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "cpu/select_choose.h"

namespace granet::cpu {

// choose(parts, groups), and then in each part, of the `count` elements that this has chosen, the keep(count) largest:
// inner[i] is a packed mask for those of parts[i], written whole. eligible[i]: how many of parts[i] are. keep(count) is
// at most `count`, and is called on any thread. Returns
// the count of each part. Takes of `scratch` and gives nothing back.
std::vector<int64_t> choose_nested(std::span<const Part> parts, std::span<const int64_t> eligible,
                                   std::span<const Group> groups, std::span<uint8_t* const> inner,
                                   const std::function<int64_t(int64_t count)>& keep, Rank rank, Scratch& scratch,
                                   const Parallel& parallel);

}  // namespace granet::cpu
