#include "common/target_portable.h"

#include "cpu/slab_kernel.h"

namespace granet::cpu {

const SlabKernels slab_kernels_portable = portable::kSlabKernels;

}  // namespace granet::cpu
