// The namespace that everything compiled for one instruction set lives in.
//
// The same header is compiled once per instruction set. Were the copies in one shared namespace,
// the linker would keep a single copy of each inline function, possibly the one with instructions
// that the machine lacks. A kernel file sets FUSEDRNN_ISA before its first include; code that is
// compiled once (tests, CUDA) gets `generic`.
#pragma once

#ifndef FUSEDRNN_ISA
  #define FUSEDRNN_ISA generic
#endif

#define FUSEDRNN_ISA_BEGIN \
  namespace fusedrnn {     \
  namespace FUSEDRNN_ISA {
#define FUSEDRNN_ISA_END \
  }                      \
  }

// Host and device, always inlined: values wider than a register must not cross a call.
#ifdef __CUDACC__
  #define FUSEDRNN_HD __host__ __device__ __forceinline__
#else
  #define FUSEDRNN_HD inline __attribute__((always_inline))
#endif
