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
  PartForward<E> p;
  Exchange exchange;

  FUSEDRNN_D void operator()(const Block& block) const {
    const PersistentShare<kUnits, kRows> share(block, p.hidden, exchange);
    const Weights weights(block, share, p.w_hh, exchange, p.part.order.batch);
    Unit items[kItems];
    FUSEDRNN_UNROLL
    for (int k = 0; k < kItems; ++k) {
      items[k] = Unit(p, share.row(k), share.unit(), share.works());
      weights.publish(0, k, 0, items[k].h());
    }
    const int64_t steps = p.part.end - p.part.begin;
    for (int64_t i = 0; i < steps; ++i) {
      typename Unit::Given now[kItems];
      FUSEDRNN_UNROLL
      for (int k = 0; k < kItems; ++k) now[k] = items[k].given(p, i);
      weights.run(i, i % 2);
      block.sync();
      // Loaded at every step: registers are what is scarce, and they are in the first cache.
      const UnitBiases<kCell, E> biases(p, share.unit());
      FUSEDRNN_UNROLL
      for (int k = 0; k < kItems; ++k) {
        S product[Unit::kGates];
        weights.add_up(i % 2, k, product);
        const UnitStep<S> step = items[k].step(now[k], biases, product);
        if (i + 1 < steps) weights.publish(i + 1, k, 0, items[k].h());
        items[k].put_away(p, i, now[k], step);
      }
    }
    FUSEDRNN_UNROLL
    for (int k = 0; k < kItems; ++k) items[k].finish(p);
  }
};

FUSEDRNN_ISA_END
