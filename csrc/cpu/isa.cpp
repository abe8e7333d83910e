#include "common/isa.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if GRANET_X86
#include <cpuid.h>
#endif

namespace granet {
namespace {

Isa best_isa() {
#if GRANET_X86
  // F16C is older than AVX2, and Clang 14 has no name for it here.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

Isa chosen_isa() {
  const Isa best = best_isa();
  const char* name = std::getenv("GRANET_CPU_CAPABILITY");
  if (name == nullptr) return best;
  for (Isa lesser : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
    if (std::strcmp(name, isa_name(lesser)) == 0) return lesser < best ? lesser : best;
  }
  std::fprintf(stderr, "GRANET_CPU_CAPABILITY: expected portable, avx2 or avx512, got '%s'; using %s\n", name,
               isa_name(best));
  return best;
}

}  // namespace

Isa isa() {
  static const Isa chosen = chosen_isa();
  return chosen;
}

Processor processor() {
#if GRANET_X86
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kAuth = 0x6874'7541, kGenu = 0x756e'6547;  // of "AuthenticAMD" and "GenuineIntel"
  if (__get_cpuid(0, &eax, &ebx, &ecx, &edx) == 0) return {};
  const Vendor vendor = ebx == kAuth ? Vendor::kAmd : ebx == kGenu ? Vendor::kIntel : Vendor::kOther;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0) return {};
  constexpr int kExtended = 15;  // the second field counts where the first one is this
  const auto family = static_cast<int>(eax >> 8 & 0xf);
  return {vendor, family == kExtended ? family + static_cast<int>(eax >> 20 & 0xff) : family};
#else
  return {};
#endif
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}

}  // namespace granet
