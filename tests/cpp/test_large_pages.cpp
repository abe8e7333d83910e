// Hints must leave memory as it was, whatever its size and alignment, and take no page that holds nothing of it.
#include "cpu/large_pages.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

using granet::cpu::kLargePage;
using granet::cpu::MemoryRange;

namespace {

void check(bool holds, const char* what) {
  if (holds) return;
  std::printf("FAILED: %s\n", what);
  std::exit(1);
}

std::vector<MemoryRange> in_pages(std::vector<MemoryRange> ranges) {  // of large pages' sizes
  for (MemoryRange& range : ranges) range = {range.begin * kLargePage, range.end * kLargePage};
  return ranges;
}

void test_pages() {
  using granet::cpu::large_pages_of;
  const uintptr_t page = kLargePage;
  check(large_pages_of({}).empty(), "nothing has pages");
  check(large_pages_of({{page, 2 * page - 1}, {page + 1, 2 * page}}) == in_pages({{1, 2}}), "two that overlap");
  check(large_pages_of({{page, 2 * page - 1}}).empty(), "a page that ends one byte later");
  check(large_pages_of({{page + 1, 2 * page}}).empty(), "a page that begins one byte earlier");
  check(large_pages_of({{page, 2 * page}}) == in_pages({{1, 2}}), "one page");
  check(large_pages_of({{page - 1, 3 * page + 1}}) == in_pages({{1, 3}}), "rounded inwards");
  check(large_pages_of({{5 * page, 7 * page}, {page, 2 * page}}) == in_pages({{1, 2}, {5, 7}}), "in order");
  check(large_pages_of({{page, page + 100}, {page + 116, 2 * page}}) == in_pages({{1, 2}}), "a header between");
  check(large_pages_of({{page, page + 100}, {page + 100 + 4096, 2 * page}}).empty(), "a small page between");
  check(large_pages_of({{page, 4 * page}, {2 * page, 3 * page}}) == in_pages({{1, 4}}), "one within another");
}

void test_contents() {
  constexpr size_t kMebi = size_t{1} << 20;
  std::vector<uint8_t> memory(7 * kMebi);
  for (size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<uint8_t>(i * 7);
  granet::cpu::prefer_large_pages(nullptr, 0);
  granet::cpu::gather_in_large_pages({{0, 0}, {kLargePage, 9 * kLargePage}});  // nobody's memory is nobody's concern
  for (size_t offset : {size_t{0}, size_t{1}, size_t{4095}, kMebi + 3}) {
    for (size_t bytes : {size_t{0}, size_t{1}, size_t{4096}, 2 * kMebi - 1, 5 * kMebi}) {
      uint8_t* data = memory.data() + offset;
      granet::cpu::prefer_large_pages(data, bytes);
      const auto begin = reinterpret_cast<uintptr_t>(data);
      granet::cpu::gather_in_large_pages({{begin, begin + bytes / 3}, {begin + bytes / 2, begin + bytes}});
      granet::cpu::gather_in_large_pages({{begin, begin + bytes}});
    }
  }
  for (size_t i = 0; i < memory.size(); ++i) check(memory[i] == static_cast<uint8_t>(i * 7), "a byte has changed");
}

}  // namespace

int main() {
  test_pages();
  test_contents();
  std::printf("large_pages: all passed\n");
  return 0;
}
