#include "common/target_portable.h"

#include "cpu/cast_kernel.h"

namespace granet::cpu::portable {

CastKernel cast_kernel(Dtype from, Dtype to) { return cast_kernel_of_pair(from, to); }

}  // namespace granet::cpu::portable
