// Kernels<E> from the bodies and the launcher.
#pragma once

#include <algorithm>

#include "cuda/backward.cuh"
#include "cuda/forward.cuh"
#include "cuda/launch.cuh"

namespace fusedrnn {

template <template <Cell, class> class Body, class E, class Params>
void launch_cell(Cell cell, const Params& p, int64_t rows, CudaStream stream) {
  with_cell(cell, [&]<Cell kCell>() { launch(Body<kCell, E>{p}, rows, p.hidden, stream); });
}

template <class E>
void Kernels<E>::initial_state(const InitialState<E>& p, int64_t batch, CudaStream stream) {
  launch(FUSEDRNN_ISA::InitialStateBody<E>{p}, batch, p.width, stream);
}

template <class E>
void Kernels<E>::forward(Cell cell, const ForwardStep<E>& p, CudaStream stream) {
  launch_cell<FUSEDRNN_ISA::ForwardBody, E>(cell, p, p.step.now.count, stream);
}

template <class E>
void Kernels<E>::project(const ProjectedStep<E>& p, CudaStream stream) {
  launch(FUSEDRNN_ISA::ProjectedBody<E>{p}, p.step.now.count, p.output, stream);
}

// Rows of a packed input may have had their step after, and not this one: their gradient is handed
// on.
template <class E>
int64_t rows_of(const Step& step, const CarriedGradient<E>& carry) {
  return std::max(step.now.count, carry.product_rows);
}

template <class E>
void Kernels<E>::backward(Cell cell, const BackwardStep<E>& p, CudaStream stream) {
  launch_cell<FUSEDRNN_ISA::BackwardBody, E>(cell, p, rows_of(p.step, p.carry), stream);
}

template <class E>
void Kernels<E>::project_backward(const ProjectedBackwardStep<E>& p, CudaStream stream) {
  launch(FUSEDRNN_ISA::ProjectedBackwardBody<E>{p}, rows_of(p.step, p.carry), p.output, stream);
}

template <class E>
void Kernels<E>::initial_gradient(const InitialGradient<E>& p, int64_t batch, CudaStream stream) {
  launch(FUSEDRNN_ISA::InitialGradientBody<E>{p}, batch, p.width, stream);
}

template <class E>
void Kernels<E>::valid_rows(const ValidRows<E>& p, int64_t rows, CudaStream stream) {
  launch(FUSEDRNN_ISA::ValidRowsBody<E>{p}, rows, p.width, stream);
}

}  // namespace fusedrnn
