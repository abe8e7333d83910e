// Lists of tensors as a table on the device, so that one launch serves all of them.
//
// A block takes a chunk, consecutive elements of one tensor. A row says what is to be known of a tensor:
//
//     its first chunk | its number of elements | its address in each list ... | further integers ...
//
// and `owners` which row has a chunk. A table is written by kernels that carry its rows as arguments: a launch is given
// a copy, so no memory of the host has to outlive the call, and a CUDA graph keeps the copy and writes the table anew
// at every replay.
#pragma once

#include <cstdint>
#include <vector>

#include "common/bits.h"
#include "cuda/launch.h"

namespace granet::cuda {

struct Table {
  const int64_t* rows;
  const int32_t* owners;
  int64_t chunks;
  int32_t width;  // integers of a row
};

// Columns of a row; an address in list i is in column kAddresses + i.
constexpr int kFirstChunk = 0;
constexpr int kNumel = 1;
constexpr int kAddresses = 2;

// The rows of tensors, still on the host.
class TableRows {
 public:
  TableRows(int lists, int further, int64_t chunk) : width_(kAddresses + lists + further), chunk_(chunk) {}

  // The first chunk and the length are followed by what the caller adds to `words()`, as much as was announced.
  void begin_row(int64_t numel) {
    words_.push_back(chunks_);
    words_.push_back(numel);
    chunks_ += ceil_div(numel, chunk_);
  }
  void add(const void* address) { words_.push_back(static_cast<int64_t>(reinterpret_cast<uintptr_t>(address))); }
  void add(int64_t integer) { words_.push_back(integer); }

  const std::vector<int64_t>& words() const { return words_; }
  int64_t rows() const { return static_cast<int64_t>(words_.size()) / width_; }
  int64_t chunks() const { return chunks_; }
  int64_t chunk() const { return chunk_; }
  int32_t width() const { return width_; }

  // Bytes on the device, the owners behind the rows; the address must be a multiple of 8.
  size_t device_bytes() const {
    return words_.size() * sizeof(int64_t) + static_cast<size_t>(chunks_) * sizeof(int32_t);
  }
  Table table(void* device) const {
    auto* rows = static_cast<int64_t*>(device);
    return {rows, reinterpret_cast<int32_t*>(rows + words_.size()), chunks_, width_};
  }

 private:
  std::vector<int64_t> words_;
  int32_t width_;
  int64_t chunk_;
  int64_t chunks_ = 0;
};

// Write the table to device_bytes() at `device`, in stream order.
cudaError_t launch_write_table(const TableRows& rows, void* device, cudaStream_t stream);

}  // namespace granet::cuda
