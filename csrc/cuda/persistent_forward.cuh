// The forward recurrence of many steps in one kernel whose CTAs share W_hh out and exchange h.
#pragma once

#include "cuda/persistent_product.cuh"
#include "cuda/unit_forward.cuh"

FUSEDRNN_ISA_BEGIN

// All CTAs must be resident together.
template <Cell kCell, class E, Precision kPrecision, int kUnits, int kDepths, int kRows>
struct PersistentForwardBody {
  using S = Arithmetic<E>;
  using Unit = UnitForward<kCell, E>;
  using Weights = PersistentProduct<E, kPrecision, Unit::kGates, 1, kUnits, kDepths, kRows, 10>;
  static constexpr int kThreads = kPersistentThreads;
  static constexpr int kSharedBytes = Weights::kSharedBytes;
  static constexpr int kItems = PersistentShare<kUnits, kRows>::kItems;
  SideBySide<PartForward<E>> sides;
  int64_t blocks_each;
  Exchange exchange;

  FUSEDRNN_D void operator()(const Block& block) const {
    const Side side(block.index(), blocks_each);
    const PartForward<E>& either = sides.part[0];  // for what both have alike
    // Asked for anew at each step, or the compiler would keep what is the same at all of them in
    // registers, which are what is scarce.
    const auto part = [&]() -> const PartForward<E>& {
      return sides.part[block.unknown(side.which)];
    };
    const PartForward<E>& p = part();
    const PersistentShare<kUnits, kRows> share(block.thread(), side.index, either.hidden, exchange);
    const Weights weights(block, share, p.w_hh, exchange.words[side.which],
                          either.part.order.batch);
    Unit items[kItems];
    FUSEDRNN_UNROLL
    for (int k = 0; k < kItems; ++k) {
      items[k] = Unit(p, share.row(k), share.unit(), share.works());
      weights.publish(0, k, 0, items[k].h());
    }
    const int steps = static_cast<int>(p.part.end - p.part.begin);
    for (int i = 0; i < steps; ++i) {
      typename Unit::Given now[kItems];
      FUSEDRNN_UNROLL
      for (int k = 0; k < kItems; ++k) now[k] = items[k].given(part(), i);
      weights.run(i, i % 2);
      block.sync();
      // Loaded at every step for the same reason: they are in the first cache.
      const UnitBiases<kCell, E> biases(part(), share.unit());
      FUSEDRNN_UNROLL
      for (int k = 0; k < kItems; ++k) {
        S product[Unit::kGates];
        weights.add_up(i % 2, k, product);
        const UnitStep<S> step = items[k].step(now[k], biases, product);
        if (i + 1 < steps) weights.publish(i + 1, k, 0, items[k].h());
        items[k].put_away(part(), i, now[k], step);
      }
    }
    FUSEDRNN_UNROLL
    for (int k = 0; k < kItems; ++k) items[k].finish(p);
  }
};

FUSEDRNN_ISA_END
