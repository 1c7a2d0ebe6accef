// The kernels of back-propagation: what one thread does for one row of the batch and one unit.
// As in forward.cuh, threads never meet.
#pragma once

#include "cell_math.h"
#include "cuda/steps.h"

FUSEDRNN_ISA_BEGIN

// A value of the state that entered `step`: zero at the start of a segment, else the step before's
// or the initial one (null: zeros).
template <class V, class E>
FUSEDRNN_HD Arithmetic<E> entering(const Step& step, int64_t row, const V* before, int64_t stride,
                                   const E* initial, int64_t width, int64_t unit) {
  using S = Arithmetic<E>;
  if (step.is_cut_before(row)) return S(0);
  if (step.continues(row)) return load(before + row * stride + unit);
  return initial == nullptr ? S(0) : load(initial + row * width + unit);
}

// What the steps after hand back for the state that left this step.
template <class E>
FUSEDRNN_HD Arithmetic<E> carried(const CarriedGradient<E>& carry, int64_t row, int64_t at) {
  return carry.direct[at] + (row < carry.product_rows ? carry.product[at] : 0);
}
template <class E>
FUSEDRNN_HD Arithmetic<E> left(const Step& step, const CarriedGradient<E>& carry, int64_t row,
                               int64_t at) {
  return step.is_cut_after(row) ? Arithmetic<E>(0) : carried(carry, row, at);
}

template <Cell kCell, class E>
struct BackwardBody {
  using S = Arithmetic<E>;
  static constexpr int kBlocks = gradient_blocks(kCell).count;
  BackwardStep<E> p;

  FUSEDRNN_HD void operator()(int64_t row, int64_t unit) const {
    const int64_t at = row * p.hidden + unit;
    const bool projected = p.dh_hidden != nullptr;
    if (!p.step.has(row)) {
      if (!projected) p.carry.direct[at] = carried(p.carry, row, at);
      if (row < p.step.rows) pad(at, row, unit);
      return;
    }
    S dh = projected ? p.dh_hidden[at] : left(p.step, p.carry, row, at);
    if (!projected && p.dy != nullptr) dh += load(p.dy + row * p.y_stride + unit);
    S direct = S(0);
    if constexpr (kCell == Cell::kLstm) {
      const LstmGates<S> gates = {saved(row, unit, 0), saved(row, unit, 1), saved(row, unit, 2),
                                  saved(row, unit, 3)};
      const S dc = p.step.is_cut_after(row) ? S(0) : p.dc[at];
      const S c_prev = entering(p.step, row, p.cells_before, p.cells_stride, p.c0, p.hidden, unit);
      const LstmGradient<S> d =
          lstm_backward<S>(gates, c_prev, p.cells[row * p.cells_stride + unit], dh, dc);
      put(row, unit, 0, d.dgates.i);
      put(row, unit, 1, d.dgates.f);
      put(row, unit, 2, d.dgates.g);
      put(row, unit, 3, d.dgates.o);
      p.dc[at] = d.dc_prev;
      if (p.h_tilde != nullptr) store(p.h_tilde + at, d.h_tilde);
    } else if constexpr (kCell == Cell::kGru) {
      const GruGradient<S> d =
          gru_backward<S>(saved(row, unit, 0), saved(row, unit, 1), saved(row, unit, 2),
                          saved(row, unit, 3), h_prev(row, unit), dh);
      put(row, unit, 0, d.dh_n);  // the order of gradient_blocks
      put(row, unit, 1, d.da_r);
      put(row, unit, 2, d.da_z);
      put(row, unit, 3, d.dx_n);
      direct = d.dh_prev;
    } else {
      using Activation = std::conditional_t<kCell == Cell::kRnnTanh, Tanh, Relu>;
      put(row, unit, 0, Activation::backward(S(load(p.y + row * p.y_stride + unit)), dh));
    }
    if (!projected) p.carry.direct[at] = direct;
    if (p.previous != nullptr) store(p.previous + at, h_prev(row, unit));
  }

 private:
  FUSEDRNN_HD S h_prev(int64_t row, int64_t unit) const {
    return entering(p.step, row, p.y_before, p.y_stride, p.h0, p.hidden, unit);
  }
  FUSEDRNN_HD S saved(int64_t row, int64_t unit, int block) const {
    return load(p.gates + row * p.gates_stride + block * p.hidden_padded + unit);
  }
  FUSEDRNN_HD void put(int64_t row, int64_t unit, int block, S value) const {
    store(p.dgates + (row * kBlocks + block) * p.hidden + unit, value);
  }
  FUSEDRNN_HD void pad(int64_t at, int64_t row, int64_t unit) const {
    for (int block = 0; block < kBlocks; ++block) put(row, unit, block, S(0));
    if (p.previous != nullptr) store(p.previous + at, S(0));
    if (p.h_tilde != nullptr) store(p.h_tilde + at, S(0));
  }
};

template <class E>
struct ProjectedBackwardBody {
  using S = Arithmetic<E>;
  ProjectedBackwardStep<E> p;

  FUSEDRNN_HD void operator()(int64_t row, int64_t unit) const {
    const int64_t at = row * p.output + unit;
    const bool valid = p.step.has(row);
    if (valid) {
      S dh = left(p.step, p.carry, row, at);
      if (p.dy != nullptr) dh += load(p.dy + row * p.y_stride + unit);
      store(p.dh + at, dh);
      p.carry.direct[at] = S(0);
    } else {
      p.carry.direct[at] = carried(p.carry, row, at);
      if (row < p.step.rows) store(p.dh + at, S(0));
    }
    if (p.previous == nullptr || row >= p.step.rows) return;
    store(p.previous + at,
          valid ? entering(p.step, row, p.y_before, p.y_stride, p.h0, p.output, unit) : S(0));
  }
};

template <class E>
struct InitialGradientBody {
  InitialGradient<E> p;

  FUSEDRNN_HD void operator()(int64_t row, int64_t unit) const {
    const int64_t at = row * p.width + unit;
    const bool cut = p.first.is_cut_before(row);
    store(p.to + at, cut ? Arithmetic<E>(0) : carried(p.carry, row, at));
  }
};

template <class E>
struct ValidRowsBody {
  ValidRows<E> p;

  FUSEDRNN_HD void operator()(int64_t row, int64_t unit) const {
    const bool valid = p.begin + row / p.batch < p.lengths[row % p.batch];
    const int64_t at = row * p.width + unit;
    p.to[at] = valid ? p.from[at] : E{};
  }
};

FUSEDRNN_ISA_END
