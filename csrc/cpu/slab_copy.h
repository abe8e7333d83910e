// What packing and unpacking a slab share: the kernels of this machine, elements as floats, and where pixels are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <vector>

#include "common/bfloat16.h"
#include "common/bits.h"
#include "common/isa.h"
#include "cpu/slab.h"

namespace granet::cpu {

inline const SlabKernels& slab_kernels() {
  return *GRANET_FOR_ISA(&slab_kernels_portable, &slab_kernels_avx2, &slab_kernels_avx512);
}

// The part of a run that lies in positions [position, position + count): elements [begin, end).
struct Part {
  int64_t begin;
  int64_t end;
};
inline Part part_of(const Run& run, int64_t lanes, int64_t position, int64_t count) {
  const int64_t begin = std::max<int64_t>(0, ceil_div(std::max<int64_t>(0, position - run.position), lanes));
  const int64_t last = position + count - run.position;
  const int64_t end = last <= 0 ? 0 : std::min(run.length, ceil_div(last, lanes));
  return {begin, std::max(begin, end)};
}

template <Element>
struct Stored;

template <>
struct Stored<Element::kFloat32> {
  using Type = float;
  static float load(float value) { return value; }
};

template <>
struct Stored<Element::kBFloat16> {
  using Type = uint16_t;
  static float load(uint16_t bits) { return bfloat16_to_float(bits); }
};

// The vectors of positions [position, position + count), where the channels of a pixel lie next to one another.
inline std::vector<PixelVector> pixel_vectors(const Runs& runs, int64_t position, int64_t count) {
  const int64_t width = slab_kernels().lanes;
  PixelVector none;
  std::fill(std::begin(none.origin), std::end(none.origin), -1);
  std::vector<PixelVector> vectors(static_cast<size_t>(ceil_div(count, width)), none);
  for (const Run& run : runs.runs) {
    const auto [begin, end] = part_of(run, runs.lanes, position, count);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = run.position + i * runs.lanes - position;
      vectors[static_cast<size_t>(at / width)].origin[at % width] = run.origin + i * runs.step;
    }
  }
  return vectors;
}

}  // namespace granet::cpu
