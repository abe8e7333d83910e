// Packing, unpacking, counting and zeroing. Addresses of tensors need no alignment; those of 16 bytes are fast.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/launch.h"
#include "cuda/table.h"

namespace granet::cuda {

// `mask`: numel bytes, 0 or 1. `packed`: packed_bytes(numel), all written.
cudaError_t launch_pack_mask(const uint8_t* mask, int64_t numel, uint8_t* packed, cudaStream_t stream);
cudaError_t launch_unpack_mask(const uint8_t* packed, int64_t numel, uint8_t* mask, cudaStream_t stream);

// Chunks of tables of masks: "elements" are bytes.
constexpr int64_t kCountChunk = 16'384;

// counts[row] += ones of the row's mask. Lists: mask.
cudaError_t launch_count_active(const Table& masks, unsigned long long* counts, cudaStream_t stream);

constexpr int64_t kZeroChunk = 8192;

// +0.0 where the bit is 0, elements of 2, 4 or 8 bytes. Lists: tensor, mask.
cudaError_t launch_zero_inactive(const Table& tensors, size_t item_size, cudaStream_t stream);

}  // namespace granet::cuda
