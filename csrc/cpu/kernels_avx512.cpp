// Kernels for AVX-512 F, BW, DQ and VL.
#if defined(__x86_64__)
  #define FUSEDRNN_ISA avx512
  #define FUSEDRNN_VECTOR_BYTES 64
  #define FUSEDRNN_ACCUMULATORS 24

  #include "cpu/kernels_prelude.h"

  #if defined(__clang__)
    #pragma clang attribute push(                                                           \
        __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prfchw"))), \
        apply_to = function)
  #else
    #pragma GCC push_options
    #pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prfchw")
  #endif

  #include "cpu/kernels_inl.h"

  #if defined(__clang__)
    #pragma clang attribute pop
  #else
    #pragma GCC pop_options
  #endif

namespace fusedrnn {

static bool usable() noexcept {
  return kAvx2Isa.usable() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

constinit const Isa kAvx512Isa = {"avx512",
                                  FUSEDRNN_VECTOR_BYTES,
                                  usable,
                                  avx512::kernel_table<float>(),
                                  avx512::kernel_table<double>(),
                                  avx512::narrow_table<avx512::Bf16>(),
                                  avx512::narrow_table<avx512::Int8>()};

}  // namespace fusedrnn
#endif
