// What threads of a block do together. All inline assembly of the kernels stands here; who compiles
// them with no CUDA compiler brings a Block of its own (tests/cuda_emulated).
#pragma once

#include <cstdint>

#include "cuda/sentinel.h"
#include "cuda/storage.h"

#ifdef __CUDACC__
  #define FUSEDRNN_D __device__ __forceinline__
  #define FUSEDRNN_UNROLL _Pragma("unroll")
  #define FUSEDRNN_ONE_BY_ONE _Pragma("unroll 1")

namespace fusedrnn {

class Block {
 public:
  FUSEDRNN_D int thread() const { return threadIdx.x; }
  FUSEDRNN_D int64_t index() const { return blockIdx.x; }

  // The block's shared memory, aligned to 16 bytes.
  FUSEDRNN_D static char* shared() {
    extern __shared__ __align__(16) char memory[];
    return memory;
  }

  // A barrier; what was written to shared memory before is seen after.
  FUSEDRNN_D void sync() const { __syncthreads(); }

  // The value of the lane whose number differs in the bits of `mask`. All lanes of a warp together.
  FUSEDRNN_D float of_lane_across(float value, int mask) const {
    return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
  }

  // Whether it is so in any lane. All lanes of a warp together.
  FUSEDRNN_D bool any_lane(bool mine) const { return __any_sync(0xFFFFFFFFu, mine); }

  // Global memory that other blocks use meanwhile. Each word is one access.
  FUSEDRNN_D Words load_relaxed(const uint32_t* from) const {
    Words w;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.word[0]), "=r"(w.word[1]), "=r"(w.word[2]), "=r"(w.word[3])
                 : "l"(from)
                 : "memory");
    return w;
  }
  FUSEDRNN_D void store_relaxed(uint32_t* to, uint32_t word) const {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
  }

  // Of one clock for all blocks.
  FUSEDRNN_D uint64_t nanoseconds() const {
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
  }
  // Ends the kernel with an error.
  FUSEDRNN_D void give_up() const { asm volatile("trap;"); }

  // The same word, of which the compiler knows nothing.
  FUSEDRNN_D uint32_t unknown(uint32_t word) const {
    asm volatile("" : "+r"(word));
    return word;
  }
  // A float rounded to what tensor cores take of it, ties away from zero.
  FUSEDRNN_D uint32_t to_tf32(uint32_t bits) const {
    uint32_t rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
    return rounded;
  }

  // c += a b for a (16, 16), b (16, 8) and c (16, 8) spread over a warp as mma.m16n8k16 has them.
  FUSEDRNN_D void multiply_add(BFloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                               uint32_t b1) const {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  FUSEDRNN_D void multiply_add(Half, float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                               uint32_t b1) const {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  // The same for a (16, 8) and b (8, 8) of floats, the first 11 bits of each, as mma.m16n8k8.
  FUSEDRNN_D void multiply_add(float, float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                               uint32_t b1) const {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

}  // namespace fusedrnn

#else
  #define FUSEDRNN_D inline
  #define FUSEDRNN_UNROLL
  #define FUSEDRNN_ONE_BY_ONE
  #include "emulated_block.h"
#endif
