#include "common/target_portable.h"

#include "cpu/active_kernel.h"

namespace granet::cpu {

const ActiveKernels active_kernels_portable = portable::kActiveKernels;

}  // namespace granet::cpu
