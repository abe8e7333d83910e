#include "common/isa.h"

#if GRANET_X86
#include "common/target_avx512.h"

#include "cpu/slab_kernel.h"

namespace granet::cpu {

const SlabKernels slab_kernels_avx512 = avx512::kSlabKernels;

}  // namespace granet::cpu

#include "common/target_end.h"

#endif
