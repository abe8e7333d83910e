#include "common/bits.h"
#include "common/isa.h"

#if GRANET_X86
#include "common/target_avx2.h"

#include "cpu/sgd_average.h"
#include "cpu/sgd_kernel.h"

namespace granet::cpu::avx2 {

SgdKernel sgd_kernel(Dtype param, Dtype momentum) { return sgd_kernel_of_pair(param, momentum); }

AverageKernel average_kernel(Dtype param) { return average_kernel_of(param); }

}  // namespace granet::cpu::avx2

#include "common/target_end.h"

#endif
