// The forward recurrence of many steps in one kernel: a CTA has a few rows of the batch, all units
// and all of W_hh, so that no CTA waits for another.
#pragma once

#include "cuda/forward.cuh"
#include "cuda/one_cta_product.cuh"

FUSEDRNN_ISA_BEGIN

// A thread is one row and one unit. While a step is computed, what the next one needs from memory
// is on its way.
template <Cell kCell, class E, int kUnits>
struct OneCtaForwardBody {
  using S = Arithmetic<E>;
  static constexpr int kGates = gate_blocks(kCell);
  using Weights = Product<E, kGates, 1, kUnits>;
  static constexpr int kThreads = Weights::kThreads;
  static constexpr int kRows = Weights::kRows;
  static constexpr int kSharedBytes = Weights::kSharedBytes;
  OneCtaForward<E> p;

  FUSEDRNN_D void operator()(const Block& block) const {
    const Weights weights(block, p.w_hh);
    const int64_t row = block.index() * kRows + weights.row();
    const int unit = weights.unit();
    const bool mine = weights.is_owner() && row < p.part.order.batch && unit < p.hidden;
    const int64_t at = row * p.hidden + unit;
    S b_ih[kGates] = {}, b_hh[kGates] = {};
    if (mine && p.b_ih != nullptr) {
      FUSEDRNN_UNROLL
      for (int gate = 0; gate < kGates; ++gate) {
        b_ih[gate] = load(p.b_ih + gate * p.hidden + unit);
        b_hh[gate] = load(p.b_hh + gate * p.hidden + unit);
      }
    }
    UnitState<S> s = {mine ? load(p.h + at) : S(0), mine && p.state ? p.state[at] : S(0)};
    weights.put(0, 0, s.h);
    const int64_t steps = p.part.end - p.part.begin;
    Given next = given(mine, row, unit, 0);
    for (int64_t i = 0; i < steps; ++i) {
      const Given now = next;
      block.sync();
      if (i + 1 < steps) next = given(mine, row, unit, i + 1);
      S hidden[kGates];
      weights.run(i % 2, hidden);
      if (now.has) {
        S input[kGates];
        FUSEDRNN_UNROLL
        for (int gate = 0; gate < kGates; ++gate) {
          input[gate] = now.input[gate] + b_ih[gate];
          hidden[gate] += b_hh[gate];
        }
        forward_unit<kCell>(p.results, now.row, unit, input, hidden, s);
        store(p.results.y + now.row * p.results.y_stride + unit, s.h);
        if (now.is_cut) s = {S(0), S(0)};
      } else if (now.is_padding) {
        pad(p.results, now.row, unit);
      }
      weights.put((i + 1) % 2, 0, s.h);
    }
    if (!mine) return;
    store(p.h + at, s.h);
    if (p.state != nullptr) p.state[at] = s.state;
  }

 private:
  // What memory holds for a step.
  struct Given {
    bool has;         // the step is a valid one of the row
    bool is_padding;  // it is not, but has a place
    bool is_cut;      // the state does not reach the next step
    int64_t row;      // of the results
    S input[kGates];  // W_ih x
  };

  FUSEDRNN_D Given given(bool mine, int64_t row, int unit, int64_t i) const {
    const Step step = p.part.step(p.part.walked(i));
    Given g{};
    if (!mine || row >= step.now.count) return g;
    g.has = step.has(row);
    g.is_padding = !g.has;
    g.row = step.now.first + row;
    if (!g.has) return g;
    g.is_cut = step.is_cut_after(row);
    const S* input = p.input_gates + (g.row - p.part.first_row[0]) * kGates * p.hidden + unit;
    FUSEDRNN_UNROLL
    for (int gate = 0; gate < kGates; ++gate) g.input[gate] = input[gate * p.hidden];
    return g;
  }
};

FUSEDRNN_ISA_END
