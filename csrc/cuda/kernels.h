// The kernels, as a program that is no CUDA compiler's calls them: one function each, which puts
// the kernel on a stream.
//
// Defined in kernels_inl.cuh, one_cta_inl.cuh and persistent_inl.cuh for whoever compiles these
// files: nvcc for a GPU (the .cu files, a type each, so that they compile side by side), or a plain
// compiler, and then the threads of every block run on the host before the call returns
// (tests/cuda_emulated).
#pragma once

#include "cuda/steps.h"

struct CUstream_st;

namespace fusedrnn {

using CudaStream = CUstream_st*;  // cudaStream_t, without CUDA's headers

// Throw std::runtime_error where a launch fails. Rows and units may be zero.
template <class E>
struct Kernels {
  static void initial_state(const InitialState<E>& p, int64_t batch, CudaStream stream);
  static void forward(Cell cell, const ForwardStep<E>& p, CudaStream stream);
  static void project(const ProjectedStep<E>& p, CudaStream stream);
  static void backward(Cell cell, const BackwardStep<E>& p, CudaStream stream);
  static void project_backward(const ProjectedBackwardStep<E>& p, CudaStream stream);
  static void initial_gradient(const InitialGradient<E>& p, int64_t batch, CudaStream stream);
  static void valid_rows(const ValidRows<E>& p, int64_t rows, CudaStream stream);
};

// Many steps in one kernel, without a projection, hidden <= kOneCtaUnits. E is not double.
template <class E>
struct OneCtaKernels {
  static void forward(Cell cell, const SideBySide<PartForward<E>>& sides, CudaStream stream);
  static void backward(Cell cell, const SideBySide<PartBackward<E>>& sides, CudaStream stream);
};

// The same, hidden <= most_persistent_units. CTAs wait for each other: no more of
// them than `resident` tells of the current device and a form, or the launch fails.
template <class E>
struct PersistentForward {
  static int64_t resident(Cell cell, const PersistentForm& form);
  static void run(Cell cell, const SideBySide<PartForward<E>>& sides, const Exchange& exchange,
                  CudaStream stream);
};
template <class E>
struct PersistentBackward {
  static int64_t resident(Cell cell, const PersistentForm& form);
  static void run(Cell cell, const SideBySide<PartBackward<E>>& sides, const Exchange& exchange,
                  CudaStream stream);
};

}  // namespace fusedrnn
