// The probe's inline assembly, one instruction a function. Nothing else here holds any but what it
// shares with the kernels (cuda/block.cuh).
//
// All of it is volatile and clobbers memory: what is measured must neither vanish nor move.
#pragma once

#include <cstdint>

#include "cuda/block.cuh"
#include "probe.cuh"
#include "protocols.h"

namespace fusedrnn::probe {

// ---- clocks ------------------------------------------------------------------------------------

// Nanoseconds, the same for all SMs. It may advance in steps of up to a microsecond.
__device__ inline uint64_t global_nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

// This SM's clock.
__device__ inline uint64_t clocks() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(now)::"memory");
  return now;
}

// From here to stop(), by the first thread of the grid.
class Stopwatch {
 public:
  __device__ Stopwatch() : nanoseconds_(global_nanoseconds()), clocks_(clocks()) {}
  __device__ void stop(Ticks* ticks) const {
    const Ticks now = {clocks() - clocks_, global_nanoseconds() - nanoseconds_};
    if (blockIdx.x == 0 && threadIdx.x == 0) *ticks = now;
  }

 private:
  uint64_t nanoseconds_, clocks_;
};

// ---- global memory -----------------------------------------------------------------------------

// The kernels' own.
__device__ inline void store_relaxed(uint32_t* p, uint32_t word) { Block().store_relaxed(p, word); }
__device__ inline Piece load_relaxed(const uint32_t* p) { return Block().load_relaxed(p); }

__device__ inline void store_plain(uint32_t* p, uint32_t word) {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(p), "r"(word) : "memory");
}

__device__ inline Piece load_plain(const uint32_t* p) {
  Piece v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(p)
               : "memory");
  return v;
}

__device__ inline void add_release(uint32_t* p, uint32_t more) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(more) : "memory");
}

__device__ inline uint32_t load_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

// ---- shared memory, also of the cluster's other CTAs
// ---------------------------------------------

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ inline Piece load_shared(uint32_t address) {
  Piece v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(address)
               : "memory");
  return v;
}

__device__ inline void store_shared(uint32_t address, Piece v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.word[0]),
               "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

enum class Scope { kCta, kCluster };

// Before sm_90 there are no clusters, and the host launches none of these.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// The address, in the cluster's window, of what lies at `address` in the shared memory of `cta`.
__device__ inline uint32_t peer_address(uint32_t address, uint32_t cta) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(cta));
  return there;
}

__device__ inline Piece load_peer(uint32_t there) {
  Piece v;
  asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(there)
               : "memory");
  return v;
}

__device__ inline void store_peer(uint32_t there, Piece v) {
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(there), "r"(v.word[0]),
               "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

// A release by all threads of the cluster, then an acquire. Threads that have left count as there.
__device__ inline void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// 16 bytes to another CTA; its mbarrier counts them when they are there.
__device__ inline void store_async(uint32_t there, Piece v, uint32_t mbarrier_there) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(there),
      "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3]), "r"(mbarrier_there)
      : "memory");
}

__device__ inline void mbarrier_init(uint32_t mbarrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(mbarrier), "r"(arrivals) : "memory");
  // for the cluster's other CTAs
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// The one arrival of a phase, which then ends once `bytes` have come.
__device__ inline void mbarrier_arm(uint32_t mbarrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(mbarrier), "r"(bytes)
               : "memory");
}

// Whether the phase of this parity has ended; the hardware may wait a little before it says no.
// Acquiring for the cluster also invalidates the first-level cache (CCTL.IVALL in the SASS).
template <Scope acquire>
__device__ inline bool mbarrier_ended(uint32_t mbarrier, uint32_t parity) {
  uint32_t ended;
  if constexpr (acquire == Scope::kCta) {
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(ended)
        : "r"(mbarrier), "r"(parity)
        : "memory");
  } else {
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(ended)
        : "r"(mbarrier), "r"(parity)
        : "memory");
  }
  return ended != 0;
}

#endif

// ---- arithmetic --------------------------------------------------------------------------------

enum class Product { kBf16, kHalf, kTf32 };

// d += A B: m16n8k16 of bfloat16 or half, m16n8k8 of TF32; A four registers a lane, B two.
template <Product kind>
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kind == Product::kBf16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (kind == Product::kHalf) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// d = d * a + b
__device__ inline void multiply_add(float& d, float a, float b) {
  asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+f"(d) : "f"(a), "f"(b));
}

}  // namespace fusedrnn::probe
