#include "cpu/large_pages.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace granet::cpu {
namespace {

MemoryRange whole_pages_of(const MemoryRange& range) {
  return {(range.begin + kLargePage - 1) / kLargePage * kLargePage, range.end / kLargePage * kLargePage};
}

bool is_empty(const MemoryRange& range) { return range.begin >= range.end; }

#ifdef __linux__
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // of Linux 6.1; older headers have no name for it, older systems refuse
#endif

// The system moves memory on request whatever its setting is; who has switched large pages off does not want them.
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
  const MemoryRange pages = whole_pages_of({start, start + bytes});
  if (!is_empty(pages)) madvise(reinterpret_cast<void*>(pages.begin), pages.end - pages.begin, MADV_HUGEPAGE);
#endif
}

std::vector<MemoryRange> large_pages_of(std::vector<MemoryRange> ranges) {
  constexpr uintptr_t kSmallPage = 4096;
  std::erase_if(ranges, is_empty);
  std::sort(ranges.begin(), ranges.end(), [](const auto& a, const auto& b) { return a.begin < b.begin; });
  std::vector<MemoryRange> joined;
  for (const MemoryRange& range : ranges) {
    if (!joined.empty() && range.begin < joined.back().end + kSmallPage) {
      joined.back().end = std::max(joined.back().end, range.end);
    } else {
      joined.push_back(range);
    }
  }
  std::transform(joined.begin(), joined.end(), joined.begin(), whole_pages_of);
  std::erase_if(joined, is_empty);
  return joined;
}

void gather_in_large_pages([[maybe_unused]] std::vector<MemoryRange> ranges) {
#ifdef __linux__
  static const bool wanted = are_wanted();
  if (!wanted) return;
  for (const auto& [begin, end] : large_pages_of(std::move(ranges))) {
    // One by one, for a page that cannot be moved may end the call.
    for (uintptr_t page = begin; page < end; page += kLargePage) {
      if (madvise(reinterpret_cast<void*>(page), kLargePage, MADV_COLLAPSE) != 0 && errno == ENOMEM) return;
    }
  }
#endif
}

}  // namespace granet::cpu
