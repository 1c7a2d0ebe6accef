// One step of the tangents: its product, and the cells' equations with dual numbers.
#pragma once

#include "cell_math.h"
#include "cpu/formats_inl.h"
#include "cpu/pack_inl.h"
#include "dual.h"

FUSEDRNN_ISA_BEGIN

// A vector of hidden units of one row: `left` of them, or as many as it holds, from `unit` on.
template <class S>
struct TangentUnits {
  const TangentStep<S>& step;
  int64_t row, unit, left;

  using V = Vec<S>;
  FUSEDRNN_HD V at(const S* row_begin) const { return load(row_begin + unit, left); }
  FUSEDRNN_HD V saved(int block) const { return at(step.gates[row] + block * step.gates_block); }
  FUSEDRNN_HD V sum(int block) const { return at(step.sums[row] + block * step.hidden); }
  template <class T>
  FUSEDRNN_HD Dual<V> dual(const DualRows<T>& rows) const {
    return {at(rows.value[row]), at(rows.tangent[row])};
  }
  FUSEDRNN_HD void put(const StridedRows<S>& rows, V v, int block = 0) const {
    store(rows[row] + block * step.hidden + unit, v, left);
  }
  FUSEDRNN_HD void put(const DualRows<S>& rows, const Dual<V>& v, int block = 0) const {
    put(rows.value, v.value, block);
    put(rows.tangent, v.tangent, block);
  }

  FUSEDRNN_HD LstmGates<Dual<V>> lstm_gates() const {
    return {sigmoid_at(saved(0), sum(0)), sigmoid_at(saved(1), sum(1)), tanh_at(saved(2), sum(2)),
            sigmoid_at(saved(3), sum(3))};
  }
};

// r, z, n, W_hn h + b_hn of a GRU.
template <class V>
struct GruDuals {
  Dual<V> r, z, n, a_hn;
};

template <class S>
FUSEDRNN_HD GruDuals<Vec<S>> gru_duals(const TangentUnits<S>& u) {
  GruDuals<Vec<S>> d;
  d.r = sigmoid_at(u.saved(0), u.sum(0));
  d.z = sigmoid_at(u.saved(1), u.sum(1));
  d.a_hn = {u.saved(3), u.sum(2)};
  const Dual<Vec<S>> a_in = {Vec<S>{}, u.sum(3)};  // its value does not matter
  d.n = tanh_at(u.saved(2), gru_sum(a_in, d.r, d.a_hn).tangent);
  return d;
}

template <class S, class Visit>
FUSEDRNN_HD void for_each_unit(const TangentStep<S>& step, Visit f) {
  for (int64_t row = 0; row < step.rows; ++row) {
    for (int64_t unit = 0; unit < step.hidden; unit += kLanes<S>) {
      f(TangentUnits<S>{step, row, unit, step.hidden - unit});
    }
  }
}

template <Cell kCell, class S>
void tangents_forward(const TangentStep<S>& step) {
  using V = Vec<S>;
  for_each_unit(step, [&](const TangentUnits<S>& u) __attribute__((always_inline)) {
    if constexpr (kCell == Cell::kLstm) {
      const LstmGates<Dual<V>> gates = u.lstm_gates();
      const Dual<V> c = {u.at(step.c[u.row]),
                         lstm_cell_state(gates, u.dual(step.entering)).tangent};
      u.put(step.c_tangent, c.tangent);
      u.put(step.h_tangent, lstm_output(gates.o, c).tangent);
    } else if constexpr (kCell == Cell::kGru) {
      const GruDuals<V> d = gru_duals(u);
      u.put(step.h_tangent, gru_output(d.n, d.z, u.dual(step.entering)).tangent);
    } else {
      u.put(step.h_tangent, RnnActivation<kCell>::backward(u.at(step.h[u.row]), u.sum(0)));
    }
  });
}

template <Cell kCell, class S>
void tangents_backward(const TangentStepBack<S>& back) {
  using V = Vec<S>;
  const TangentStep<S>& step = back.step;
  for_each_unit(step, [&](const TangentUnits<S>& u) __attribute__((always_inline)) {
    const Dual<V> dh = u.dual(back.dh);
    if constexpr (kCell == Cell::kLstm) {
      const Dual<V> c = {u.at(step.c[u.row]), u.at(step.c_tangent[u.row])};
      const LstmGradient<Dual<V>> d =
          lstm_backward(u.lstm_gates(), u.dual(step.entering), c, dh, u.dual(back.carry));
      u.put(back.dgates, d.dgates.i, 0);
      u.put(back.dgates, d.dgates.f, 1);
      u.put(back.dgates, d.dgates.g, 2);
      u.put(back.dgates, d.dgates.o, 3);
      u.put(back.carry, d.dc_prev);
    } else if constexpr (kCell == Cell::kGru) {
      const GruDuals<V> g = gru_duals(u);
      const GruGradient<Dual<V>> d = gru_backward(g.r, g.z, g.n, g.a_hn, u.dual(step.entering), dh);
      u.put(back.dgates, d.da_r, 0);
      u.put(back.dgates, d.da_z, 1);
      u.put(back.dgates, d.da_hn, 2);
      u.put(back.dgates, d.da_in, 3);
      u.put(back.carry, d.dh_prev);
    } else {
      const V h = u.at(step.h[u.row]);
      if constexpr (kCell == Cell::kRnnTanh) {
        u.put(back.dgates, Tanh::backward(Dual<V>{h, u.at(step.h_tangent[u.row])}, dh));
      } else {
        // Its slope is constant but at zero, where torch has none either.
        u.put(back.dgates, {Relu::backward(h, dh.value), Relu::backward(h, dh.tangent)});
      }
    }
  });
}

// Panels of w (rows, columns) for a product with it, or, transposed, with its transpose.
template <class S>
void tangents_pack(S* packed, const S* w, int64_t rows, int64_t columns, bool transposed) {
  static_assert(UnitPanel<1>::vectors == kTangentVectors);
  if (transposed) {
    const Range panels = {0, panel_count<S>(rows, kTangentVectors)};
    pack_by_unit<1>(packed, w, rows, columns, panels, 0, columns);
  } else {
    const Range panels = {0, panel_count<S>(columns, kTangentVectors)};
    pack_by_column<kTangentVectors, Exact<S>>(packed, columns, rows, {0, rows}, panels,
                                              [&](int64_t i) { return w + i * columns; });
  }
}

template <class S>
void tangents_product(const TangentProduct<S>& given) {
  const TangentProduct<S> p = given;
  constexpr int64_t width = kTangentVectors * kLanes<S>;
  product<Exact<S>, kTangentVectors>(
      {0, p.rows}, {p.panel_begin, p.panel_end}, [&](int64_t row) { return p.a[row]; }, p.packed,
      p.k * width, p.k,
      [&](auto& tile, int64_t row, int64_t panel) {
        constexpr int rows = sizeof(tile.sum) / sizeof(tile.sum[0]);
        constexpr int vectors = sizeof(tile.sum[0]) / sizeof(tile.sum[0][0]);
        for (int r = 0; r < rows; ++r) {
          S* out = p.out[row + r];
          for (int v = 0; v < vectors; ++v) {
            const int64_t column = panel * width + v * kLanes<S>, left = p.columns - column;
            Vec<S> sum = tile.sum[r][v];
            if (p.add) sum += load(out + column, left);
            store(out + column, sum, left);
          }
        }
      });
}

FUSEDRNN_ISA_END
