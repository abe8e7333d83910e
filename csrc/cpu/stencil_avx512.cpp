#include "common/isa.h"

#if GRANET_X86
#include "common/target_avx512.h"

#include "cpu/stencil_kernel.h"

namespace granet::cpu {

const StencilKernels stencil_kernels_avx512 = avx512::kStencilKernels;

}  // namespace granet::cpu

#include "common/target_end.h"

#endif
