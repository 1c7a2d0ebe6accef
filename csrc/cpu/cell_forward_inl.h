// What a forward tile does with its sums: a cell's step for a vector of hidden units.
#pragma once

#include "cell_math.h"
#include "cpu/formats_inl.h"
#include "recurrence.h"

FUSEDRNN_ISA_BEGIN

// Adds the pre-activations' two halves, applies the cell, stores what the step leaves behind, in
// the two halves of cell_math.h. `at` is an offset into a padded row of hidden units.
template <Cell kCell, class S, class E>
struct CellForward {
  static constexpr int gates = gate_blocks(kCell);
  using V = Vec<S>;
  int64_t stride;  // from gate to gate
  bool save;
  const S* bias_hn;  // GRU
  using Row = ForwardRow<S, E>;
  // Between the halves: what the second one still has to activate, and the gate that scales it.
  struct Half {
    V inner, gate;
  };

  FUSEDRNN_HD Half begin(const V* sum, const Row& row, int64_t at) const {
    const S* g = row.gates + at;
    if constexpr (kCell == Cell::kLstm) {
      const LstmGates<V> a = {sum[0] + load(g), sum[1] + load(g + stride),
                              sum[2] + load(g + 2 * stride), sum[3] + load(g + 3 * stride)};
      const LstmState<V> s = lstm_state(a, load(row.c_prev + at));
      store(row.c + at, s.c);
      if (save) {
        store_blocks(row.saved + at, s.gates.i, s.gates.f, s.gates.g, s.gates.o);
        store(row.cells + at, s.c);
      }
      return {s.c, s.gates.o};
    } else if constexpr (kCell == Cell::kGru) {
      const V a_hn = sum[2] + load(bias_hn + at);
      const GruGates<V> s =
          gru_gates(sum[0] + load(g), sum[1] + load(g + stride), load(g + 2 * stride), a_hn);
      if (save) store_blocks(row.saved + at, s.r, s.z, s.a_n, a_hn);  // n takes the place of a_n
      return {s.a_n, s.z};
    } else {
      return {sum[0] + load(g), V{}};
    }
  }

  // The step's h.
  FUSEDRNN_HD V finish(const Half& half, const Row& row, int64_t at) const {
    if constexpr (kCell == Cell::kLstm) {
      return lstm_output(half.gate, half.inner);
    } else if constexpr (kCell == Cell::kGru) {
      const GruState<V> s = gru_state(half.inner, half.gate, load(row.h_prev + at));
      if (save) write(row.saved + at + 2 * stride, s.n);
      return s.h;
    } else {
      return RnnActivation<kCell>::forward(half.inner);
    }
  }

  FUSEDRNN_HD void store_blocks(E* g, Vec<S> v0, Vec<S> v1, Vec<S> v2, Vec<S> v3) const {
    write(g, v0);
    write(g + stride, v1);
    write(g + 2 * stride, v2);
    write(g + 3 * stride, v3);
  }
};

FUSEDRNN_ISA_END
