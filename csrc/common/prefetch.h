// __builtin_prefetch's words, which it takes as constants.
#pragma once

namespace granet {

constexpr int kToRead = 0;
constexpr int kToWrite = 1;

constexpr int kFirstLevel = 3;
constexpr int kSecondLevel = 2;  // has more lines under way, and does not set off the first level's prefetchers

}  // namespace granet
