// The forward recurrence of many steps in one kernel: a CTA has a few rows of the batch, all units
// and all of W_hh, so that no CTA waits for another.
#pragma once

#include "cuda/one_cta_product.cuh"
#include "cuda/unit_forward.cuh"

FUSEDRNN_ISA_BEGIN

// A thread is one row and one unit. While a step is computed, what the next one needs from memory
// is on its way.
template <Cell kCell, class E, int kUnits>
struct OneCtaForwardBody {
  using S = Arithmetic<E>;
  using Unit = UnitForward<kCell, E>;
  using Weights = Product<E, Unit::kGates, 1, kUnits>;
  static constexpr int kThreads = Weights::kThreads;
  static constexpr int kRows = Weights::kRows;
  static constexpr int kSharedBytes = Weights::kSharedBytes;
  SideBySide<PartForward<E>> sides;
  int64_t blocks_each;

  FUSEDRNN_D void operator()(const Block& block) const {
    const Side side(block.index(), blocks_each);
    const PartForward<E>& p = sides.part[side.which];
    const Weights weights(block, p.w_hh);
    const UnitBiases<kCell, E> biases(p, weights.unit());
    Unit unit(p, side.index * kRows + weights.row(), weights.unit(), weights.is_owner());
    weights.put(0, 0, unit.h());
    const int64_t steps = p.part.end - p.part.begin;
    typename Unit::Given next = unit.given(p, 0);
    for (int64_t i = 0; i < steps; ++i) {
      const typename Unit::Given now = next;
      block.sync();
      if (i + 1 < steps) next = unit.given(p, i + 1);
      S product[Unit::kGates];
      weights.run(i % 2, product);
      const UnitStep<S> step = unit.step(now, biases, product);
      weights.put((i + 1) % 2, 0, unit.h());
      unit.put_away(p, i, now, step);
    }
    unit.finish(p);
  }
};

FUSEDRNN_ISA_END
