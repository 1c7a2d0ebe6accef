// OneCtaKernels<E> from the bodies and the launcher.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/one_cta_backward.cuh"
#include "cuda/one_cta_forward.cuh"

namespace fusedrnn {

template <template <Cell, class, int> class Body, class E, class Params>
void launch_one_cta(Cell cell, const Params& p, Stream stream) {
  with_cell(cell, [&]<Cell kCell>() {
    const int64_t rows = p.part.rows(p.part.begin).count;  // no step has more
    if (one_cta_units(p.hidden) == 64) {
      launch_blocks(Body<kCell, E, 64>{p}, rows, stream);
    } else {
      launch_blocks(Body<kCell, E, 128>{p}, rows, stream);
    }
  });
}

template <class E>
void OneCtaKernels<E>::forward(Cell cell, const PartForward<E>& p, Stream stream) {
  launch_one_cta<FUSEDRNN_ISA::OneCtaForwardBody, E>(cell, p, stream);
}

template <class E>
void OneCtaKernels<E>::backward(Cell cell, const PartBackward<E>& p, Stream stream) {
  launch_one_cta<FUSEDRNN_ISA::OneCtaBackwardBody, E>(cell, p, stream);
}

}  // namespace fusedrnn
