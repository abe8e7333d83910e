#include "common/target_portable.h"

#include "cpu/stencil_kernel.h"

namespace granet::cpu {

extern const StencilKernels kStencilKernels_portable;
const StencilKernels kStencilKernels_portable = portable::kStencilKernels;

}  // namespace granet::cpu
