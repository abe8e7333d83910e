// Mask kernels for the CPU, over raw pointers and sizes.
//
// Each runs on the calling thread and touches no memory but the ranges named here. A caller that wants threads cuts the
// weights into slices that begin at a multiple of eight and gives each slice its own call; the result is the same.
#pragma once

#include <cstddef>
#include <cstdint>

namespace granet::cpu {

// Bit i of `packed` = (mask[i] != 0). Reads mask[0, numel); writes packed[0, mask_bytes(numel)), the last byte filled
// up with zeros, and leaves padding to the caller.
void pack_mask(const uint8_t* mask, int64_t numel, uint8_t* packed);

// mask[i] = bit i of `packed`, as 0 or 1. Reads packed[0, mask_bytes(numel)); writes mask[0, numel).
void unpack_mask(const uint8_t* packed, int64_t numel, uint8_t* mask);

// The number of ones in packed[0, bytes).
int64_t count_active(const uint8_t* packed, int64_t bytes);

// weight[i] = +0.0 (all bits zero) where bit i of `packed` is 0; other weights keep their bits, NaN payloads included.
// `item_size` is the size of one weight. Reads packed[0, mask_bytes(numel)); reads and writes weight[0, numel) but for
// groups of eight active weights. Returns false, having done nothing, unless item_size is 1, 2, 4 or 8.
bool zero_inactive(void* weight, size_t item_size, const uint8_t* packed, int64_t numel);

}  // namespace granet::cpu
