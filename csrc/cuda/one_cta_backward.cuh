// Back-propagation through many steps in one kernel, as one_cta_forward.cuh goes forward.
#pragma once

#include "cuda/one_cta_product.cuh"
#include "cuda/unit_backward.cuh"

FUSEDRNN_ISA_BEGIN

template <Cell kCell, class E, int kUnits>
struct OneCtaBackwardBody {
  using S = Arithmetic<E>;
  using Unit = UnitBackward<kCell, E>;
  static constexpr int kGates = Unit::kBlocks.gates;
  using Weights = Product<E, 1, kGates, kUnits>;
  static constexpr int kThreads = Weights::kThreads;
  static constexpr int kRows = Weights::kRows;
  static constexpr int kSharedBytes = Weights::kSharedBytes;
  SideBySide<PartBackward<E>> sides;
  int64_t blocks_each;

  FUSEDRNN_D void operator()(const Block& block) const {
    const Side side(block.index(), blocks_each);
    const PartBackward<E>& p = sides.part[side.which];
    const Weights weights(block, p.w_hh);
    Unit unit(p, side.index * kRows + weights.row(), weights.unit(), weights.is_owner());
    S product[1] = {S(0)};
    const int64_t steps = p.part.end - p.part.begin;
    typename Unit::Given next = unit.given(p, 0);
    for (int64_t i = 0; i < steps; ++i) {
      const typename Unit::Given now = next;
      if (i + 1 < steps) next = unit.given(p, i + 1);
      const UnitGradient<S> d = unit.step(now, product[0]);
      FUSEDRNN_UNROLL
      for (int gate = 0; gate < kGates; ++gate) weights.put(i % 2, gate, d.dgates[gate]);
      unit.put_away(p, i, now, d);
      block.sync();
      weights.run(i % 2, product);
    }
    unit.finish(p, product[0]);
  }
};

FUSEDRNN_ISA_END
