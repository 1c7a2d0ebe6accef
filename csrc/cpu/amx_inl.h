// The instructions of Intel's matrix unit (AMX), written out: g++ 12's intrinsics do not say that a
// tile's load reads memory.
#pragma once

#include <cstdint>

#include "isa_namespace.h"

FUSEDRNN_ISA_BEGIN

namespace matrix {

// Of 64 bytes: how large each register is.
FUSEDRNN_HD void configure(const void* config) {
  asm volatile("ldtilecfg (%0)" ::"r"(config) : "memory");
}

FUSEDRNN_HD void release() { asm volatile("tilerelease"); }

template <int Register>
FUSEDRNN_HD void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Register));
}

// Rows `bytes` apart.
template <int Register>
FUSEDRNN_HD void load(const void* from, int64_t bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(bytes), "i"(Register) : "memory");
}

template <int Register>
FUSEDRNN_HD void store(void* to, int64_t bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(bytes), "i"(Register) : "memory");
}

// Denormals count as zero, whatever the thread's flags.
template <int Sum, int Left, int Right>
FUSEDRNN_HD void multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Left), "i"(Right));
}

}  // namespace matrix

FUSEDRNN_ISA_END
