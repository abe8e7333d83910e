#include "common/target_portable.h"

#include "cpu/sgd_kernel.h"

namespace granet::cpu::portable {

SgdKernel sgd_kernel(Dtype param, Dtype momentum) { return sgd_kernel_of_pair(param, momentum); }

}  // namespace granet::cpu::portable
