#include "cpu/large_pages.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace granet::cpu {
namespace {

MemoryRange within(const MemoryRange& range) {
  return {(range.first + kLargePage - 1) / kLargePage * kLargePage, range.last / kLargePage * kLargePage};
}

#ifdef __linux__
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // of Linux 6.1; older headers have no name for it, older systems refuse
#endif

// Asking for large pages by name is not meant to overrule who has switched them off, but did so in some systems.
bool has_large_pages() {
  std::FILE* file = std::fopen("/sys/kernel/mm/transparent_hugepage/enabled", "r");
  if (file == nullptr) return false;
  char text[64] = {};
  const size_t size = std::fread(text, 1, sizeof text - 1, file);
  std::fclose(file);
  return size > 0 && std::strstr(text, "[never]") == nullptr;
}

bool are_wanted() {
  const char* setting = std::getenv("GRANET_LARGE_PAGES");
  return (setting == nullptr || std::strcmp(setting, "0") != 0) && has_large_pages();
}
#endif

}  // namespace

void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto start = reinterpret_cast<uintptr_t>(data);
  const auto [first, last] = within({start, start + bytes});
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

std::vector<MemoryRange> large_pages_of(std::vector<MemoryRange> ranges) {
  constexpr uintptr_t kSmallPage = 4096;
  std::erase_if(ranges, [](const MemoryRange& range) { return range.first >= range.last; });
  std::ranges::sort(ranges, {}, &MemoryRange::first);
  std::vector<MemoryRange> joined;
  for (const MemoryRange& range : ranges) {
    if (!joined.empty() && range.first < joined.back().last + kSmallPage) {
      joined.back().last = std::max(joined.back().last, range.last);
    } else {
      joined.push_back(range);
    }
  }
  std::ranges::transform(joined, joined.begin(), within);
  std::erase_if(joined, [](const MemoryRange& range) { return range.first >= range.last; });
  return joined;
}

void gather_in_large_pages([[maybe_unused]] std::vector<MemoryRange> ranges) {
#ifdef __linux__
  static const bool wanted = are_wanted();
  if (!wanted) return;
  for (const auto& [first, last] : large_pages_of(std::move(ranges))) {
    madvise(reinterpret_cast<void*>(first), last - first, MADV_COLLAPSE);
  }
#endif
}

}  // namespace granet::cpu
