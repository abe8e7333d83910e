#include "common/target_portable.h"

#include "cpu/sgd_average.h"
#include "cpu/sgd_kernel.h"

namespace granet::cpu::portable {

SgdKernel sgd_kernel(Dtype param, Dtype momentum) { return sgd_kernel_of_pair(param, momentum); }

AverageKernel average_kernel(Dtype param) { return average_kernel_of(param); }

}  // namespace granet::cpu::portable
