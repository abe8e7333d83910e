#include "cuda/table.h"

#include <algorithm>

namespace granet::cuda {
namespace {

struct TableTraits {
  static constexpr int kThreads = 128;
  // Words that a launch carries: its arguments may take 4 KiB on every device and driver.
  static constexpr int kWords = 496;
};

struct Words {
  int64_t word[TableTraits::kWords];
};

// A block writes a row, and that it owns its chunks. It reads nothing from memory, so nothing need be written before.
__global__ void __launch_bounds__(TableTraits::kThreads)
    write_table_kernel(const __grid_constant__ Words words, int64_t chunk, int32_t width, int64_t first_row,
                       int64_t* rows, int32_t* owners) {
  const auto in_words = static_cast<int64_t>(blockIdx.x);
  const int64_t row = first_row + in_words;
  const int64_t* from = words.word + in_words * width;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) rows[row * width + i] = from[i];
  const int64_t first = from[kFirstChunk], count = ceil_div(from[kNumel], chunk);
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) owners[first + i] = static_cast<int32_t>(row);
}

}  // namespace

cudaError_t launch_write_table(const TableRows& rows, void* device, cudaStream_t stream) {
  const Table table = rows.table(device);
  const int64_t at_once = TableTraits::kWords / rows.width();
  if (at_once == 0) return cudaErrorInvalidValue;
  for (int64_t first = 0; first < rows.rows(); first += at_once) {
    const int64_t count = std::min(at_once, rows.rows() - first);
    Words words{};
    std::copy_n(rows.words().begin() + first * rows.width(), count * rows.width(), words.word);
    const cudaError_t error =
        launch(write_table_kernel, {.blocks = count, .threads = TableTraits::kThreads, .stream = stream}, words,
               rows.chunk(), table.width, first, const_cast<int64_t*>(table.rows), const_cast<int32_t*>(table.owners));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace granet::cuda
