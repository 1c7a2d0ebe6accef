// The forward kernels: what one thread does for one row of the batch and one unit.
//
// Threads never meet, so a host may run them one after another. Only the equations of cell_math.h
// compute anything; here values are fetched, masked and put away.
#pragma once

#include "cell_math.h"
#include "cuda/steps.h"

FUSEDRNN_ISA_BEGIN

template <class E>
struct InitialStateBody {
  InitialState<E> p;

  FUSEDRNN_HD void operator()(int64_t row, int64_t unit) const {
    using S = Arithmetic<E>;
    const int64_t at = row * p.width + unit;
    const bool zero = p.from == nullptr || p.first.is_cut_before(row);
    const S value = zero ? S(0) : load(p.from + at);
    if (p.kept != nullptr) store(p.kept + at, value);
    if (p.to != nullptr) p.to[at] = value;
  }
};

// The state of one unit of one row as it leaves a step.
template <class S>
struct UnitState {
  S h;
  S state;  // LSTM c, GRU h; the step's input too
};

// One unit of one row after a step.
template <class S>
struct UnitStep {
  S saved[4];  // the blocks of saved_blocks
  UnitState<S> s;
};

// `input` and `hidden` are W_ih x + b_ih and W_hh h + b_hh, gate by gate; `state` enters the step.
template <Cell kCell, class S>
FUSEDRNN_HD UnitStep<S> forward_unit(const S (&input)[gate_blocks(kCell)],
                                     const S (&hidden)[gate_blocks(kCell)], S state) {
  if constexpr (kCell == Cell::kLstm) {
    const LstmState<S> l = lstm_state<S>(
        {input[0] + hidden[0], input[1] + hidden[1], input[2] + hidden[2], input[3] + hidden[3]},
        state);
    return {{l.gates.i, l.gates.f, l.gates.g, l.gates.o}, {lstm_output(l.gates.o, l.c), l.c}};
  } else if constexpr (kCell == Cell::kGru) {
    const GruGates<S> a =
        gru_gates(input[0] + hidden[0], input[1] + hidden[1], input[2], hidden[2]);
    const GruState<S> g = gru_state(a.a_n, a.z, state);
    return {{a.r, a.z, g.n, hidden[2]}, {g.h, g.h}};
  } else {
    return {{}, {RnnActivation<kCell>::forward(input[0] + hidden[0]), S(0)}};
  }
}

// Puts a step away; `row` is one of the results. Zeros where a row has no step: the same at every
// call.
template <class E, class S>
FUSEDRNN_HD void put(const ForwardResults<E>& to, int64_t row, int64_t unit,
                     const UnitStep<S>& step) {
  if (to.y != nullptr) store(to.y + row * to.y_stride + unit, step.s.h);
  if (to.cells != nullptr) to.cells[row * to.cells_stride + unit] = step.s.state;
  if (to.gates == nullptr) return;
  E* gates = to.gates + row * to.gates_stride + unit;
  for (int block = 0; block < 4; ++block)
    store(gates + block * to.hidden_padded, step.saved[block]);
}

template <Cell kCell, class E>
struct ForwardBody {
  using S = Arithmetic<E>;
  static constexpr int kGates = gate_blocks(kCell);
  ForwardStep<E> p;

  FUSEDRNN_HD void operator()(int64_t row, int64_t unit) const {
    const int64_t to = p.step.now.first + row;
    if (!p.step.has(row)) {
      put(p.results, to, unit, UnitStep<S>{});
      return;
    }
    S input[kGates], hidden[kGates];
    for (int gate = 0; gate < kGates; ++gate) {
      input[gate] = with_bias(p.input_gates, p.b_ih, row, unit, gate);
      hidden[gate] = with_bias(p.hidden_gates, p.b_hh, row, unit, gate);
    }
    const int64_t at = row * p.hidden + unit;
    const UnitStep<S> step =
        forward_unit<kCell>(input, hidden, p.state == nullptr ? S(0) : p.state[at]);
    put(p.results, to, unit, step);
    const bool cut = p.step.is_cut_after(row);
    if (p.state != nullptr) p.state[at] = cut ? S(0) : step.s.state;
    if (p.h_tilde != nullptr) {
      store(p.h_tilde + at, step.s.h);
    } else {
      store(p.h + at, cut ? S(0) : step.s.h);
    }
  }

 private:
  FUSEDRNN_HD S with_bias(const S* gates, const E* bias, int64_t row, int64_t unit,
                          int gate) const {
    const int64_t column = gate * p.hidden + unit;
    const S a = gates[row * kGates * p.hidden + column];
    return bias == nullptr ? a : a + load(bias + column);
  }
};

template <class E>
struct ProjectedBody {
  ProjectedStep<E> p;

  FUSEDRNN_HD void operator()(int64_t row, int64_t unit) const {
    using S = Arithmetic<E>;
    const int64_t at = row * p.output + unit;
    E* y = p.y + (p.step.now.first + row) * p.y_stride + unit;
    if (!p.step.has(row)) {
      store(y, S(0));
      return;
    }
    const S h = p.projected[at];
    store(y, h);
    store(p.h + at, p.step.is_cut_after(row) ? S(0) : h);
  }
};

FUSEDRNN_ISA_END
