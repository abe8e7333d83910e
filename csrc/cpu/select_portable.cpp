#include "common/target_portable.h"

#include "cpu/select_kernel.h"

namespace granet::cpu {

constinit const SelectTable select_portable = portable::select_table();

}  // namespace granet::cpu
