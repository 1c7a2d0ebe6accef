// The backward op on a device.
#include <type_traits>

#include "cuda/driver.h"
#include "cuda/sum.h"

namespace fusedrnn {
namespace {

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
        exact_(in.layer.x.options().dtype(layer.accumulate)),
        parts_(walk_.parts(rows_of_part(width_ * static_cast<int64_t>(sizeof(E))), layer.directions,
                           /*back=*/true)) {
    const auto kept = in.layer.x.options();
    const int64_t sides = how_.sides, rows = parts_.rows;
    dgates_ = at::empty({sides, rows, width_}, kept);
    direct_ = at::empty({sides, layer.batch, sizes_.output}, exact_);
    if (how_.strategy == Strategy::kPerStep) {
      product_ = at::empty({layer.batch, sizes_.output}, exact_);
    }
    if (how_.strategy == Strategy::kPersistent) {
      exchanged_ = exchange_memory(layer, x_, sides, parts_.steps, blocks_.gates);
    }
    if (has_cell_state(layer.cell)) dc_ = at::empty({sides, layer.batch, sizes_.hidden}, exact_);
    if (sizes_.projected) {
      dh_ = at::empty({rows, sizes_.output}, kept);
      h_tilde_ = at::empty({rows, sizes_.hidden}, kept);
      dh_hidden_ = at::empty({layer.batch, sizes_.hidden}, exact_);
    }
    if (any_wanted(Param::kWhh)) previous_ = at::empty({sides, rows, sizes_.output}, kept);
    if (any_wanted(Param::kWih) && walk_.lengths() != nullptr) {
      valid_x_ = at::empty({rows, sizes_.input}, kept);
    }
    if (out.dx.defined()) {
      // A sum of two directions is rounded once.
      dx_ = layer.directions == 1 ? out.dx.reshape(x_.sizes()) : at::empty(x_.sizes(), exact_);
      if (layer.directions == 2) dx_part_ = at::empty({rows, sizes_.input}, exact_);
      // Side by side in several parts, either direction comes first somewhere.
      adds_dx_ = how_.sides == 2 && parts_.of[0].size() > 1;
      if (adds_dx_) dx_.zero_();
    }
  }

  void run() {
    for (int d = 0; d < layer_.directions; d += how_.sides) run(d);
    if (dx_part_.defined()) out_.dx.copy_(dx_.reshape(out_.dx.sizes()));
  }

 private:
  // A direction on its way.
  struct Walker {
    int d;
    at::Tensor w_ih, w_hh, w_hr;
    at::Tensor dgates, previous;  // of a part; the latter is the states that entered
    at::Tensor direct, dc;        // CarriedGradient, the cell state's
    const std::vector<Steps>& parts;
    Sum dw_ih, dw_hh, dw_hr, db;
    int64_t product_rows = 0;  // that product_ has
  };

  // As many directions as go side by side, from this one on.
  void run(int first) {
    std::vector<Walker> walkers;
    for (int i = 0; i < how_.sides; ++i) walkers.push_back(start(first + i, i));
    for (size_t k = 0; k < parts_.of[first].size(); ++k) {
      recur(walkers, k);
      for (Walker& w : walkers) add_part(w, w.parts[k]);
    }
    for (Walker& w : walkers) finish(w);
  }

  Walker start(int d, int i) const {
    const auto own = [&](const at::Tensor& t) { return t.defined() ? t.select(0, i) : t; };
    const auto fill = [&](const at::Tensor& to, const OptionalTensor& from) {
      if (from) {
        to.copy_(layer_.of_direction(*from, d));
      } else {
        to.zero_();
      }
    };
    Walker w{d,
             param(d, Param::kWih),
             recurrent_weight(d),
             {},
             own(dgates_),
             own(previous_),
             own(direct_),
             own(dc_),
             parts_.of[d],
             sum_like(d, Param::kWih),
             sum_like(d, Param::kWhh),
             {},
             {}};
    if (sizes_.projected) {
      w.w_hr = param(d, Param::kWhr);
      w.dw_hr = sum_like(d, Param::kWhr);
    }
    if (layer_.has_biases && (wants(d, Param::kBih) || wants(d, Param::kBhh))) w.db = sum({width_});
    fill(w.direct, in_.dh_n);
    if (w.dc.defined()) fill(w.dc, in_.dc_n);
    return w;
  }

  // What is parallel over time, once dgates stand.
  void add_part(Walker& w, Steps part) const {
    const int64_t rows = walk_.rows(part), row = walk_.row(part.begin);
    const at::Tensor dgates = w.dgates.narrow(0, 0, rows);
    if (dx_.defined()) add_dx(w.d, row, input_side(dgates), w.w_ih);
    if (w.dw_ih.wanted()) w.dw_ih.add_product(input_side(dgates).t(), valid_x(part));
    if (w.dw_hh.wanted()) {
      w.dw_hh.add_product(hidden_side(dgates).t(), w.previous.narrow(0, 0, rows));
    }
    if (w.dw_hr.wanted()) {
      w.dw_hr.add_product(dh_.narrow(0, 0, rows).t(), h_tilde_.narrow(0, 0, rows));
    }
    if (w.db.wanted()) w.db.add_rows(dgates);
  }

  void finish(Walker& w) const {
    const int d = w.d;
    put_initial(w);
    if (w.dw_ih.wanted()) result(d, Param::kWih).copy_(w.dw_ih.total());
    if (w.dw_hr.wanted()) result(d, Param::kWhr).copy_(w.dw_hr.total());
    if (w.dw_hh.wanted()) from_hidden_order(result(d, Param::kWhh), w.dw_hh.total());
    if (w.db.wanted() && wants(d, Param::kBih)) {
      const int64_t columns = blocks_.gates * sizes_.hidden;
      result(d, Param::kBih).copy_(w.db.total().narrow(0, width_ - columns, columns));
    }
    if (w.db.wanted() && wants(d, Param::kBhh))
      from_hidden_order(result(d, Param::kBhh), w.db.total());
  }

  at::Tensor param(int d, Param p) const {
    return layer_.param(in_.layer.params, d, p).contiguous();
  }
  at::Tensor result(int d, Param p) const { return out_.dparams[layer_.index_of(d, p)]; }
  bool wants(int d, Param p) const { return result(d, p).defined(); }
  bool any_wanted(Param p) const { return wants(0, p) || (layer_.directions == 2 && wants(1, p)); }

  Sum sum(at::IntArrayRef shape) const { return Sum(shape, exact_, parts_.of[0].size() > 1); }
  Sum sum_like(int d, Param p) const { return wants(d, p) ? sum(result(d, p).sizes()) : Sum(); }

  // The hidden side is the first blocks of dgates, the input side the last (gradient_blocks).
  at::Tensor hidden_side(const at::Tensor& dgates) const {
    return dgates.narrow(1, 0, blocks_.gates * sizes_.hidden);
  }
  at::Tensor input_side(const at::Tensor& dgates) const {
    return dgates.narrow(1, blocks_.input_begin() * sizes_.hidden, blocks_.gates * sizes_.hidden);
  }

  // W_hh with its gates in the order of the hidden side, and a gradient in that order back.
  at::Tensor hidden_order(const at::Tensor& w_hh) const {
    if (blocks_.hidden_in_order()) return w_hh;
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

  // As the kernels of the strategy want it: its gates in the order of the hidden side.
  at::Tensor recurrent_weight(int d) const {
    const at::Tensor w_hh = hidden_order(param(d, Param::kWhh));
    if (how_.strategy == Strategy::kPerStep) return w_hh;
    const int64_t hidden = sizes_.hidden;
    return kept_weight(how_.strategy,
                       w_hh.view({1, blocks_.gates, hidden, hidden}).permute({0, 3, 1, 2}));
  }

  // The k-th part of time.
  void recur(std::vector<Walker>& walkers, size_t k) const {
    if constexpr (!std::is_same_v<E, double>) {
      if (how_.strategy != Strategy::kPerStep) {
        SideBySide<PartBackward<E>> sides{};
        for (const Walker& w : walkers) sides.part[sides.count++] = whole(w, w.parts[k]);
        if (how_.strategy == Strategy::kOneCta) {
          OneCtaKernels<E>::backward(layer_.cell, sides, stream_);
        } else {
          in_launches(how_, exchanged_, sides, [&](const Exchange& exchange) {
            PersistentBackward<E>::run(layer_.cell, sides, exchange, stream_);
          });
        }
        return;
      }
    }
    for (Walker& w : walkers) step_by_step(w, w.parts[k]);
  }

  void step_by_step(Walker& w, Steps part) const {
    const RecurrentPrecision precision(layer_);
    const bool reverse = w.d == 1;
    const ForwardSaved<E> from = saved(w.d);
    for (int64_t i = part.begin; i < part.end; ++i) {
      const int64_t t = reverse ? i : part.begin + part.end - 1 - i;
      const int64_t at = walk_.row(t) - walk_.row(part.begin), rows = walk_.rows(t);
      BackwardStep<E> p{};
      p.step = walk_.step(t, reverse);
      p.hidden = sizes_.hidden;
      p.carry = carry(w);
      p.dc = values_of<S>(w.dc);
      p.saved = from;
      p.dgates = values_of<E>(w.dgates, at * width_);
      if (sizes_.projected) {
        project(w, p.step, at);
        p.dh_hidden = const_values_of<S>(dh_hidden_);
        p.h_tilde = values_of<E>(h_tilde_, at * sizes_.hidden);
      } else {
        p.previous = values_of<E>(w.previous, at * sizes_.output);
      }
      Kernels<E>::backward(layer_.cell, p, stream_);
      multiply(product_.narrow(0, 0, rows), hidden_side(w.dgates.narrow(0, at, rows)), w.w_hh);
      w.product_rows = rows;
    }
  }

  CarriedGradient<E> carry(const Walker& w) const {
    return {values_of<S>(w.direct), const_values_of<S>(product_), w.product_rows};
  }

  // A part of time for one kernel.
  PartBackward<E> whole(const Walker& w, Steps part) const {
    return {walk_.part(part, w.d == 1), sizes_.hidden,           const_values_of<E>(w.w_hh),
            values_of<S>(w.direct),     values_of<S>(w.dc),      saved(w.d),
            values_of<E>(w.dgates),     values_of<E>(w.previous)};
  }

  // A direction's columns.
  ForwardSaved<E> saved(int d) const {
    const int64_t units = sizes_.hidden_padded(), hidden = sizes_.hidden;
    ForwardSaved<E> s{};
    s.hidden = hidden;
    s.y_stride = layer_.directions * sizes_.output;
    s.gates_stride = layer_.directions * layer_.saved_stride();
    s.cells_stride = layer_.directions * units;
    s.hidden_padded = units;
    s.gates = const_values_of<E>(gates_, d * layer_.saved_stride());
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

  void project(const Walker& w, const Step& step, int64_t at) const {
    const int64_t output = sizes_.output, rows = step.now.count;
    const ProjectedBackwardStep<E> p{step,
                                     output,
                                     carry(w),
                                     const_values_of<E>(dy_, w.d * output),
                                     const_values_of<E>(y_, w.d * output),
                                     const_values_of<E>(h0_, w.d * layer_.batch * output),
                                     layer_.directions * output,
                                     values_of<E>(dh_, at * output),
                                     values_of<E>(w.previous, at * output)};
    Kernels<E>::project_backward(p, stream_);
    multiply(dh_hidden_.narrow(0, 0, rows), dh_.narrow(0, at, rows), w.w_hr);
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
    if (d == 0 && !adds_dx_) {
      multiply(to, dgates, w_ih);
    } else {
      const at::Tensor share = dx_part_.narrow(0, 0, dgates.size(0));
      multiply(share, dgates, w_ih);
      to.add_(share);
    }
  }

  void put_initial(const Walker& w) const {
    const Step first = walk_.steps() == 0 ? Step{} : walk_.first_step(w.d == 1);
    const auto put = [&](const at::Tensor& to, const CarriedGradient<E>& carry, int64_t width) {
      if (!to.defined()) return;
      const InitialGradient<E> p{first, width, carry, values_of<E>(to, w.d * layer_.batch * width)};
      Kernels<E>::initial_gradient(p, layer_.batch, stream_);
    };
    put(out_.dh0, carry(w), sizes_.output);
    put(out_.dc0, {values_of<S>(w.dc), nullptr, 0}, sizes_.hidden);
  }

  const Layer& layer_;
  const Sizes& sizes_;
  const GradientBlocks blocks_;
  const BackwardInputs& in_;
  const BackwardResult& out_;
  const Recurrence how_;
  const Walk walk_;
  const CudaStream stream_;
  const at::Tensor x_, h0_, c0_, y_, dy_, gates_, cells_;
  const int64_t width_;  // of a row of dgates
  const at::TensorOptions exact_;
  const Parts parts_;
  // By side, as Walker has them.
  at::Tensor dgates_, previous_, direct_, dc_, exchanged_;
  // Of a part: valid x, dh and h_tilde before a projection.
  at::Tensor valid_x_, dh_, h_tilde_;
  // Of a step: CarriedGradient's product, dh W_hr.
  at::Tensor product_, dh_hidden_;
  at::Tensor dx_, dx_part_;
  bool adds_dx_ = false;  // to what is there, both directions
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
  with_storage(layer, [&]<class E>() { BackwardRun<E>(layer, in, out).run(); });
  for (at::Tensor* t : {&out.dx, &out.dh0, &out.dc0}) {
    if (!t->defined()) *t = at::empty({0}, options);
  }
  for (at::Tensor& t : out.dparams) {
    if (!t.defined()) t = at::empty({0}, options);
  }
  return out;
}

}  // namespace fusedrnn
