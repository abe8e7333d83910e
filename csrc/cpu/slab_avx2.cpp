#include "common/isa.h"

#if GRANET_X86
#include "common/target_avx2.h"

#include "cpu/slab_kernel.h"

namespace granet::cpu {

const SlabKernels slab_kernels_avx2 = avx2::kSlabKernels;

}  // namespace granet::cpu

#include "common/target_end.h"

#endif
