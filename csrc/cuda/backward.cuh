// The kernels of back-propagation: what one thread does for one row of the batch and one unit.
// As in forward.cuh, threads never meet.
#pragma once

#include "cell_math.h"
#include "cuda/steps.h"

FUSEDRNN_ISA_BEGIN

// A value of the state that entered `step`: zero at the start of a segment, else the step before's
// or the initial one (null: zeros).
template <class V, class E>
FUSEDRNN_HD Arithmetic<E> entering(const Step& step, int64_t row, const V* states, int64_t stride,
                                   const E* initial, int64_t width, int64_t unit) {
  using S = Arithmetic<E>;
  if (step.is_cut_before(row)) return S(0);
  if (step.continues(row)) return load(states + (step.before.first + row) * stride + unit);
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

// What back-propagation reads of one unit of one row.
template <class S>
struct SavedUnit {
  S gates[4];
  S c, c_prev;  // LSTM
  S h;          // RNN
  S h_prev;     // of a GRU, or where it is asked for
  S dy;         // zero where there is none
};

template <Cell kCell, class E, class S = Arithmetic<E>>
FUSEDRNN_HD SavedUnit<S> saved_unit(const ForwardSaved<E>& from, const Step& step, int64_t row,
                                    int64_t unit, bool with_h_prev) {
  constexpr bool lstm = kCell == Cell::kLstm, gru = kCell == Cell::kGru;
  SavedUnit<S> s{};
  const int64_t at = step.now.first + row;
  if constexpr (lstm || gru) {
    const E* gates = from.gates + at * from.gates_stride + unit;
    for (int block = 0; block < 4; ++block)
      s.gates[block] = load(gates + block * from.hidden_padded);
  }
  if constexpr (lstm) {
    s.c = from.cells[at * from.cells_stride + unit];
    s.c_prev = entering(step, row, from.cells, from.cells_stride, from.c0, from.hidden, unit);
  }
  if constexpr (!lstm && !gru) s.h = load(from.y + at * from.y_stride + unit);
  if (with_h_prev || gru) {
    s.h_prev = entering(step, row, from.y, from.y_stride, from.h0, from.hidden, unit);
  }
  if (from.dy != nullptr) s.dy = load(from.dy + at * from.y_stride + unit);
  return s;
}

// The gradients of one unit of one row.
template <class S>
struct UnitGradient {
  S dgates[4];  // the order of gradient_blocks
  S direct;     // of the h that entered, the share that does not pass through W_hh
  S dc;         // of the c that entered, LSTM
  S h_tilde;    // o tanh(c), LSTM
};

// dh, dc: gradients of what left the step.
template <Cell kCell, class S>
FUSEDRNN_HD UnitGradient<S> backward_unit(const SavedUnit<S>& s, S dh, S dc) {
  if constexpr (kCell == Cell::kLstm) {
    const LstmGates<S> gates = {s.gates[0], s.gates[1], s.gates[2], s.gates[3]};
    const LstmGradient<S> d = lstm_backward<S>(gates, s.c_prev, s.c, dh, dc);
    return {{d.dgates.i, d.dgates.f, d.dgates.g, d.dgates.o}, S(0), d.dc_prev, d.h_tilde};
  } else if constexpr (kCell == Cell::kGru) {
    const GruGradient<S> d =
        gru_backward<S>(s.gates[0], s.gates[1], s.gates[2], s.gates[3], s.h_prev, dh);
    return {{d.da_hn, d.da_r, d.da_z, d.da_in}, d.dh_prev, S(0), S(0)};
  } else {
    return {{RnnActivation<kCell>::backward(s.h, dh)}, S(0), S(0), S(0)};
  }
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
      if (row < p.step.now.count) put(row, unit, {}, S(0));
      return;
    }
    const SavedUnit<S> s = saved_unit<kCell>(p.saved, p.step, row, unit, p.previous != nullptr);
    const S dh = projected ? p.dh_hidden[at] : left(p.step, p.carry, row, at) + s.dy;
    const S dc = p.dc == nullptr || p.step.is_cut_after(row) ? S(0) : p.dc[at];
    const UnitGradient<S> d = backward_unit<kCell>(s, dh, dc);
    put(row, unit, d, s.h_prev);
    if (p.dc != nullptr) p.dc[at] = d.dc;
    if (!projected) p.carry.direct[at] = d.direct;
  }

 private:
  FUSEDRNN_HD void put(int64_t row, int64_t unit, const UnitGradient<S>& d, S h_prev) const {
    for (int block = 0; block < kBlocks; ++block) {
      store(p.dgates + (row * kBlocks + block) * p.hidden + unit, d.dgates[block]);
    }
    if (p.previous != nullptr) store(p.previous + row * p.hidden + unit, h_prev);
    if (p.h_tilde != nullptr) store(p.h_tilde + row * p.hidden + unit, d.h_tilde);
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
      if (p.dy != nullptr) dh += load(p.dy + (p.step.now.first + row) * p.y_stride + unit);
      store(p.dh + at, dh);
      p.carry.direct[at] = S(0);
    } else {
      p.carry.direct[at] = carried(p.carry, row, at);
      if (row < p.step.now.count) store(p.dh + at, S(0));
    }
    if (p.previous == nullptr || row >= p.step.now.count) return;
    store(p.previous + at,
          valid ? entering(p.step, row, p.y, p.y_stride, p.h0, p.output, unit) : S(0));
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
