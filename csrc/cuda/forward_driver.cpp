// The forward op on a device.
#include <algorithm>
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
        walk_(layer, in),
        stream_(current_stream()),
        x_(in.x.contiguous().reshape({layer.rows, layer.sizes.input})),
        h0_(dense(in.h0)),
        c0_(dense(in.c0)),
        gates_width_(gate_blocks(layer.cell) * layer.sizes.hidden),
        exact_(in.x.options().dtype(layer.accumulate)) {
    const int64_t most = rows_of_part(gates_width_ * static_cast<int64_t>(sizeof(S)));
    parts_[0] = walk_.parts(most, false);
    parts_[1] = walk_.parts(most, true);
    input_gates_ = at::empty({walk_.most_rows(parts_[0]), gates_width_}, exact_);
    hidden_gates_ = at::empty({layer.batch, gates_width_}, exact_);
    if (sizes_.projected) {
      h_tilde_ = at::empty({layer.batch, sizes_.hidden}, in.x.options());
      projected_ = at::empty({layer.batch, sizes_.output}, exact_);
    }
  }

  void run(int d) {
    const bool reverse = d == 1;
    const at::Tensor w_ih = param(d, 0).t(), w_hh = param(d, 1).t();
    const at::Tensor w_hr = sizes_.projected ? param(d, layer_.has_biases ? 4 : 2).t() : w_hh;
    const at::Tensor b_ih = layer_.has_biases ? param(d, 2) : at::Tensor();
    const at::Tensor b_hh = layer_.has_biases ? param(d, 3) : at::Tensor();
    const at::Tensor h = out_.h_n.select(0, d);  // the state; at the end what is asked for
    const at::Tensor state = start(d, h);
    for (const Steps part : parts_[d]) {
      const int64_t rows = walk_.rows(part);
      const at::Tensor gates = input_gates_.narrow(0, 0, rows);
      multiply(gates, x_.narrow(0, walk_.row(part.begin), rows), w_ih);
      const RecurrentPrecision precision(layer_);
      for (int64_t i = part.begin; i < part.end; ++i) {
        const int64_t t = reverse ? part.begin + part.end - 1 - i : i;
        ForwardStep<E> p = describe(d, t);
        const int64_t n = p.step.rows;
        multiply(first(hidden_gates_, n), first(h, n), w_hh);
        p.input_gates =
            const_values_of<S>(gates, (walk_.row(t) - walk_.row(part.begin)) * gates_width_);
        p.b_ih = const_values_of<E>(b_ih);
        p.b_hh = const_values_of<E>(b_hh);
        p.state = values_of<S>(state);
        if (!sizes_.projected) p.h = values_of<E>(h);
        Kernels<E>::forward(layer_.cell, p, stream_);
        if (sizes_.projected) project(d, p.step, h, w_hr);
      }
    }
    if (has_cell_state(layer_.cell) && !kExact) out_.c_n.select(0, d).copy_(state);
  }

 private:
  static constexpr bool kExact = std::is_same_v<E, S>;

  at::Tensor param(int d, int index) const {
    return layer_.param(in_.params, d, index).contiguous();
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
      state = out_.c_n.select(0, d);
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

  ForwardStep<E> describe(int d, int64_t t) const {
    const int64_t row = walk_.row(t), directions = layer_.directions;
    ForwardStep<E> p{};
    p.step = walk_.step(t, d == 1);
    p.hidden = sizes_.hidden;
    p.hidden_padded = sizes_.hidden_padded();
    p.hidden_gates = const_values_of<S>(hidden_gates_);
    p.h_tilde = values_of<E>(h_tilde_);
    p.y_stride = directions * sizes_.output;
    p.gates_stride = directions * layer_.saved_width();
    p.cells_stride = directions * p.hidden_padded;
    if (!sizes_.projected) p.y = y_of(d, t);
    if (out_.gates.numel() > 0) {
      p.gates = values_of<E>(out_.gates, row * p.gates_stride + d * layer_.saved_width());
    }
    if (out_.cells.numel() > 0) {
      p.cells = values_of<S>(out_.cells, row * p.cells_stride + d * p.hidden_padded);
    }
    return p;
  }

  void project(int d, const Step& step, const at::Tensor& h, const at::Tensor& w_hr) const {
    multiply(first(projected_, step.rows), first(h_tilde_, step.rows), w_hr);
    const ProjectedStep<E> p{step,
                             sizes_.output,
                             const_values_of<S>(projected_),
                             values_of<E>(h),
                             y_of(d, step.time),
                             layer_.directions * sizes_.output};
    Kernels<E>::project(p, stream_);
  }

  E* y_of(int d, int64_t t) const {
    return values_of<E>(out_.y, (walk_.row(t) * layer_.directions + d) * sizes_.output);
  }

  const Layer& layer_;
  const Sizes& sizes_;
  const LayerInputs& in_;
  const ForwardResult& out_;
  const Walk walk_;
  const Stream stream_;
  const at::Tensor x_, h0_, c0_;
  const int64_t gates_width_;
  const at::TensorOptions exact_;
  std::vector<Steps> parts_[2];  // a direction's
  at::Tensor input_gates_, hidden_gates_, h_tilde_, projected_;
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
  out.y = at::empty(layer.y_shape(), options);
  out.h_n = at::empty({d, layer.batch, sizes.output}, options);
  out.c_n = lstm ? at::empty({d, layer.batch, sizes.hidden}, options) : at::empty({0}, options);
  const int64_t blocks = saved_blocks(layer.cell);
  out.gates = saved(save && blocks > 1, blocks * sizes.hidden, layer.saved_width(), options);
  out.cells = saved(save && lstm, sizes.hidden, units, options.dtype(layer.accumulate));
  with_storage(layer, [&]<class E>() {
    ForwardRun<E> run(layer, in, out);
    for (int direction = 0; direction < layer.directions; ++direction) run.run(direction);
  });
  return out;
}

}  // namespace fusedrnn
