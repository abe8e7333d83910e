#include "common/target_portable.h"

#include "cpu/stencil_kernel.h"

namespace granet::cpu {

const StencilKernels stencil_kernels_portable = portable::kStencilKernels;

}  // namespace granet::cpu
