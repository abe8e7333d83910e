// A hint must leave memory as it was, whatever its size and alignment.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "cpu/large_pages.h"

int main() {
  constexpr size_t kMebi = size_t{1} << 20;
  std::vector<uint8_t> memory(7 * kMebi);
  for (size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<uint8_t>(i * 7);
  granet::cpu::prefer_large_pages(nullptr, 0);
  for (size_t offset : {size_t{0}, size_t{1}, size_t{4095}, kMebi + 3}) {
    for (size_t bytes : {size_t{0}, size_t{1}, size_t{4096}, 2 * kMebi - 1, 5 * kMebi}) {
      granet::cpu::prefer_large_pages(memory.data() + offset, bytes);
    }
  }
  for (size_t i = 0; i < memory.size(); ++i) {
    if (memory[i] == static_cast<uint8_t>(i * 7)) continue;
    std::printf("FAILED: byte %zu has changed\n", i);
    return 1;
  }
  std::printf("large_pages: all passed\n");
  return 0;
}
