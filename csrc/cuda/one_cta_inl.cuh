// OneCtaKernels<E> from the bodies and the launcher.
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/one_cta_backward.cuh"
#include "cuda/one_cta_forward.cuh"

namespace fusedrnn {

template <class Body, class Part>
void launch_one_cta(const SideBySide<Part>& sides, CudaStream stream) {
  int64_t rows = 0;
  for (int i = 0; i < sides.count; ++i) {
    const PartOfWalk& part = sides.part[i].part;
    rows = std::max(rows, part.rows(part.begin).count);  // no step has more
  }
  const int64_t each = (rows + Body::kRows - 1) / Body::kRows;
  launch_blocks(Body{sides, each}, each * sides.count, stream);
}

template <template <Cell, class, int> class Body, class E, class Part>
void launch_one_cta(Cell cell, const SideBySide<Part>& sides, CudaStream stream) {
  with_cell(cell, [&]<Cell kCell>() {
    if (one_cta_units(sides.part[0].hidden) == 64) {
      launch_one_cta<Body<kCell, E, 64>>(sides, stream);
    } else {
      launch_one_cta<Body<kCell, E, 128>>(sides, stream);
    }
  });
}

template <class E>
void OneCtaKernels<E>::forward(Cell cell, const SideBySide<PartForward<E>>& sides,
                               CudaStream stream) {
  launch_one_cta<FUSEDRNN_ISA::OneCtaForwardBody, E>(cell, sides, stream);
}

template <class E>
void OneCtaKernels<E>::backward(Cell cell, const SideBySide<PartBackward<E>>& sides,
                                CudaStream stream) {
  launch_one_cta<FUSEDRNN_ISA::OneCtaBackwardBody, E>(cell, sides, stream);
}

}  // namespace fusedrnn
