// The backward op on a device.
#include <algorithm>
#include <type_traits>
#include <utility>

#include "cuda/driver.h"

namespace fusedrnn {
namespace {

// A sum over parts of time, unrounded; undefined where it is not wanted.
class Sum {
 public:
  Sum() = default;
  Sum(at::IntArrayRef shape, const at::TensorOptions& options, bool in_parts)
      : total_(at::empty(shape, options)), part_(in_parts ? at::empty(shape, options) : total_) {}

  bool wanted() const { return total_.defined(); }
  void add_product(const at::Tensor& a, const at::Tensor& b) {
    multiply(next(), a, b);
    add();
  }
  void add_rows(const at::Tensor& rows) {
    at::sum_out(next(), rows, at::IntArrayRef{0}, false, total_.scalar_type());
    add();
  }
  const at::Tensor& total() {
    if (empty_) total_.zero_();
    return total_;
  }

 private:
  at::Tensor& next() { return empty_ ? total_ : part_; }
  void add() {
    if (!empty_) total_.add_(part_);
    empty_ = false;
  }

  at::Tensor total_, part_;
  bool empty_ = true;
};

template <class E>
class BackwardRun {
  using S = Arithmetic<E>;

 public:
  BackwardRun(const Layer& layer, const BackwardInputs& in, const BackwardResult& out)
      : layer_(layer),
        sizes_(layer.sizes),
        blocks_(gradient_blocks(layer.cell)),
        in_(in),
        out_(out),
        how_(recurrence_of<PersistentBackward, E>(layer)),
        walk_(layer, in.layer, most_steps(how_.strategy)),
        stream_(current_stream()),
        x_(in.layer.x.contiguous().reshape({layer.rows, layer.sizes.input})),
        h0_(dense(in.layer.h0)),
        c0_(dense(in.layer.c0)),
        y_(in.y.contiguous()),
        dy_(dense(in.dy)),
        gates_(in.gates.contiguous()),
        cells_(in.cells.contiguous()),
        width_(blocks_.count * layer.sizes.hidden),
        exact_(in.layer.x.options().dtype(layer.accumulate)) {
    const auto kept = in.layer.x.options();
    // Both directions' parts are as long, only their order differs.
    const int64_t most = rows_of_part(width_ * static_cast<int64_t>(sizeof(E)));
    const std::vector<Steps> parts = walk_.parts(most, false);
    const int64_t rows = walk_.most_rows(parts);
    in_parts_ = parts.size() > 1;
    part_rows_ = most;
    dgates_ = at::empty({rows, width_}, kept);
    direct_ = at::empty({layer.batch, sizes_.output}, exact_);
    if (how_.strategy == Strategy::kPerStep) product_ = at::empty_like(direct_);
    if (how_.strategy == Strategy::kPersistent) {
      exchanged_ = exchange_memory(layer, x_, parts, blocks_.gates);
    }
    if (has_cell_state(layer.cell)) dc_ = at::empty({layer.batch, sizes_.hidden}, exact_);
    if (sizes_.projected) {
      dh_ = at::empty({rows, sizes_.output}, kept);
      h_tilde_ = at::empty({rows, sizes_.hidden}, kept);
      dh_hidden_ = at::empty({layer.batch, sizes_.hidden}, exact_);
    }
    if (any_param(1)) previous_ = at::empty({rows, sizes_.output}, kept);
    if (any_param(0) && walk_.lengths() != nullptr) {
      valid_x_ = at::empty({rows, sizes_.input}, kept);
    }
    if (out.dx.defined()) {
      // A sum of two directions is rounded once.
      dx_ = layer.directions == 1 ? out.dx.reshape(x_.sizes()) : at::empty(x_.sizes(), exact_);
      if (layer.directions == 2) dx_part_ = at::empty({rows, sizes_.input}, exact_);
    }
  }

  void run(int d) {
    const bool reverse = d == 1;
    const at::Tensor w_ih = param(d, 0), w_hh = recurrent_weight(d);
    const at::Tensor w_hr = sizes_.projected ? param(d, w_hr_index()) : at::Tensor();
    start(d);
    Sum dw_ih = sum_like(d, 0), dw_hh = sum_like(d, 1), dw_hr;
    Sum db = layer_.has_biases && (wants(d, 2) || wants(d, 3)) ? sum({width_}) : Sum();
    if (sizes_.projected) dw_hr = sum_like(d, w_hr_index());
    int64_t product_rows = 0;
    for (const Steps part : walk_.parts(part_rows_, !reverse)) {
      product_rows = recur(d, part, w_hh, w_hr, product_rows);
      const int64_t rows = walk_.rows(part), row = walk_.row(part.begin);
      const at::Tensor dgates = dgates_.narrow(0, 0, rows);
      if (dx_.defined()) add_dx(d, row, input_side(dgates), w_ih);
      if (dw_ih.wanted()) dw_ih.add_product(input_side(dgates).t(), valid_x(part));
      if (dw_hh.wanted()) dw_hh.add_product(hidden_side(dgates).t(), previous_.narrow(0, 0, rows));
      if (dw_hr.wanted()) {
        dw_hr.add_product(dh_.narrow(0, 0, rows).t(), h_tilde_.narrow(0, 0, rows));
      }
      if (db.wanted()) db.add_rows(dgates);
    }
    finish(d, product_rows);
    if (dw_ih.wanted()) result(d, 0).copy_(dw_ih.total());
    if (dw_hr.wanted()) result(d, w_hr_index()).copy_(dw_hr.total());
    if (dw_hh.wanted()) from_hidden_order(result(d, 1), dw_hh.total());
    if (db.wanted() && wants(d, 2)) {
      const int64_t columns = blocks_.gates * sizes_.hidden;
      result(d, 2).copy_(db.total().narrow(0, width_ - columns, columns));
    }
    if (db.wanted() && wants(d, 3)) from_hidden_order(result(d, 3), db.total());
  }

  void finish_dx() const {
    if (dx_part_.defined()) out_.dx.copy_(dx_.reshape(out_.dx.sizes()));
  }

 private:
  int index(int d, int param) const { return d * layer_.params_per_direction + param; }
  int w_hr_index() const { return layer_.has_biases ? 4 : 2; }
  at::Tensor param(int d, int i) const { return layer_.param(in_.layer.params, d, i).contiguous(); }
  at::Tensor result(int d, int i) const { return out_.dparams[index(d, i)]; }
  bool wants(int d, int i) const { return result(d, i).defined(); }
  bool any_param(int i) const { return wants(0, i) || (layer_.directions == 2 && wants(1, i)); }

  Sum sum(at::IntArrayRef shape) const { return Sum(shape, exact_, in_parts_); }
  Sum sum_like(int d, int i) const { return wants(d, i) ? sum(result(d, i).sizes()) : Sum(); }

  // The hidden side is the first blocks of dgates, the input side the last (gradient_blocks).
  at::Tensor hidden_side(const at::Tensor& dgates) const {
    return dgates.narrow(1, 0, blocks_.gates * sizes_.hidden);
  }
  at::Tensor input_side(const at::Tensor& dgates) const {
    return dgates.narrow(1, blocks_.input_begin() * sizes_.hidden, blocks_.gates * sizes_.hidden);
  }

  // W_hh with its gates in the order of the hidden side, and a gradient in that order back.
  at::Tensor hidden_order(const at::Tensor& w_hh) const {
    if (layer_.cell != Cell::kGru) return w_hh;
    std::vector<at::Tensor> gates;
    for (int k = 0; k < blocks_.gates; ++k) {
      gates.push_back(w_hh.narrow(0, blocks_.hidden_gate[k] * sizes_.hidden, sizes_.hidden));
    }
    return at::cat(gates);
  }
  void from_hidden_order(const at::Tensor& to, const at::Tensor& from) const {
    for (int k = 0; k < blocks_.gates; ++k) {
      to.narrow(0, blocks_.hidden_gate[k] * sizes_.hidden, sizes_.hidden)
          .copy_(from.narrow(0, k * sizes_.hidden, sizes_.hidden));
    }
  }

  void start(int d) const {
    const auto fill = [&](const at::Tensor& to, const OptionalTensor& from) {
      if (from) {
        to.copy_(layer_.of_direction(*from, d));
      } else {
        to.zero_();
      }
    };
    fill(direct_, in_.dh_n);
    if (dc_.defined()) fill(dc_, in_.dc_n);
  }

  // As the kernels of the strategy want it: its gates in the order of the hidden side.
  at::Tensor recurrent_weight(int d) const {
    const at::Tensor w_hh = hidden_order(param(d, 1));
    if (how_.strategy == Strategy::kPerStep) return w_hh;
    const int64_t hidden = sizes_.hidden;
    return kept_weight(how_.strategy,
                       w_hh.view({1, blocks_.gates, hidden, hidden}).permute({0, 3, 1, 2}));
  }

  // Takes how many rows product_ has; gives how many it has after the part.
  int64_t recur(int d, Steps part, const at::Tensor& w_hh, const at::Tensor& w_hr,
                int64_t product_rows) const {
    if constexpr (!std::is_same_v<E, double>) {
      if (how_.strategy == Strategy::kOneCta) {
        OneCtaKernels<E>::backward(layer_.cell, whole(d, part, w_hh), stream_);
        return 0;
      }
      if (how_.strategy == Strategy::kPersistent) {
        const PartBackward<E> p = whole(d, part, w_hh);
        in_launches(how_, layer_.batch, exchanged_, part, [&](const Exchange& exchange) {
          PersistentBackward<E>::run(layer_.cell, p, exchange, stream_);
        });
        return 0;
      }
    }
    return step_by_step(d, part, w_hh, w_hr, product_rows);
  }

  int64_t step_by_step(int d, Steps part, const at::Tensor& w_hh, const at::Tensor& w_hr,
                       int64_t product_rows) const {
    const RecurrentPrecision precision(layer_);
    const ForwardSaved<E> from = saved(d);
    for (int64_t i = part.begin; i < part.end; ++i) {
      const int64_t t = d == 1 ? i : part.begin + part.end - 1 - i;
      const int64_t at = walk_.row(t) - walk_.row(part.begin), rows = walk_.rows(t);
      BackwardStep<E> p{};
      p.step = walk_.step(t, d == 1);
      p.hidden = sizes_.hidden;
      p.carry = {values_of<S>(direct_), const_values_of<S>(product_), product_rows};
      p.dc = values_of<S>(dc_);
      p.saved = from;
      p.dgates = values_of<E>(dgates_, at * width_);
      if (sizes_.projected) {
        project(d, p.step, at, p.carry, w_hr);
        p.dh_hidden = const_values_of<S>(dh_hidden_);
        p.h_tilde = values_of<E>(h_tilde_, at * sizes_.hidden);
      } else {
        p.previous = values_of<E>(previous_, at * sizes_.output);
      }
      Kernels<E>::backward(layer_.cell, p, stream_);
      multiply(product_.narrow(0, 0, rows), hidden_side(dgates_.narrow(0, at, rows)), w_hh);
      product_rows = rows;
    }
    return product_rows;
  }

  // A part of time for one kernel.
  PartBackward<E> whole(int d, Steps part, const at::Tensor& w_hh) const {
    return {walk_.part(part, d == 1), sizes_.hidden,          const_values_of<E>(w_hh),
            values_of<S>(direct_),    values_of<S>(dc_),      saved(d),
            values_of<E>(dgates_),    values_of<E>(previous_)};
  }

  // A direction's columns.
  ForwardSaved<E> saved(int d) const {
    const int64_t units = sizes_.hidden_padded(), hidden = sizes_.hidden;
    ForwardSaved<E> s{};
    s.hidden = hidden;
    s.y_stride = layer_.directions * sizes_.output;
    s.gates_stride = layer_.directions * layer_.saved_width();
    s.cells_stride = layer_.directions * units;
    s.hidden_padded = units;
    s.gates = const_values_of<E>(gates_, d * layer_.saved_width());
    if (has_cell_state(layer_.cell)) {
      s.cells = const_values_of<S>(cells_, d * units);
      s.c0 = const_values_of<E>(c0_, d * layer_.batch * hidden);
    }
    if (!sizes_.projected) {
      s.dy = const_values_of<E>(dy_, d * hidden);
      s.y = const_values_of<E>(y_, d * hidden);
      s.h0 = const_values_of<E>(h0_, d * layer_.batch * hidden);
    }
    return s;
  }

  void project(int d, const Step& step, int64_t at, const CarriedGradient<E>& carry,
               const at::Tensor& w_hr) const {
    const int64_t output = sizes_.output, rows = step.now.count;
    const ProjectedBackwardStep<E> p{step,
                                     output,
                                     carry,
                                     const_values_of<E>(dy_, d * output),
                                     const_values_of<E>(y_, d * output),
                                     const_values_of<E>(h0_, d * layer_.batch * output),
                                     layer_.directions * output,
                                     values_of<E>(dh_, at * output),
                                     values_of<E>(previous_, at * output)};
    Kernels<E>::project_backward(p, stream_);
    multiply(dh_hidden_.narrow(0, 0, rows), dh_.narrow(0, at, rows), w_hr);
  }

  // x of a part, zeros for its padding: NaN there must not reach a weight's gradient.
  at::Tensor valid_x(Steps part) const {
    const int64_t rows = walk_.rows(part), row = walk_.row(part.begin);
    if (walk_.lengths() == nullptr) return x_.narrow(0, row, rows);
    const ValidRows<E> p{sizes_.input,
                         layer_.batch,
                         part.begin,
                         walk_.lengths(),
                         const_values_of<E>(x_, row * sizes_.input),
                         values_of<E>(valid_x_)};
    Kernels<E>::valid_rows(p, rows, stream_);
    return valid_x_.narrow(0, 0, rows);
  }

  void add_dx(int d, int64_t row, const at::Tensor& dgates, const at::Tensor& w_ih) const {
    const at::Tensor to = dx_.narrow(0, row, dgates.size(0));
    if (d == 0) {
      multiply(to, dgates, w_ih);
    } else {
      const at::Tensor share = dx_part_.narrow(0, 0, dgates.size(0));
      multiply(share, dgates, w_ih);
      to.add_(share);
    }
  }

  void finish(int d, int64_t product_rows) const {
    const Step first = walk_.steps() == 0 ? Step{} : walk_.first_step(d == 1);
    const auto put = [&](const at::Tensor& to, const CarriedGradient<E>& carry, int64_t width) {
      if (!to.defined()) return;
      const InitialGradient<E> p{first, width, carry, values_of<E>(to, d * layer_.batch * width)};
      Kernels<E>::initial_gradient(p, layer_.batch, stream_);
    };
    put(out_.dh0, {values_of<S>(direct_), const_values_of<S>(product_), product_rows},
        sizes_.output);
    put(out_.dc0, {values_of<S>(dc_), nullptr, 0}, sizes_.hidden);
  }

  const Layer& layer_;
  const Sizes& sizes_;
  const GradientBlocks blocks_;
  const BackwardInputs& in_;
  const BackwardResult& out_;
  const Recurrence how_;
  const Walk walk_;
  const Stream stream_;
  const at::Tensor x_, h0_, c0_, y_, dy_, gates_, cells_;
  const int64_t width_;  // of a row of dgates
  const at::TensorOptions exact_;
  int64_t part_rows_;
  bool in_parts_;
  // Of a part: dgates, the states that entered, valid x, dh and h_tilde before a projection.
  at::Tensor dgates_, previous_, valid_x_, dh_, h_tilde_;
  // Of a step: CarriedGradient, the cell state's, dh W_hr.
  at::Tensor direct_, product_, dc_, dh_hidden_;
  at::Tensor exchanged_;
  at::Tensor dx_, dx_part_;
};

}  // namespace

BackwardResult backward_on_device(const Layer& layer, const BackwardInputs& in,
                                  const c10::List<bool>& wanted) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto options = in.layer.x.options();
  const auto like = [&](int64_t at, const OptionalTensor& t) {
    return wanted.get(at) && t ? at::empty(t->sizes(), options) : at::Tensor();
  };
  BackwardResult out{like(0, in.layer.x), like(1, in.layer.h0), like(2, in.layer.c0), {}};
  for (size_t i = 0; i < in.layer.params.size(); ++i) {
    out.dparams.push_back(like(static_cast<int64_t>(i) + 3, in.layer.params[i]));
  }
  with_storage(layer, [&]<class E>() {
    BackwardRun<E> run(layer, in, out);
    for (int d = 0; d < layer.directions; ++d) run.run(d);
    run.finish_dx();
  });
  for (at::Tensor* t : {&out.dx, &out.dh0, &out.dc0}) {
    if (!t->defined()) *t = at::empty({0}, options);
  }
  for (at::Tensor& t : out.dparams) {
    if (!t.defined()) t = at::empty({0}, options);
  }
  return out;
}

}  // namespace fusedrnn
