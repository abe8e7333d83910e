#include "common/target_portable.h"

#include "cpu/stream_kernel.h"

namespace granet::cpu {

const StreamKernels stream_kernels_portable = portable::kStreamKernels;

}  // namespace granet::cpu
