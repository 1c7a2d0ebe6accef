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

template <Cell kCell, class E>
struct ForwardBody {
  using S = Arithmetic<E>;
  static constexpr int kGates = gate_blocks(kCell);
  ForwardStep<E> p;

  FUSEDRNN_HD void operator()(int64_t row, int64_t unit) const {
    if (!p.step.has(row)) {
      pad(row, unit);
      return;
    }
    const int64_t at = row * p.hidden + unit;
    if constexpr (kCell == Cell::kLstm) {
      const LstmState<S> s = lstm_state<S>(
          {sum(row, unit, 0), sum(row, unit, 1), sum(row, unit, 2), sum(row, unit, 3)},
          p.state[at]);
      const S h = lstm_output(s.gates.o, s.c);
      save(row, unit, s.gates.i, s.gates.f, s.gates.g, s.gates.o);
      if (p.cells != nullptr) p.cells[row * p.cells_stride + unit] = s.c;
      p.state[at] = p.step.is_cut_after(row) ? S(0) : s.c;
      if (p.h_tilde != nullptr) {
        store(p.h_tilde + at, h);
      } else {
        leave(row, unit, h);
      }
    } else if constexpr (kCell == Cell::kGru) {
      const S h_n = hidden_side(row, unit, 2);
      const GruGates<S> a =
          gru_gates(sum(row, unit, 0), sum(row, unit, 1), input_side(row, unit, 2), h_n);
      const GruState<S> s = gru_state(a.a_n, a.z, p.state[at]);
      save(row, unit, a.r, a.z, s.n, h_n);
      p.state[at] = p.step.is_cut_after(row) ? S(0) : s.h;
      leave(row, unit, s.h);
    } else {
      using Activation = std::conditional_t<kCell == Cell::kRnnTanh, Tanh, Relu>;
      leave(row, unit, Activation::forward(sum(row, unit, 0)));
    }
  }

 private:
  FUSEDRNN_HD S with_bias(const S* gates, const E* bias, int64_t row, int64_t unit,
                          int block) const {
    const int64_t column = block * p.hidden + unit;
    const S a = gates[row * kGates * p.hidden + column];
    return bias == nullptr ? a : a + load(bias + column);
  }
  FUSEDRNN_HD S input_side(int64_t row, int64_t unit, int block) const {
    return with_bias(p.input_gates, p.b_ih, row, unit, block);
  }
  FUSEDRNN_HD S hidden_side(int64_t row, int64_t unit, int block) const {
    return with_bias(p.hidden_gates, p.b_hh, row, unit, block);
  }
  FUSEDRNN_HD S sum(int64_t row, int64_t unit, int block) const {
    return input_side(row, unit, block) + hidden_side(row, unit, block);
  }

  FUSEDRNN_HD void save(int64_t row, int64_t unit, S first, S second, S third, S fourth) const {
    if (p.gates == nullptr) return;
    E* to = p.gates + row * p.gates_stride + unit;
    store(to, first);
    store(to + p.hidden_padded, second);
    store(to + 2 * p.hidden_padded, third);
    store(to + 3 * p.hidden_padded, fourth);
  }

  FUSEDRNN_HD void leave(int64_t row, int64_t unit, S h) const {
    store(p.y + row * p.y_stride + unit, h);
    store(p.h + row * p.hidden + unit, p.step.is_cut_after(row) ? S(0) : h);
  }

  // What a row without this step gives: the same at every call.
  FUSEDRNN_HD void pad(int64_t row, int64_t unit) const {
    if (p.y != nullptr) store(p.y + row * p.y_stride + unit, S(0));
    save(row, unit, S(0), S(0), S(0), S(0));
    if (p.cells != nullptr) p.cells[row * p.cells_stride + unit] = S(0);
  }
};

template <class E>
struct ProjectedBody {
  ProjectedStep<E> p;

  FUSEDRNN_HD void operator()(int64_t row, int64_t unit) const {
    using S = Arithmetic<E>;
    const int64_t at = row * p.output + unit;
    E* y = p.y + row * p.y_stride + unit;
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
