// The kernels in the target region of AVX-512 with dot products of 16- and 8-bit values: for the
// files whose sets have them.
#pragma once

#if defined(__clang__)
  #pragma clang attribute push(                                                               \
      __attribute__((target(                                                                  \
          "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma,f16c,prfchw"))), \
      apply_to = function)
#else
  #pragma GCC push_options
  #pragma GCC target( \
      "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma,f16c,prfchw")
#endif

#include "cpu/kernels_inl.h"

#if defined(__clang__)
  #pragma clang attribute pop
#else
  #pragma GCC pop_options
#endif
