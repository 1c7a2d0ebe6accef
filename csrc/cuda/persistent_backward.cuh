// Back-propagation through many steps in one kernel whose CTAs share W_hh out and exchange the
// gradients of the gates, as persistent_forward.cuh goes forward.
#pragma once

#include "cuda/persistent_product.cuh"
#include "cuda/unit_backward.cuh"

FUSEDRNN_ISA_BEGIN

// kDepths as forward: a warp has a multiple of them here.
template <Cell kCell, class E, Precision kPrecision, int kUnits, int kDepths, int kRows>
struct PersistentBackwardBody {
  using S = Arithmetic<E>;
  using Unit = UnitBackward<kCell, E>;
  static constexpr int kGates = Unit::kBlocks.gates;
  using Weights = PersistentProduct<E, kPrecision, 1, kGates, kUnits, kGates * kDepths, kRows, 16>;
  static constexpr int kThreads = kPersistentThreads;
  static constexpr int kSharedBytes = Weights::kSharedBytes;
  static constexpr int kItems = PersistentShare<kUnits, kRows>::kItems;
  SideBySide<PartBackward<E>> sides;
  int64_t blocks_each;
  Exchange exchange;

  FUSEDRNN_D void operator()(const Block& block) const {
    const Side side(block.index(), blocks_each);
    const PartBackward<E>& either = sides.part[0];  // for what both have alike
    // Asked for anew at each step, as persistent_forward.cuh does.
    const auto part = [&]() -> const PartBackward<E>& {
      return sides.part[block.unknown(side.which)];
    };
    const PartBackward<E>& p = part();
    const PersistentShare<kUnits, kRows> share(block.thread(), side.index, either.hidden, exchange);
    const Weights weights(block, share, p.w_hh, exchange.words[side.which],
                          either.part.order.batch);
    Unit items[kItems];
    S product[kItems][1] = {};
    typename Unit::Given now[kItems];
    FUSEDRNN_UNROLL
    for (int k = 0; k < kItems; ++k) {
      items[k] = Unit(p, share.row(k), share.unit(), share.works());
      now[k] = items[k].given(p, 0);
    }
    const int steps = static_cast<int>(p.part.end - p.part.begin);
    for (int i = 0; i < steps; ++i) {
      FUSEDRNN_UNROLL
      for (int k = 0; k < kItems; ++k) {
        const UnitGradient<S> d = items[k].step(now[k], product[k][0]);
        FUSEDRNN_UNROLL
        for (int gate = 0; gate < kGates; ++gate) weights.publish(i, k, gate, d.dgates[gate]);
        items[k].put_away(part(), i, now[k], d);
        if (i + 1 < steps) now[k] = items[k].given(part(), i + 1);
      }
      weights.run(i, i % 2);
      block.sync();
      FUSEDRNN_UNROLL
      for (int k = 0; k < kItems; ++k) weights.add_up(i % 2, k, product[k]);
    }
    FUSEDRNN_UNROLL
    for (int k = 0; k < kItems; ++k) items[k].finish(p, product[k][0]);
  }
};

FUSEDRNN_ISA_END
