// Large pages, of 2 MiB instead of 4 KiB, for memory that is filled or walked through.
//
// Both are hints, which change no byte, and which only Linux takes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace granet::cpu {

constexpr uintptr_t kLargePage = uintptr_t{2} << 20;

// Asks the system to back [data, data + bytes) with large pages where it has none yet. Large tensors are given back to
// the system when they are freed, and come from it anew in the next step: filling 103 MB took 50 ms in pages of 4 KiB,
// 14 ms in pages of 2 MiB, and 4 ms where it had been written before.
void prefer_large_pages(void* data, size_t bytes);

struct MemoryRange {
  uintptr_t begin, end;
  bool operator==(const MemoryRange&) const = default;
};

// The large pages that lie in these ranges, in order. Ranges between which there is less than a small page count as
// one: what is between two tensors of a list is a few bytes of malloc's. So no small page that holds nothing of them is
// taken.
std::vector<MemoryRange> large_pages_of(std::vector<MemoryRange> ranges);

// Asks the system to move these ranges into large pages, in place: for memory that is walked through for hours. An
// optimizer step through weights and momenta of 102 MB each takes 0.95 of its time on a Zen 4. Moving takes 20 to 50 ms
// for 100 MB, up to 250 where the system has to find the pages first, and 0.2 ms where nothing is left to be moved.
// Where a process has forked, as for the workers of a data loader, and then writes, the system goes back to small pages
// one by one, and the next call to large ones.
//
// Nothing is done where the system is set to have no large pages (`never` in
// /sys/kernel/mm/transparent_hugepage/enabled), before Linux 6.1, and where GRANET_LARGE_PAGES was 0 at the first call.
void gather_in_large_pages(std::vector<MemoryRange> ranges);

}  // namespace granet::cpu
