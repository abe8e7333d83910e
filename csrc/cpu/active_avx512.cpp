#include "common/isa.h"

#if GRANET_X86
#include "common/target_avx512.h"

#include "cpu/active_kernel.h"

namespace granet::cpu {

const ActiveKernels active_kernels_avx512 = avx512::kActiveKernels;

}  // namespace granet::cpu

#include "common/target_end.h"

#endif
