// The forward op on a device.
#include <type_traits>

#include "cuda/driver.h"

namespace fusedrnn {
namespace {

template <class E>
class ForwardRun {
  using S = Arithmetic<E>;

 public:
  ForwardRun(const Layer& layer, const LayerInputs& in, const ForwardResult& out)
      : layer_(layer),
        sizes_(layer.sizes),
        in_(in),
        out_(out),
        how_(recurrence_of<PersistentForward, E>(layer)),
        walk_(layer, in, most_steps(how_.strategy)),
        stream_(current_stream()),
        x_(in.x.contiguous().reshape({layer.rows, layer.sizes.input})),
        h0_(dense(in.h0)),
        c0_(dense(in.c0)),
        gates_width_(gate_blocks(layer.cell) * layer.sizes.hidden),
        exact_(in.x.options().dtype(layer.accumulate)),
        parts_(walk_.parts(rows_of_part(gates_width_ * static_cast<int64_t>(sizeof(S))),
                           layer.directions, /*back=*/false)) {
    input_gates_ = at::empty({how_.sides, parts_.rows, gates_width_}, exact_);
    if (how_.strategy == Strategy::kPerStep) {
      hidden_gates_ = at::empty({layer.batch, gates_width_}, exact_);
    } else if (how_.strategy == Strategy::kPersistent) {
      exchanged_ = exchange_memory(layer, x_, how_.sides, parts_.steps, 1);
    }
    if (sizes_.projected) {
      h_tilde_ = at::empty({layer.batch, sizes_.hidden}, in.x.options());
      projected_ = at::empty({layer.batch, sizes_.output}, exact_);
    }
  }

  void run() {
    for (int d = 0; d < layer_.directions; d += how_.sides) run(d);
  }

 private:
  static constexpr bool kExact = std::is_same_v<E, S>;

  // Undefined where the layer has none.
  struct Parameters {
    at::Tensor w_ih, w_hh, b_ih, b_hh, w_hr;
  };
  // A direction on its way.
  struct Walker {
    int d;
    Parameters with;
    at::Tensor h, state;     // at the end h_n, and c_n where it is kept so
    at::Tensor input_gates;  // of a part
    const std::vector<Steps>& parts;
  };

  // As many directions as go side by side, from this one on.
  void run(int first) {
    std::vector<Walker> walkers;
    for (int i = 0; i < how_.sides; ++i) {
      const int d = first + i;
      const at::Tensor h = layer_.of_direction(out_.h_n, d);
      walkers.push_back(
          {d, parameters(d), h, start(d, h), input_gates_.select(0, i), parts_.of[d]});
    }
    for (size_t k = 0; k < parts_.of[first].size(); ++k) {
      for (const Walker& w : walkers) {
        const int64_t rows = walk_.rows(w.parts[k]);
        multiply(w.input_gates.narrow(0, 0, rows), x_.narrow(0, walk_.row(w.parts[k].begin), rows),
                 w.with.w_ih.t());
      }
      recur(walkers, k);
    }
    for (const Walker& w : walkers) {
      if (has_cell_state(layer_.cell) && !kExact) {
        layer_.of_direction(out_.c_n, w.d).copy_(w.state);
      }
    }
  }

  Parameters parameters(int d) const {
    const auto param = [&](Param p) { return layer_.param(in_.params, d, p).contiguous(); };
    Parameters p{param(Param::kWih), param(Param::kWhh), {}, {}, {}};
    if (layer_.has_biases) {
      p.b_ih = param(Param::kBih);
      p.b_hh = param(Param::kBhh);
    }
    if (sizes_.projected) p.w_hr = param(Param::kWhr);
    if (how_.strategy != Strategy::kPerStep) {
      const int64_t hidden = sizes_.hidden;
      p.w_hh =
          kept_weight(how_.strategy, p.w_hh.view({gate_blocks(layer_.cell), hidden, 1, hidden}));
    }
    return p;
  }
  static at::Tensor first(const at::Tensor& t, int64_t rows) {
    return rows == t.size(0) ? t : t.narrow(0, 0, rows);
  }

  // Fills h; returns the state that is kept unrounded: LSTM c, GRU h.
  at::Tensor start(int d, const at::Tensor& h) const {
    const auto fill = [&](const at::Tensor& from, int64_t width, E* kept, S* to) {
      const InitialState<E> p{walk_.steps() == 0 ? Step{} : walk_.first_step(d == 1), width,
                              const_values_of<E>(from, d * layer_.batch * width), kept, to};
      Kernels<E>::initial_state(p, layer_.batch, stream_);
    };
    const bool lstm = has_cell_state(layer_.cell);
    at::Tensor state;
    if (lstm && kExact) {
      state = layer_.of_direction(out_.c_n, d);
    } else if (lstm || (layer_.cell == Cell::kGru && !kExact)) {
      state = at::empty({layer_.batch, sizes_.hidden}, exact_);
    } else if (layer_.cell == Cell::kGru) {
      state = h;
    }
    S* unrounded = layer_.cell == Cell::kGru ? values_of<S>(state) : nullptr;
    fill(h0_, sizes_.output, values_of<E>(h), unrounded);
    if (lstm) fill(c0_, sizes_.hidden, nullptr, values_of<S>(state));
    return state;
  }

  // The k-th part of time.
  void recur(const std::vector<Walker>& walkers, size_t k) const {
    if constexpr (!std::is_same_v<E, double>) {
      if (how_.strategy != Strategy::kPerStep) {
        SideBySide<PartForward<E>> sides{};
        for (const Walker& w : walkers) sides.part[sides.count++] = whole(w, w.parts[k]);
        if (how_.strategy == Strategy::kOneCta) {
          OneCtaKernels<E>::forward(layer_.cell, sides, stream_);
        } else {
          in_launches(how_, exchanged_, sides, [&](const Exchange& exchange) {
            PersistentForward<E>::run(layer_.cell, sides, exchange, stream_);
          });
        }
        return;
      }
    }
    for (const Walker& w : walkers) step_by_step(w, w.parts[k]);
  }

  void step_by_step(const Walker& w, Steps part) const {
    const RecurrentPrecision precision(layer_);
    const bool reverse = w.d == 1;
    const at::Tensor w_hh = w.with.w_hh.t();
    const ForwardResults<E> to = results(w.d);
    for (int64_t i = part.begin; i < part.end; ++i) {
      const int64_t t = reverse ? part.begin + part.end - 1 - i : i;
      const int64_t rows = walk_.rows(t);
      multiply(first(hidden_gates_, rows), first(w.h, rows), w_hh);
      ForwardStep<E> p{};
      p.step = walk_.step(t, reverse);
      p.hidden = sizes_.hidden;
      p.input_gates =
          const_values_of<S>(w.input_gates, (walk_.row(t) - walk_.row(part.begin)) * gates_width_);
      p.hidden_gates = const_values_of<S>(hidden_gates_);
      p.b_ih = const_values_of<E>(w.with.b_ih);
      p.b_hh = const_values_of<E>(w.with.b_hh);
      p.state = values_of<S>(w.state);
      if (!sizes_.projected) p.h = values_of<E>(w.h);
      p.h_tilde = values_of<E>(h_tilde_);
      p.results = to;
      Kernels<E>::forward(layer_.cell, p, stream_);
      if (sizes_.projected) project(w.d, p.step, w.h, w.with.w_hr.t());
    }
  }

  // A part of time for one kernel.
  PartForward<E> whole(const Walker& w, Steps part) const {
    return {walk_.part(part, w.d == 1),
            sizes_.hidden,
            const_values_of<S>(w.input_gates),
            const_values_of<E>(w.with.w_hh),
            const_values_of<E>(w.with.b_ih),
            const_values_of<E>(w.with.b_hh),
            values_of<S>(w.state),
            values_of<E>(w.h),
            results(w.d)};
  }

  // A direction's columns.
  ForwardResults<E> results(int d) const {
    const int64_t units = sizes_.hidden_padded();
    ForwardResults<E> r{};
    r.y_stride = layer_.directions * sizes_.output;
    r.gates_stride = layer_.directions * layer_.saved_stride();
    r.cells_stride = layer_.directions * units;
    r.hidden_padded = units;
    if (!sizes_.projected) r.y = values_of<E>(out_.y, d * sizes_.output);
    if (out_.gates.numel() > 0) r.gates = values_of<E>(out_.gates, d * layer_.saved_stride());
    if (out_.cells.numel() > 0) r.cells = values_of<S>(out_.cells, d * units);
    return r;
  }

  void project(int d, const Step& step, const at::Tensor& h, const at::Tensor& w_hr) const {
    const int64_t rows = step.now.count;
    multiply(first(projected_, rows), first(h_tilde_, rows), w_hr);
    const ProjectedStep<E> p{step,
                             sizes_.output,
                             const_values_of<S>(projected_),
                             values_of<E>(h),
                             values_of<E>(out_.y, d * sizes_.output),
                             layer_.directions * sizes_.output};
    Kernels<E>::project(p, stream_);
  }

  const Layer& layer_;
  const Sizes& sizes_;
  const LayerInputs& in_;
  const ForwardResult& out_;
  const Recurrence how_;
  const Walk walk_;
  const CudaStream stream_;
  const at::Tensor x_, h0_, c0_;
  const int64_t gates_width_;
  const at::TensorOptions exact_;
  const Parts parts_;
  at::Tensor input_gates_, hidden_gates_, h_tilde_, projected_, exchanged_;
};

}  // namespace

ForwardResult forward_on_device(const Layer& layer, const LayerInputs& in, bool save) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Sizes& sizes = layer.sizes;
  const auto options = in.x.options();
  const int64_t d = layer.directions, units = sizes.hidden_padded();
  const bool lstm = has_cell_state(layer.cell);
  // What no unit fills is zero, as the CPU's: the same call gives the same tensors.
  const auto saved = [&](bool wanted, int64_t filled, int64_t width,
                         const at::TensorOptions& kind) {
    if (!wanted) return at::empty({0}, kind);
    const std::vector<int64_t> shape = {layer.rows, d, width};
    return filled == width ? at::empty(shape, kind) : at::zeros(shape, kind);
  };
  ForwardResult out;
  out.h_n = at::empty(layer.state_shape(sizes.output), options);
  // Of a single step, the output and the final state are one.
  out.y = layer.one_step ? out.h_n : at::empty(layer.y_shape(), options);
  out.c_n = lstm ? at::empty(layer.state_shape(sizes.hidden), options) : at::empty({0}, options);
  const int64_t blocks = saved_blocks(layer.cell);
  out.gates = saved(save && blocks > 1, blocks * sizes.hidden, layer.saved_stride(), options);
  out.cells = saved(save && lstm, sizes.hidden, units, options.dtype(layer.accumulate));
  with_storage(layer, [&]<class E>() { ForwardRun<E>(layer, in, out).run(); });
  if (layer.one_step) out.y = at::empty({0}, options);
  return out;
}

}  // namespace fusedrnn
