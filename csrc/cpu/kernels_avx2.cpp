// Kernels for AVX2, FMA and F16C.
#if defined(__x86_64__)
  #define FUSEDRNN_ISA avx2
  #define FUSEDRNN_VECTOR_BYTES 32
  #define FUSEDRNN_ACCUMULATORS 12

  #include "cpu/kernels_prelude.h"

  #if defined(__clang__)
    #pragma clang attribute push(__attribute__((target("avx2,fma,f16c,prfchw"))), \
                                 apply_to = function)
  #else
    #pragma GCC push_options
    #pragma GCC target("avx2,fma,f16c,prfchw")
    // With sixteen registers it costs some of a product's sums theirs: g++ 12 then adds to memory.
    #pragma GCC optimize("no-gcse")
  #endif

  #include "cpu/kernels_inl.h"

  #if defined(__clang__)
    #pragma clang attribute pop
  #else
    #pragma GCC pop_options
  #endif

namespace fusedrnn {

static bool usable() noexcept {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

constinit const Isa kAvx2Isa = {"avx2",
                                FUSEDRNN_VECTOR_BYTES,
                                usable,
                                avx2::kernel_table<float>(),
                                avx2::kernel_table<double>(),
                                avx2::narrow_table<avx2::Bf16>(),
                                avx2::narrow_table<avx2::Int8>()};

}  // namespace fusedrnn
#endif
