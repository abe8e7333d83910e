// Tables of tensors (cuda/table.h) in PyTorch's memory.
#pragma once

#include "cuda/table.h"
#include "torch/cuda/device.h"

namespace granet {

// Keeps the memory of a table; kernels that read it must have been launched while this lives.
struct DeviceTable {
  Tensor memory;
  cuda::Table table;
};

// The rows on the device of `like`. Written once and again only when a row changes; during the capture of a CUDA graph
// always anew, into memory of the graph's own.
DeviceTable device_table(const cuda::TableRows& rows, const Tensor& like, cudaStream_t stream);

}  // namespace granet
