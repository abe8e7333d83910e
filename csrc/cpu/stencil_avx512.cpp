#include "common/isa.h"

#if GRANET_X86

#include "common/target_avx512.h"

#include "cpu/stencil_kernel.h"

namespace granet::cpu {

extern const StencilKernels kStencilKernels_avx512;
const StencilKernels kStencilKernels_avx512 = avx512::kStencilKernels;

}  // namespace granet::cpu

#endif
