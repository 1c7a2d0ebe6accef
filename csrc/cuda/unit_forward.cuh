// One row of the batch and one unit as a thread takes them through a part of time: the forward
// recurrence of the kernels that keep W_hh. How W_hh h comes to the thread is theirs.
#pragma once

#include "cuda/block.cuh"
#include "cuda/forward.cuh"
#include "cuda/step_of_row.cuh"

FUSEDRNN_ISA_BEGIN

// The biases of one unit; sums of both sides' where the equations allow it.
template <Cell kCell, class E>
class UnitBiases {
 public:
  using S = Arithmetic<E>;
  static constexpr int kGates = gate_blocks(kCell);

  // Zeros where there are none.
  FUSEDRNN_D UnitBiases(const PartForward<E>& p, int unit) {
    if (unit >= p.hidden || p.b_ih == nullptr) return;
    FUSEDRNN_UNROLL
    for (int gate = 0; gate < kGates; ++gate) {
      input_[gate] = load(p.b_ih + gate * p.hidden + unit);
      const S hidden = load(p.b_hh + gate * p.hidden + unit);
      if (kCell == Cell::kGru && gate == 2) {
        hidden_n_ = hidden;
      } else {
        input_[gate] += hidden;
      }
    }
  }
  FUSEDRNN_D void add_to(S (&input)[kGates], S (&hidden)[kGates]) const {
    FUSEDRNN_UNROLL
    for (int gate = 0; gate < kGates; ++gate) input[gate] += input_[gate];
    if constexpr (kCell == Cell::kGru) hidden[2] += hidden_n_;
  }

 private:
  S input_[kGates] = {}, hidden_n_ = S(0);
};

template <Cell kCell, class E>
class UnitForward {
 public:
  using S = Arithmetic<E>;
  static constexpr int kGates = gate_blocks(kCell);

  // What memory holds for a step.
  struct Given {
    StepOfRow kind;
    S input[kGates];  // W_ih x
  };

  UnitForward() = default;
  // Where the thread is not the one that has this row and unit (!mine), all values are zeros.
  FUSEDRNN_D UnitForward(const PartForward<E>& p, int64_t row, int unit, bool mine)
      : row_(row), unit_(unit), mine_(mine && row < p.part.order.batch && unit < p.hidden) {
    const int64_t at = row * p.hidden + unit;
    if (mine_) s_ = {load(p.h + at), p.state != nullptr ? p.state[at] : S(0)};
  }

  // The h that enters the next step.
  FUSEDRNN_D S h() const { return s_.h; }

  FUSEDRNN_D Given given(const PartForward<E>& p, int64_t i) const {
    const Step step = p.part.step(p.part.walked(i));
    Given g{};
    if (mine_) g.kind = kind_of(step, row_);
    if (!is_valid(g.kind)) return g;
    const int64_t row = step.now.first - p.part.first + row_;
    const S* input = p.input_gates + row * kGates * p.hidden + unit_;
    FUSEDRNN_UNROLL
    for (int gate = 0; gate < kGates; ++gate) g.input[gate] = input[gate * p.hidden];
    return g;
  }

  // product: W_hh h. Returns what is to be put away.
  FUSEDRNN_D UnitStep<S> step(const Given& now, const UnitBiases<kCell, E>& biases,
                              const S (&product)[kGates]) {
    if (!is_valid(now.kind)) return {};
    S input[kGates], hidden[kGates];
    FUSEDRNN_UNROLL
    for (int gate = 0; gate < kGates; ++gate) {
      input[gate] = now.input[gate];
      hidden[gate] = product[gate];
    }
    biases.add_to(input, hidden);
    const UnitStep<S> step = forward_unit<kCell>(input, hidden, s_.state);
    s_ = now.kind == StepOfRow::kCut ? UnitState<S>{} : step.s;
    return step;
  }

  FUSEDRNN_D void put_away(const PartForward<E>& p, int64_t i, const Given& now,
                           const UnitStep<S>& step) const {
    if (now.kind == StepOfRow::kNone) return;
    put(p.results, p.part.rows(p.part.walked(i)).first + row_, unit_, step);
  }

  // The state that leaves the part.
  FUSEDRNN_D void finish(const PartForward<E>& p) const {
    if (!mine_) return;
    const int64_t at = row_ * p.hidden + unit_;
    store(p.h + at, s_.h);
    if (p.state != nullptr) p.state[at] = s_.state;
  }

 private:
  int64_t row_ = 0;
  int unit_ = 0;
  bool mine_ = false;
  UnitState<S> s_ = {S(0), S(0)};
};

FUSEDRNN_ISA_END
