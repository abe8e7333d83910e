#include "common/isa.h"

#if GRANET_X86

#include "common/target_avx2.h"

#include "cpu/stencil_kernel.h"

namespace granet::cpu {

extern const StencilKernels kStencilKernels_avx2;
const StencilKernels kStencilKernels_avx2 = avx2::kStencilKernels;

}  // namespace granet::cpu

#endif
