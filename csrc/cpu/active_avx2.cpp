#include "common/isa.h"

#if GRANET_X86
#include "common/target_avx2.h"

#include "cpu/active_kernel.h"

namespace granet::cpu {

const ActiveKernels active_kernels_avx2 = avx2::kActiveKernels;

}  // namespace granet::cpu

#include "common/target_end.h"

#endif
