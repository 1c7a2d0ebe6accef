// Back-propagation through many steps in one kernel, as one_cta_forward.cuh goes forward.
#pragma once

#include "cuda/backward.cuh"
#include "cuda/one_cta_product.cuh"

FUSEDRNN_ISA_BEGIN

template <Cell kCell, class E, int kUnits>
struct OneCtaBackwardBody {
  using S = Arithmetic<E>;
  static constexpr GradientBlocks kBlocks = gradient_blocks(kCell);
  using Weights = Product<E, 1, kBlocks.gates, kUnits>;
  static constexpr int kThreads = Weights::kThreads;
  static constexpr int kRows = Weights::kRows;
  static constexpr int kSharedBytes = Weights::kSharedBytes;
  OneCtaBackward<E> p;

  FUSEDRNN_D void operator()(const Block& block) const {
    const Weights weights(block, p.w_hh);
    const int64_t row = block.index() * kRows + weights.row();
    const int unit = weights.unit();
    const bool mine = weights.is_owner() && row < p.part.order.batch && unit < p.hidden;
    const int64_t at = row * p.hidden + unit;
    S direct = mine ? p.direct[at] : S(0), dc = mine && p.dc ? p.dc[at] : S(0);
    S product[1] = {S(0)};
    const int64_t steps = p.part.end - p.part.begin;
    Given next = given(mine, row, unit, 0);
    for (int64_t i = 0; i < steps; ++i) {
      const Given now = next;
      if (i + 1 < steps) next = given(mine, row, unit, i + 1);
      const S carried = direct + product[0];
      UnitGradient<S> d{};
      if (now.has) {
        d = backward_unit<kCell>(now.saved, (now.is_cut ? S(0) : carried) + now.saved.dy,
                                 now.is_cut ? S(0) : dc);
        direct = d.direct;
        dc = d.dc;
      } else {
        direct = carried;
      }
      if (now.has || now.is_padding) put(now, unit, d);
      FUSEDRNN_UNROLL
      for (int gate = 0; gate < kBlocks.gates; ++gate) weights.put(i % 2, gate, d.dgates[gate]);
      block.sync();
      weights.run(i % 2, product);
    }
    if (!mine) return;
    p.direct[at] = direct + product[0];
    if (p.dc != nullptr) p.dc[at] = dc;
  }

 private:
  // What memory holds for a step, as in the forward kernel.
  struct Given {
    bool has, is_padding;
    bool is_cut;  // the next step does not begin with the state that leaves this one
    int64_t row;  // of the part
    SavedUnit<S> saved;
  };

  FUSEDRNN_D Given given(bool mine, int64_t row, int unit, int64_t i) const {
    const Step step = p.part.step(p.part.walked_back(i));
    Given g{};
    if (!mine || row >= step.now.count) return g;
    g.has = step.has(row);
    g.is_padding = !g.has;
    g.row = step.now.first - p.part.first_row[0] + row;
    if (!g.has) return g;
    g.is_cut = step.is_cut_after(row);
    g.saved = saved_unit<kCell>(p.saved, step, row, unit, p.previous != nullptr);
    return g;
  }

  FUSEDRNN_D void put(const Given& now, int unit, const UnitGradient<S>& d) const {
    FUSEDRNN_UNROLL
    for (int block = 0; block < kBlocks.count; ++block) {
      store(p.dgates + (now.row * kBlocks.count + block) * p.hidden + unit, d.dgates[block]);
    }
    if (p.previous != nullptr) store(p.previous + now.row * p.hidden + unit, now.saved.h_prev);
  }
};

FUSEDRNN_ISA_END
