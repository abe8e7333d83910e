// What the C++ tests of the CUDA kernels share: tables in memory of exactly their size, and failures that are counted.
#pragma once

#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "common/bits.h"
#include "cuda/table.h"

namespace granet {

using Bytes = std::vector<uint8_t>;

inline int failures = 0;

inline void expect(bool holds, const std::string& what, int64_t numel) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s, numel = %lld\n", what.c_str(), static_cast<long long>(numel));
}

inline size_t size(int64_t numel) { return static_cast<size_t>(numel); }

// Bools.
inline Bytes random_mask(int64_t numel, double active) {
  std::mt19937_64 generator(size(numel) + 1);
  std::bernoulli_distribution draw(active);
  Bytes mask(size(numel));
  for (uint8_t& weight : mask) weight = draw(generator);
  return mask;
}

// The definition, one bit at a time, padded.
inline Bytes pack(const Bytes& mask) {
  Bytes packed(size(packed_bytes(static_cast<int64_t>(mask.size()))));
  for (size_t i = 0; i < mask.size(); ++i) packed[i >> 3] |= static_cast<uint8_t>((mask[i] != 0) << (i & 7));
  return packed;
}

template <typename T>
std::vector<T> random_numbers(int64_t numel) {
  std::mt19937_64 generator(size(numel));
  std::normal_distribution<double> draw;
  std::vector<T> numbers(size(numel));
  for (T& number : numbers) number = static_cast<T>(draw(generator));
  return numbers;
}

// A table on the "device", which goes when this does.
class WrittenTable {
 public:
  explicit WrittenTable(const cuda::TableRows& rows) : memory_(rows.device_bytes() / 4), rows_(rows) {
    if (cuda::launch_write_table(rows, memory_.data(), nullptr) != cudaSuccess) std::puts("no table");
  }
  cuda::Table get() { return rows_.table(memory_.data()); }

 private:
  std::vector<int32_t> memory_;
  const cuda::TableRows& rows_;
};

}  // namespace granet
