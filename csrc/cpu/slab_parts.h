// What packing and unpacking a slab share: the kernels of this machine, parts of runs, and where pixels are.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <iterator>
#include <vector>

#include "common/bits.h"
#include "common/isa.h"
#include "cpu/slab.h"

namespace granet::cpu {

inline const SlabKernels& slab_kernels() {
  return *GRANET_FOR_ISA(&slab_kernels_portable, &slab_kernels_avx2, &slab_kernels_avx512);
}

// The part of a run that lies in positions [position, position + count): elements [begin, end).
struct RunPart {
  int64_t begin;
  int64_t end;
};
inline RunPart part_of(const Run& run, int64_t lanes, int64_t position, int64_t count) {
  const int64_t first = position - run.position, last = first + count;
  if (last <= 0 || first > (run.length - 1) * lanes) return {0, 0};
  if (lanes == 1) return {std::max<int64_t>(0, first), std::min(run.length, last)};  // without divisions
  return {ceil_div(std::max<int64_t>(0, first), lanes), std::min(run.length, ceil_div(last, lanes))};
}

// The vectors of positions [position, position + count), where the channels of a pixel lie next to one another.
inline std::vector<PixelVector> pixel_vectors(const Runs& runs, int64_t position, int64_t count) {
  const int64_t width = slab_kernels().lanes;  // a power of two: divisions would take as long as the packing
  const int shift = std::countr_zero(static_cast<uint64_t>(width));
  PixelVector none;
  std::fill(std::begin(none.origin), std::end(none.origin), -1);
  std::vector<PixelVector> vectors(static_cast<size_t>((count + width - 1) >> shift), none);
  for (const Run& run : runs.runs) {
    const auto [begin, end] = part_of(run, runs.lanes, position, count);
    int64_t at = run.position + begin * runs.lanes - position, origin = run.origin + begin * runs.step;
    for (int64_t i = begin; i < end; ++i, at += runs.lanes, origin += runs.step) {
      vectors[static_cast<size_t>(at >> shift)].origin[at & (width - 1)] = origin;
    }
  }
  return vectors;
}

}  // namespace granet::cpu
