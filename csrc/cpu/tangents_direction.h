// One direction of a layer's tangents on the CPU: along the time axis, and back. What is parallel
// over time is one product of ATen's for the whole sequence; a step is a product and one kernel
// (cpu/tangents_inl.h).
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/isa.h"
#include "cpu/tangents_product.h"
#include "cpu/tangents_rows.h"
#include "cpu/walk.h"

namespace fusedrnn {

// One direction's parameters and their tangents.
struct DualWeights {
  DualTensor w_ih, w_hh, w_hr;
  at::Tensor b_ih, b_hh;  // tangents
};

// So many units of a step are worth a second thread.
inline constexpr int64_t kUnitsOfAThread = 2048;

// forward() first, then what it has found; backward(), if it `goes_back`, then the tangents of the
// gradients.
template <class S>
class TangentsOfDirection {
 public:
  TangentsOfDirection(const Isa& isa, const RowOrder& order, int index, const DualWeights& weights,
                      const DualTensor& x, const DualTensor& h0, const DualTensor& c0,
                      const at::Tensor& y, const at::Tensor& gates, const at::Tensor& cells,
                      bool goes_back)
      : isa_(isa),
        order_(order),
        layer_(order.layer),
        schedule_(order.schedule),
        kernels_(isa.table<S>()),
        reverse_(index == 1),
        reset_(order.reset_of(index)),
        hidden_(layer_.sizes.hidden),
        gates_width_(gate_blocks(layer_.cell) * hidden_),
        w_(weights),
        x_(x),
        h0_(h0),
        c0_(c0),
        y_(y),
        gates_(gates),
        cells_(cells) {
    const bool reads_h = layer_.cell == Cell::kGru || w_.w_hh.tangent.defined() || goes_back;
    if (reads_h) h_prev_ = previous(y, h0.value);
    if (has_cell_state(layer_.cell)) c_prev_ = previous(cells, c0.value);
  }

  // ---- along the time axis ----

  void forward() {
    const int64_t rows = order_.rows();
    sums_ = zeros({rows, gradient_blocks(layer_.cell).count * hidden_});
    add_known_sums();
    h_prev_tangent_ = empty({rows, layer_.sizes.output});
    h_tangent_ = empty({rows, layer_.sizes.output});
    if (has_cell_state(layer_.cell)) {
      c_prev_tangent_ = empty({rows, hidden_});
      c_tangent_ = empty({rows, hidden_});
    }
    h_tilde_tangent_ = h_tangent_;
    if (layer_.sizes.projected) {
      h_tilde_ = gates_.narrow(1, 3 * layer_.sizes.hidden_padded(), hidden_) * cells_.tanh();
      h_tilde_tangent_ = empty({rows, hidden_});
      if (w_.w_hr.tangent.defined()) {
        at::mm_out(h_tangent_, h_tilde_, w_.w_hr.tangent.t());
      } else {
        h_tangent_.zero_();
      }
    }
    const StepProduct<S> through_w_hh(isa_, w_.w_hh.value, true);
    StepProduct<S> through_w_hr;
    if (layer_.sizes.projected) through_w_hr = StepProduct<S>(isa_, w_.w_hr.value, true);
    for (int64_t i = 0; i < schedule_.steps; ++i) {
      const int64_t t = reverse_ ? schedule_.steps - 1 - i : i;
      enter(t, h_tangent_, h0_.tangent, h_prev_tangent_);
      const int64_t n = schedule_.rows[t], row0 = schedule_.row0[t];
      through_w_hh(n, from(const_rows_of<S>(h_prev_tangent_), row0), from(rows_of<S>(sums_), row0),
                   true);
      if (has_cell_state(layer_.cell)) enter(t, c_tangent_, c0_.tangent, c_prev_tangent_);
      in_parallel(
          t, [&](Range rows_of_step) { kernels_.tangents_forward[cell()](step(rows_of_step)); });
      if (through_w_hr) {
        through_w_hr(n, from(const_rows_of<S>(h_tilde_tangent_), row0),
                     from(rows_of<S>(h_tangent_), row0), true);
      }
    }
  }

  const at::Tensor& y_tangent() const { return h_tangent_; }
  at::Tensor h_n_tangent() const { return last(h_tangent_, h0_.tangent); }
  at::Tensor c_n_tangent() const { return last(c_tangent_, c0_.tangent); }

  // ---- and back ----

  // dy, dh_n, dc_n of this direction, packed or sorted, and their tangents.
  void backward(const DualTensor& dy, const DualTensor& dh_n, const DualTensor& dc_n) {
    const int64_t rows = order_.rows(), batch = schedule_.batch, output = layer_.sizes.output;
    dgates_ = empty({2, rows, sums_.size(1)});
    dh_ = stacked(dh_n, output);
    carry_ = zeros({2, batch, hidden_});
    if (has_cell_state(layer_.cell)) carry_ = stacked(dc_n, hidden_);
    const bool projected = layer_.sizes.projected;
    if (projected) dh_steps_ = empty({2, rows, output});
    at::Tensor dh_step = empty({2 * batch, output});
    at::Tensor dh_cell = projected ? empty({2 * batch, hidden_}) : dh_step;
    at::Tensor dgates_step = empty({2 * batch, sums_.size(1)});
    at::Tensor dh_prev = empty({2 * batch, output});
    const StepProducts<S> through_w_hh(isa_, w_.w_hh, false);
    std::optional<StepProducts<S>> through_w_hr;
    if (projected) through_w_hr.emplace(isa_, w_.w_hr, false);
    for (int64_t i = schedule_.steps - 1; i >= 0; --i) {
      const int64_t t = reverse_ ? schedule_.steps - 1 - i : i;
      const int64_t n = schedule_.rows[t], row0 = schedule_.row0[t];
      for (int of = 0; of < 2; ++of) {
        const at::Tensor& dy_rows = of == 0 ? dy.value : dy.tangent;
        add_rows(data_of<S>(dh_step) + of * n * output, read<S>(dh_) + of * batch * output,
                 dy_rows.defined() ? read<S>(dy_rows) + row0 * output : nullptr, n * output);
      }
      if (projected) {
        keep(dh_step, t, dh_steps_);
        (*through_w_hr)(n, const_rows_of<S>(dh_step), rows_of<S>(dh_cell));
      }
      in_parallel(t, [&](Range rows_of_step) {
        const int64_t first = rows_of_step.begin - row0;
        kernels_.tangents_backward[cell()](
            {step(rows_of_step),
             halves<const S>(dh_cell, first, n),
             {from(rows_of<S>(carry_[0]), first), from(rows_of<S>(carry_[1]), first)},
             halves<S>(dgates_step, first, n)});
      });
      keep(dgates_step, t, dgates_);
      through_w_hh(n, const_rows_of<S>(dgates_step), rows_of<S>(dh_prev));
      leave(t, dh_prev);
    }
  }

  // The tangents of the gradients.

  void add_dx(at::Tensor& dx) const {  // packed
    for (const Piece& p : input_pieces()) {
      dx.addmm_(p.columns(dgates_[1]), p.weight_rows(w_.w_ih.value));
      if (w_.w_ih.tangent.defined()) {
        dx.addmm_(p.columns(dgates_[0]), p.weight_rows(w_.w_ih.tangent));
      }
    }
  }
  at::Tensor dh0() const { return order_.unsorted(dh_[1]); }
  at::Tensor dc0() const { return order_.unsorted(carry_[1]); }
  at::Tensor dw_ih() const {
    at::Tensor dw = empty({gates_width_, layer_.sizes.input});
    for (const Piece& p : input_pieces()) {
      at::Tensor part = p.weight_rows(dw);
      outer_tangent(part, p.columns(dgates_[0]), p.columns(dgates_[1]), x_);
    }
    return dw;
  }
  at::Tensor dw_hh() const {
    at::Tensor dw = empty({gates_width_, layer_.sizes.output});
    outer_tangent(dw, hidden_side(dgates_[0]), hidden_side(dgates_[1]), {h_prev_, h_prev_tangent_});
    return dw;
  }
  at::Tensor db_ih() const {
    std::vector<at::Tensor> sums;
    for (const Piece& p : input_pieces()) sums.push_back(p.columns(dgates_[1]).sum(0));
    return at::cat(sums);
  }
  at::Tensor db_hh() const { return hidden_side(dgates_[1]).sum(0); }
  at::Tensor dw_hr() const {
    at::Tensor dw = empty({layer_.sizes.output, hidden_});
    outer_tangent(dw, dh_steps_[0], dh_steps_[1], {h_tilde_, h_tilde_tangent_});
    return dw;
  }

 private:
  // Columns of the sums that belong to rows of W_ih: a GRU's n has a sum of its own on that side.
  struct Piece {
    int64_t column, row, count;
    at::Tensor columns(const at::Tensor& sums) const { return sums.narrow(1, column, count); }
    at::Tensor weight_rows(const at::Tensor& w) const { return w.narrow(0, row, count); }
  };
  std::vector<Piece> input_pieces() const {
    if (!keeps_n_apart(layer_.cell)) return {{0, 0, gates_width_}};
    return {{0, 0, 2 * hidden_}, {3 * hidden_, 2 * hidden_, hidden_}};
  }
  at::Tensor hidden_side(const at::Tensor& sums) const { return sums.narrow(1, 0, gates_width_); }

  int cell() const { return static_cast<int>(layer_.cell); }
  at::Tensor empty(at::IntArrayRef shape) const { return empty_tensor(shape, y_.options()); }
  at::Tensor zeros(at::IntArrayRef shape) const { return zero_tensor(shape, y_.options()); }

  // What does not wait for another step.
  void add_known_sums() {
    for (const Piece& p : input_pieces()) {
      at::Tensor sums = p.columns(sums_);
      if (x_.tangent.defined()) sums.addmm_(x_.tangent, p.weight_rows(w_.w_ih.value).t());
      if (w_.w_ih.tangent.defined()) sums.addmm_(x_.value, p.weight_rows(w_.w_ih.tangent).t());
      if (w_.b_ih.defined()) sums.add_(p.weight_rows(w_.b_ih));
    }
    at::Tensor sums = hidden_side(sums_);
    if (w_.w_hh.tangent.defined()) sums.addmm_(h_prev_, w_.w_hh.tangent.t());
    if (w_.b_hh.defined()) sums.add_(w_.b_hh);
  }

  // The states (rows, F) that enter step t, into their place in `to`: of the step before, or those
  // that the rows start with; zeros where `start` is undefined, and after a reset.
  void enter(int64_t t, const at::Tensor& states, const at::Tensor& start, at::Tensor& to) const {
    const int64_t width = states.size(1), stride = states.stride(0);
    for (int64_t b = 0; b < schedule_.rows[t]; ++b) {
      S* target = data_of<S>(to) + (schedule_.row0[t] + b) * width;
      const S* source = nullptr;
      const int64_t before = previous_row(schedule_, reverse_, t, b);
      if (is_reset(reset_, schedule_, t, b)) {
      } else if (before >= 0) {
        source = read<S>(states) + before * stride;
      } else if (start.defined()) {
        source = read<S>(start) + b * width;
      }
      if (source != nullptr) {
        std::copy_n(source, width, target);
      } else {
        std::fill_n(target, width, S(0));
      }
    }
  }
  at::Tensor previous(const at::Tensor& states, const at::Tensor& start) const {
    at::Tensor result = empty({order_.rows(), states.size(1)});
    for (int64_t t = 0; t < schedule_.steps; ++t) enter(t, states, start, result);
    return result;
  }

  // Each row's last state (B, F), caller's order: `start` of a row without a step.
  at::Tensor last(const at::Tensor& states, const at::Tensor& start) const {
    const int64_t width = states.size(1);
    at::Tensor result = start.defined() ? start.clone() : zeros({schedule_.batch, width});
    for (int64_t t = 0; t < schedule_.steps; ++t) {
      const int64_t begin = reverse_ ? 0 : rows_at(schedule_, t + 1), end = schedule_.rows[t];
      std::copy(read<S>(states) + (schedule_.row0[t] + begin) * width,
                read<S>(states) + (schedule_.row0[t] + end) * width,
                data_of<S>(result) + begin * width);
      if (reverse_) break;  // every row ends at the first step
    }
    return order_.unsorted(result);
  }

  // dh of the step before from what came through W_hh, (2, rows of t, P); nothing passes a reset.
  void leave(int64_t t, const at::Tensor& dh_prev) {
    const int64_t n = schedule_.rows[t], width = layer_.sizes.output;
    for (int of = 0; of < 2; ++of) {
      for (int64_t b = 0; b < n; ++b) {
        S* to = data_of<S>(dh_) + (of * schedule_.batch + b) * width;
        S* carry = data_of<S>(carry_) + (of * schedule_.batch + b) * hidden_;
        if (is_reset(reset_, schedule_, t, b)) {
          std::fill_n(to, width, S(0));
          std::fill_n(carry, hidden_, S(0));
          continue;
        }
        const S* from = read<S>(dh_prev) + (of * n + b) * width;
        add_rows(to, from, carries_h(layer_.cell) ? carry : nullptr, width);
      }
    }
  }

  static void add_rows(S* to, const S* a, const S* b, int64_t n) {
    if (b == nullptr) {
      std::copy_n(a, n, to);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = a[i] + b[i];
    }
  }

  // (2, B, F) of a state's gradient and its tangent, sorted.
  at::Tensor stacked(const DualTensor& gradient, int64_t width) const {
    at::Tensor result = zeros({2, schedule_.batch, width});
    if (gradient.value.defined()) result[0].copy_(gradient.value);
    if (gradient.tangent.defined()) result[1].copy_(gradient.tangent);
    return result;
  }

  // A step's two halves (2, rows of t, F) into their place in (2, N, F).
  void keep(const at::Tensor& of_step, int64_t t, at::Tensor& to) const {
    const int64_t width = to.size(2), n = schedule_.rows[t];
    for (int of = 0; of < 2; ++of) {
      std::copy_n(read<S>(of_step) + of * n * width, n * width,
                  data_of<S>(to) + (of * order_.rows() + schedule_.row0[t]) * width);
    }
  }

  // dw += a_tangent' b + a' b_tangent, or the first of a new dw.
  static void outer_tangent(at::Tensor& dw, const at::Tensor& a, const at::Tensor& a_tangent,
                            const DualTensor& b) {
    at::mm_out(dw, a_tangent.t(), b.value);
    if (b.tangent.defined()) dw.addmm_(a.t(), b.tangent);
  }

  template <class T>
  static StridedRows<T> from(const StridedRows<T>& rows, int64_t first) {
    return {rows.data == nullptr ? nullptr : rows[first], rows.stride};
  }
  // From row `first` on of either half of (2, n, F), which lie one after the other.
  template <class T>
  static DualRows<T> halves(const at::Tensor& t, int64_t first, int64_t n) {
    const int64_t width = t.size(1);
    T* data = data_of<S>(t) + first * width;
    return {{data, width}, {data + n * width, width}};
  }

  TangentStep<S> step(Range rows) const {
    const bool lstm = has_cell_state(layer_.cell);
    const auto in = [&](const at::Tensor& t) { return from(const_rows_of<S>(t), rows.begin); };
    const auto out = [&](const at::Tensor& t) { return from(rows_of<S>(t), rows.begin); };
    return {rows.size(),
            hidden_,
            in(gates_),
            layer_.sizes.hidden_padded(),
            in(sums_),
            lstm ? DualRows<const S>{in(c_prev_), in(c_prev_tangent_)}
                 : DualRows<const S>{in(h_prev_), in(h_prev_tangent_)},
            in(cells_),
            out(c_tangent_),
            in(y_),
            out(h_tilde_tangent_)};
  }

  template <class F>
  void in_parallel(int64_t t, const F& f) const {
    const int64_t row0 = schedule_.row0[t];
    at::parallel_for(row0, row0 + schedule_.rows[t], 1 + kUnitsOfAThread / hidden_,
                     [&](int64_t begin, int64_t end) { f(Range{begin, end}); });
  }

  const Isa& isa_;
  const RowOrder& order_;
  const Layer& layer_;
  const Schedule& schedule_;
  const KernelTable<S>& kernels_;
  const bool reverse_;
  const uint8_t* const reset_;
  const int64_t hidden_, gates_width_;
  const DualWeights w_;
  const DualTensor x_, h0_, c0_;           // packed, sorted
  const at::Tensor y_, gates_, cells_;     // packed
  at::Tensor h_prev_;                      // (N, P), where it is read
  at::Tensor c_prev_;                      // (N, H), LSTM
  at::Tensor sums_;                        // (N, gradient blocks * H): tangents of pre-activations
  at::Tensor h_prev_tangent_, h_tangent_;  // (N, P)
  at::Tensor c_prev_tangent_, c_tangent_;  // (N, H), LSTM
  at::Tensor h_tilde_, h_tilde_tangent_;   // (N, H), of a projection; else the latter is h_tangent_
  at::Tensor dgates_;                      // (2, N, gradient blocks * H): of values and of tangents
  at::Tensor dh_steps_;                    // (2, N, P), of a projection
  at::Tensor dh_;                          // (2, B, P): what flows back
  at::Tensor carry_;                       // (2, B, H)
};

}  // namespace fusedrnn
