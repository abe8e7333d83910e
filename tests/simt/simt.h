// CUDA for the host: what our kernels use of cuda_runtime.h, so that their sources compile as plain C++ and run
// without a GPU. In its place because tests/simt/include comes first on the include path.
//
// What is not here does not compile: __shared__ (kernels take granet::cuda::shared_memory), y and z of the indices,
// __activemask, cooperative groups, textures. What is here behaves as CUDA's, or throws simt::Fault from the launch.
// Shuffles and ballots do not order memory; __syncwarp does.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "engine.h"
#include "simt_atomics.h"
#include "simt_host.h"
#include "simt_vectors.h"
#include "simt_warp.h"

#define GRANET_SIMT 1

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace simt {

template <unsigned (*of_the_running_thread)()>
struct Index {
  struct {
    operator unsigned() const { return of_the_running_thread(); }  // NOLINT: x is to be read as a number
  } x;                                                             // no y and z: kernels that use them do not compile
};

}  // namespace simt

inline constexpr simt::Index<simt::thread_index> threadIdx{};
inline constexpr simt::Index<simt::block_index> blockIdx{};
inline constexpr simt::Index<simt::block_size> blockDim{};
inline constexpr simt::Index<simt::grid_size> gridDim{};
constexpr int warpSize = 32;

inline void __syncthreads(simt::Place place = simt::Place::current()) { simt::sync_threads(place); }
inline void __threadfence() { simt::fence(); }

// Which cache a load or a store goes by makes no difference here.
template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
void __stcg(T* address, T value) {
  *address = value;
}
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline int __ffsll(long long x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned long long>(x)) + 1; }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

// To the nearest; -ffp-contract=off keeps the compiler from fusing what is not.
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline double __fma_rn(double x, double y, double z) { return std::fma(x, y, z); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0F / x; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __ddiv_rn(double x, double y) { return x / y; }

using std::max;
using std::min;
