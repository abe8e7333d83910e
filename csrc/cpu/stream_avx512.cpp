#include "common/isa.h"

#if GRANET_X86
#include "common/target_avx512.h"

#include "cpu/stream_kernel.h"

namespace granet::cpu {

const StreamKernels stream_kernels_avx512 = avx512::kStreamKernels;

}  // namespace granet::cpu

#include "common/target_end.h"

#endif
