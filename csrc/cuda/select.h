// Selection by rank on the device: what pruning, dropping and regrowing, and the top-k mask have in common.
//
// What is ranked together is a segment: one tensor, or all of them. The host reads nothing and launches the same
// kernels whatever the values are, so that a call can be captured in a CUDA graph; a launch that has nothing to do ends
// at once. Masks and counts are exact and the same at every run.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/radix.h"
#include "cuda/launch.h"
#include "cuda/table.h"

namespace granet::cuda {

// A row of the table: a tensor.
struct SelectRow {
  int64_t first_chunk;
  int64_t numel;
  void* numbers;     // weights; of topk_mask the scores
  uint8_t* mask;     // packed, padded; written
  void* momentum;    // or null
  const void* gain;  // of drop_regrow the scores, in the weight's storage order; or null
  int64_t types;     // select_types() of the numbers, the momentum and the gain
};

constexpr int64_t select_types(FloatType numbers, FloatType momentum, FloatType gain) {
  return static_cast<int64_t>(numbers) | static_cast<int64_t>(momentum) << 8 | static_cast<int64_t>(gain) << 16;
}

constexpr int64_t kSelectChunk = 16'384;  // elements of a chunk of the table

// Formats that are ranked together.
struct Formats {
  bool seen[kFloatTypes] = {};
  constexpr void add(FloatType type) { seen[static_cast<int>(type)] = true; }
};

struct SelectLists {
  Table table;       // of SelectRow
  int64_t tensors;   // rows
  int64_t elements;  // of all rows
  int64_t largest;   // of the largest
  bool each;         // a segment is a row; otherwise all are one
  Formats numbers;
  Formats gains;
  // Segments of so many elements are sampled first, which saves most of a pass over them.
  int64_t sample_from = int64_t{1} << 16;
};

// Bytes of device memory, aligned to 16, that a call needs; their contents do not matter before or after.
size_t select_workspace_bytes(const SelectLists& lists);

// How many to choose of each segment; out of range means the nearer end. Counts of the host travel as arguments.
struct Wanted {
  const int64_t* counts;
  bool on_device;
};

// Keep the k largest magnitudes among the active weights; +0.0 elsewhere, in momenta too.
cudaError_t launch_prune(const SelectLists& lists, const Wanted& k, void* workspace, cudaStream_t stream);

// A number, or where it lies on the device.
struct Fraction {
  double number = 0;
  const double* address = nullptr;
};

// In each row drop ceil(fraction * active) smallest magnitudes and regrow as many by largest gain. A fraction outside
// [0, 1] counts as the nearer end, NaN as 0.
cudaError_t launch_drop_regrow(const SelectLists& lists, const Fraction& fraction, void* workspace,
                               cudaStream_t stream);

// Masks of the k largest numbers, signed; padding is written too.
cudaError_t launch_topk_mask(const SelectLists& lists, const Wanted& k, void* workspace, cudaStream_t stream);

}  // namespace granet::cuda
