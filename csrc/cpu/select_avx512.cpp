#include "common/isa.h"

#if GRANET_X86
#include "common/target_avx512.h"

#include "cpu/select_kernel.h"

namespace granet::cpu {

constinit const SelectTable select_avx512 = avx512::select_table();

}  // namespace granet::cpu

#include "common/target_end.h"

#endif
