// The choice of the k largest among the eligible elements of a list of tensors, which all of select.h is made of.
#pragma once

#include <cstdint>
#include <functional>
#include <span>

#include "common/radix.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace granet::cpu {

// Tensors are worked on in chunks of so many elements, a task each: 128 KiB of fp32, which stay in the second-level
// cache between the passes over a chunk, and some 10 microseconds of reading.
constexpr int64_t kChunk = 32'768;

struct Part {
  const void* values;
  FloatType type;
  int64_t numel;
  const uint8_t* bits;  // packed mask; null: no bit is set
  bool inverted;        // false: eligible where the bit is 1; true: where it is 0
  uint8_t* chosen;      // packed mask that is written whole, padding included; not `bits`
};

// Parts [begin, end), which share one count: the k largest of their `eligible` eligible elements.
struct Group {
  int64_t begin;
  int64_t end;
  int64_t eligible;
  int64_t k;
};

// done(part, first, count), on any thread, when `chosen` is final for elements [first, first + count).
using Done = std::function<void(int64_t part, int64_t first, int64_t count)>;

// Groups follow one another and cover all parts. k may lie outside [0, eligible], which means the nearer end. Takes of
// `scratch` and gives nothing back.
void choose(std::span<const Part> parts, std::span<const Group> groups, Rank rank, const Done& done, Scratch& scratch,
            const Parallel& parallel);

// Whether a format among them needs keys of 64 bits.
bool needs_wide_keys(std::span<const Part> parts);

}  // namespace granet::cpu
