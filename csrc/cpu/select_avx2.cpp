#include "common/isa.h"

#if GRANET_X86
#include "common/target_avx2.h"

#include "cpu/select_kernel.h"

namespace granet::cpu {

constinit const SelectTable select_avx2 = avx2::select_table();

}  // namespace granet::cpu

#include "common/target_end.h"

#endif
