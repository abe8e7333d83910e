// Which instruction set the CPU kernels use: chosen once, when the first kernel runs.
//
// A kernel that gains from wider vectors is a header `cpu/NAME_kernel.h`, written once over common/simd.h and compiled
// once for each instruction set by the three-line files `cpu/NAME_{portable,avx2,avx512}.cpp`, each into a namespace of
// its own. `cpu/NAME.cpp` picks among the three. No file is compiled for the machine that builds it: one library runs
// anywhere.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define GRANET_X86 1
#else
#define GRANET_X86 0
#endif

namespace granet {

enum class Isa { kPortable, kAvx2, kAvx512 };

// The best instruction set of this machine, or a lesser one that the environment variable GRANET_CPU_CAPABILITY names
// ("portable", "avx2", "avx512"); any other value is ignored with a word on stderr. Constant for the life of the
// process.
Isa isa();

const char* isa_name(Isa isa);

enum class Vendor { kOther, kAmd, kIntel };

// AMD's family 25 is Zen 3 and 4, 26 Zen 5; Intel's is 6 in most.
struct Processor {
  Vendor vendor = Vendor::kOther;
  int family = 0;
};

Processor processor();

// The one of three functions (or tables of them) that isa() calls for.
template <typename Choice>
Choice for_isa(Choice portable, Choice avx2, Choice avx512) {
  return isa() == Isa::kAvx512 ? avx512 : isa() == Isa::kAvx2 ? avx2 : portable;
}

// The same where two of them exist on x86 alone.
#if GRANET_X86
#define GRANET_FOR_ISA(portable, avx2, avx512) ::granet::for_isa(portable, avx2, avx512)
#else
#define GRANET_FOR_ISA(portable, avx2, avx512) (portable)
#endif

}  // namespace granet
