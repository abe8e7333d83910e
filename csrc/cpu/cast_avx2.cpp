#include "common/isa.h"

#if GRANET_X86
#include "common/target_avx2.h"

#include "cpu/cast_kernel.h"

namespace granet::cpu::avx2 {

CastKernel cast_kernel(Dtype from, Dtype to) { return cast_kernel_of_pair(from, to); }

}  // namespace granet::cpu::avx2

#include "common/target_end.h"

#endif
