// Atomic accesses. They order nothing by themselves, as on a GPU; __threadfence does.
#pragma once

#include "engine.h"

namespace simt {

template <typename T, typename Change>
T atomic_change(T* address, Change change) {
  before_atomic(address);
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  T changed = change(old);
  while (!__atomic_compare_exchange_n(address, &old, changed, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    changed = change(old);
  }
  after_atomic(address);
  return old;
}

}  // namespace simt

#define GRANET_SIMT_ATOMIC(name, type, expression)                                                      \
  inline type name(type* address, type value) {                                                         \
    return simt::atomic_change(address, [&]([[maybe_unused]] type old) -> type { return expression; }); \
  }
#define GRANET_SIMT_ATOMICS(type)                                                                                \
  GRANET_SIMT_ATOMIC(atomicAdd, type, old + value)                                                               \
  GRANET_SIMT_ATOMIC(atomicMin, type, value < old ? value : old)                                                 \
  GRANET_SIMT_ATOMIC(atomicMax, type, old < value ? value : old)                                                 \
  GRANET_SIMT_ATOMIC(atomicAnd, type, old& value)                                                                \
  GRANET_SIMT_ATOMIC(atomicOr, type, old | value)                                                                \
  GRANET_SIMT_ATOMIC(atomicXor, type, old ^ value)                                                               \
  GRANET_SIMT_ATOMIC(atomicExch, type, value)                                                                    \
  inline type atomicCAS(type* address, type compare, type value) {                                               \
    return simt::atomic_change(address,                                                                          \
                               [&]([[maybe_unused]] type old) -> type { return old == compare ? value : old; }); \
  }
GRANET_SIMT_ATOMICS(int)
GRANET_SIMT_ATOMICS(unsigned)
GRANET_SIMT_ATOMICS(unsigned long long)
GRANET_SIMT_ATOMIC(atomicSub, int, old - value)
GRANET_SIMT_ATOMIC(atomicSub, unsigned, old - value)
GRANET_SIMT_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)
#undef GRANET_SIMT_ATOMICS
#undef GRANET_SIMT_ATOMIC
