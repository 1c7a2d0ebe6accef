// The backward op on the CPU: allocation, chunks of time, teams.
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/call_cpu.h"
#include "cpu/call_scratch.h"
#include "cpu/recompute.h"
#include "cpu/weights_cpu.h"

namespace fusedrnn {
namespace {

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>;

// Results in the arithmetic's type; undefined: not wanted.
struct GradientTensors {
  at::Tensor dx, dh0, dc0;
  bool add_dx;  // dx is zero, as both directions add to it
  std::vector<at::Tensor> dparams;
};

// Whether the kernels write the weights' gradients as bfloat16: they are sums of one term.
bool rounds_itself(const CpuCall& call) {
  return call.narrow && call.layer.rows == 1 && !call.layer.sizes.projected;
}

template <class S>
S* data_or_null(const at::Tensor& t) {
  return t.defined() ? data_of<S>(t) : nullptr;
}

template <class S, class E>
class BackwardRun {
 public:
  BackwardRun(const CpuCall& call, const ScheduleStorage& storage, const BackwardInputs& in,
              const GradientTensors& out)
      : call_(call),
        layer_(call.layer),
        schedule_(storage.view),
        in_(in),
        hidden_(layer_.sizes.hidden_padded()),
        output_(layer_.sizes.output_padded()),
        width_(saved_blocks(layer_.cell) * hidden_),
        stride_(row_stride<E>(width_)),
        recomputes_(in.recomputes(layer_)),
        gates_as_kept_(in.gates.scalar_type() == kDtype<E>),
        work_(workload_of(call, schedule_, 3)),
        bounds_(recomputes_ ? segment_bounds(schedule_) : chunk_bounds(schedule_, work_)),
        most_rows_(chunk_rows(schedule_, bounds_)),
        x_(in.layer.x),
        y_(in.y),
        dy_(in.dy),
        gates_(gates_as_kept_ ? Values<E>(in.gates) : Values<E>()),
        cells_(in.cells),
        h0_(in.layer.h0),
        c0_(in.layer.c0),
        dh_n_(in.dh_n),
        state_rows_(state_rows(work_, at::get_num_threads(), hidden_ * sizeof(S))) {
    args_.sizes = layer_.sizes;
    args_.schedule = schedule_;
    if (!state_rows_.empty()) args_.schedule.state_row = state_rows_.data();
    args_.directions = layer_.directions;
    args_.dx = data_or_null<S>(out.dx);
    args_.add_dx = out.add_dx;
    for (int d = 0; d < layer_.directions; ++d) describe(d, storage, out);
    allocate();
    fill_states();
    if (recomputes_) recompute_.emplace(call, storage, in.layer, cells_.data(), work_, bounds_);
  }

  void run() {
    const auto kernel = call_.isa.table<S, E>().backward[static_cast<int>(layer_.cell)];
    const int64_t chunks = static_cast<int64_t>(bounds_.size()) - 1;
    for (int64_t i = 0; i < chunks; ++i) {
      for (int d = 0; d < layer_.directions; ++d) enter_chunk(d, i);
      if (recomputes_) recompute_->run(args_.direction);
      run_chunk(work_, args_, kernel);
    }
  }

 private:
  void describe(int d, const ScheduleStorage& storage, const GradientTensors& out) {
    BackwardDirection<S, E>& dir = args_.direction[d];
    const Sizes& sizes = layer_.sizes;
    const auto gradient = [&](Param p) {
      return data_or_null<S>(out.dparams[layer_.index_of(d, p)]);
    };
    const auto half_gradient = [&](Param p) {
      return data_or_null<uint16_t>(out.dparams[layer_.index_of(d, p)]);
    };
    weights_[d] = WeightValues<S, E>(layer_, in_.layer.params, d, /*biases=*/false);
    dir.reverse = d == 1;
    dir.weights = weights_[d].view();
    dir.x = x_.data();
    dir.y = y_.data() + d * sizes.output;
    dir.y_stride = dir.dy_stride = layer_.directions * sizes.output;
    if (dy_.data() != nullptr) dir.dy = dy_.data() + d * sizes.output;
    dir.gates_stride = gates_as_kept_ ? layer_.directions * stride_ : stride_;
    dir.dgates_stride = stride_;
    if (has_cell_state(layer_.cell)) dir.cells = cells_.data() + d * hidden_;
    dir.cells_stride = layer_.directions * hidden_;
    if (out.dh0.defined()) {
      dir.dh0 = data_or_null<S>(out.dh0) + d * layer_.batch * sizes.output;
    }
    if (out.dc0.defined()) {
      dir.dc0 = data_or_null<S>(out.dc0) + d * layer_.batch * sizes.hidden;
    }
    if (rounds_itself(call_)) {
      dir.dw_ih_half = half_gradient(Param::kWih);
      dir.dw_hh_half = half_gradient(Param::kWhh);
    } else {
      dir.results.dw_ih = gradient(Param::kWih);
      dir.results.dw_hh = gradient(Param::kWhh);
    }
    if (layer_.has_biases) {
      dir.results.db_ih = gradient(Param::kBih);
      dir.results.db_hh = gradient(Param::kBhh);
    }
    if (sizes.projected) dir.results.dw_hr = gradient(Param::kWhr);
    dir.reset = storage.reset_of(d);
  }

  void allocate() {
    const Sizes& sizes = layer_.sizes;
    const int64_t gates = gate_blocks(layer_.cell) * hidden_;
    const auto [threads, groups] = most_of_plans(work_, schedule_, bounds_);
    scratch_.want_zeros(&args_.zeros, sizes.zero_count());
    // A single chunk's rows are read by all while they are near. By the number of groups, which
    // unlike that of threads depends on no distance: it changes bits.
    const bool apart = bounds_.size() > 2 && worth_summing_apart(work_, groups, most_rows_);
    args_.apart_groups = apart ? groups : 1;
    args_.group_gradients_stride = padded(GradientSizes(layer_.cell, sizes).all());
    args_.dgates_group_stride = most_rows_ * stride_ + (apart ? kPage / sizeof(E) : 0);
    if (apart) scratch_.want(&args_.group_rows, most_rows_);
    const int64_t row_words = apart ? words_before<E>(most_rows_, groups) : words_of<E>(most_rows_);
    want_rows(scratch_, threads, layer_.batch, args_);
    scratch_.want(&args_.previous, most_rows_);
    scratch_.want(&args_.panels[0], row_words * whole_panels(sizes.input));
    scratch_.want(&args_.panels[1], row_words * whole_panels(std::max(sizes.output, sizes.hidden)));
    args_.columns_stride = column_words(row_words) * kMostGradientRows;
    scratch_.want(&args_.columns, threads * args_.columns_stride);
    for (int d = 0; d < layer_.directions; ++d) {
      BackwardDirection<S, E>& dir = args_.direction[d];
      if (worth_packing_backward(schedule_, work_)) {
        if (args_.dx != nullptr) {
          scratch_.want(&dir.packed.input, words_of<E>(gates) * whole_panels(sizes.input));
        }
        if (schedule_.steps > 1 || dir.dh0 != nullptr) {
          scratch_.want(&dir.packed.recurrent, words_of<E>(gates) * whole_panels(sizes.output));
        }
      }
      scratch_.want(&dir.dgates, args_.apart_groups * args_.dgates_group_stride);
      if (apart) {
        scratch_.want(&dir.group_gradients, (groups - 1) * args_.group_gradients_stride);
        scratch_.want_zeros(&dir.group_has_sum, groups);
      }
      if (bounds_.size() > 2) scratch_.want(&dir.dgates_next, layer_.batch * stride_);
      scratch_.want(&dir.carry, state_row(args_.schedule, layer_.batch) * hidden_);
      const bool h_as_it_lies = lies_as_read(sizes.output, schedule_);
      const bool c_as_it_lies = lies_as_read(sizes.hidden, schedule_);
      if (!in_.layer.h0 || !h_as_it_lies) scratch_.want(&h0_copy_[d], layer_.batch * output_);
      if (has_cell_state(layer_.cell) && (!in_.layer.c0 || !c_as_it_lies)) {
        scratch_.want(&c0_copy_[d], layer_.batch * hidden_);
      }
      if (in_.dh_n && !h_as_it_lies) scratch_.want(&dh_n_copy_[d], layer_.batch * output_);
      if (keeps_gates(layer_.cell) && !gates_as_kept_ && !recomputes_) {
        scratch_.want(&widened_[d], most_rows_ * stride_);
      }
      if (sizes.projected) {
        scratch_.want(&dir.packed.projection, words_of<E>(sizes.output) * whole_panels(hidden_));
        scratch_.want(&dir.dh, most_rows_ * output_);
        scratch_.want(&dir.h_tilde, most_rows_ * hidden_);
      }
    }
    scratch_.allocate();
  }

  void fill_states() {
    const Values<S> dc_n(in_.dc_n);
    const int64_t outputs = layer_.batch * layer_.sizes.output;
    const int64_t units = layer_.batch * layer_.sizes.hidden;
    const auto part = [](const auto& v, int64_t at) {
      return v.data() == nullptr ? v.data() : v.data() + at;
    };
    // As they lie where no room for a copy was wanted.
    const auto rows = [&]<class T>(T* copy, const T* state, int64_t width) -> const T* {
      if (copy == nullptr) return state;
      fill_state(copy, state, width, schedule_);
      return copy;
    };
    for (int d = 0; d < layer_.directions; ++d) {
      BackwardDirection<S, E>& dir = args_.direction[d];
      dir.h0 = rows(h0_copy_[d], part(h0_, d * outputs), layer_.sizes.output);
      dir.c0 = rows(c0_copy_[d], part(c0_, d * units), layer_.sizes.hidden);
      dir.dh_n = rows(dh_n_copy_[d], part(dh_n_, d * outputs), layer_.sizes.output);
      fill_state(dir.carry, part(dc_n, d * units), layer_.sizes.hidden, args_.schedule);
    }
  }

  void enter_chunk(int d, int64_t index) {
    BackwardDirection<S, E>& dir = args_.direction[d];
    dir.chunk = chunk_of(bounds_, index, dir.reverse, true);
    const int64_t first = schedule_.row0[dir.chunk.begin];
    if (is_rnn(layer_.cell) || recomputes_) return;
    if (gates_as_kept_) {
      dir.gates = gates_.data() + (first * layer_.directions + d) * stride_;
      return;
    }
    const int64_t rows = schedule_.row0[dir.chunk.end] - first;
    at::from_blob(widened_[d], {rows, width_}, {stride_, 1}, kDtype<E>)
        .copy_(in_.gates.narrow(0, first, rows).select(1, d).narrow(1, 0, width_));
    dir.gates = widened_[d];
  }

  const CpuCall& call_;
  const Layer& layer_;
  const Schedule& schedule_;
  const BackwardInputs& in_;
  const int64_t hidden_, output_;  // padded
  const int64_t width_, stride_;   // of a row of gates
  const bool recomputes_;
  const bool gates_as_kept_;  // of the type that the kernels read
  const Workload work_;
  const std::vector<int64_t> bounds_;
  const int64_t most_rows_;
  const Values<E> x_, y_, dy_, gates_;
  const Values<S> cells_;
  const Values<E> h0_;
  const Values<S> c0_, dh_n_;
  const std::vector<int64_t> state_rows_;  // of carry
  WeightValues<S, E> weights_[2];
  BackwardArgs<S, E> args_{};
  Scratch scratch_;
  E *h0_copy_[2] = {}, *widened_[2] = {};
  S *c0_copy_[2] = {}, *dh_n_copy_[2] = {};
  std::optional<Recompute<S, E>> recompute_;
};

Gradients layer_backward(const std::string& mode, const OptionalTensor& dy,
                         const OptionalTensor& dh_n, const OptionalTensor& dc_n,
                         const at::Tensor& x, const OptionalTensor& lengths,
                         const OptionalTensor& batch_sizes, const OptionalTensor& reset,
                         const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList params,
                         const at::Tensor& y, const at::Tensor& gates, const at::Tensor& cells,
                         bool has_biases, bool bidirectional, c10::List<bool> output_mask) {
  const LayerInputs in{x, lengths, batch_sizes, reset, h0, c0, params};
  const Layer layer(mode, in, has_biases, bidirectional);
  const ScheduleStorage storage(layer, in);
  const BackwardInputs saved{in, dy, dh_n, dc_n, y, gates, cells};
  check_backward(layer, saved, output_mask, /*may_recompute=*/true);

  const CpuCall call(layer);
  const auto exact = x.options().dtype(layer.accumulate);
  const int64_t directions = layer.directions;
  GradientTensors out;
  out.add_dx = directions == 2;
  const bool no_steps = storage.view.steps == 0;  // then no kernel writes anything
  const auto empty_or_zero = [&](at::IntArrayRef shape, bool zero,
                                 const at::TensorOptions& options) {
    return zero ? zero_tensor(shape, options) : empty_tensor(shape, options);
  };
  if (output_mask[0]) {
    out.dx = empty_or_zero(x.sizes(), out.add_dx || no_steps, exact);
    if (!out.add_dx && storage.padded) zero_padding(out.dx, layer, storage.view);
  }
  // Rows without a step hand their gradient straight through.
  const auto through = [&](const OptionalTensor& from, int64_t units) {
    const Layer::Shape shape = layer.state_shape(units);
    if (!storage.has_empty_rows) return plain_empty(shape, exact);
    return from ? plain_empty(shape, exact).copy_(*from) : at::zeros(shape, exact);
  };
  if (output_mask[1]) out.dh0 = through(dh_n, layer.sizes.output);
  if (output_mask[2] && has_cell_state(layer.cell)) out.dc0 = through(dc_n, layer.sizes.hidden);
  out.dparams.resize(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    if (!output_mask[3 + i]) continue;
    const bool rounded = params[i].dim() == 2 && rounds_itself(call);
    out.dparams[i] = empty_or_zero(params[i].sizes(), no_steps, rounded ? x.options() : exact);
  }
  with_types(call, [&]<class S, class E>() { BackwardRun<S, E>(call, storage, saved, out).run(); });

  const auto result = [&](const at::Tensor& t) {
    return t.defined() ? as_dtype(t, layer.dtype) : plain_empty({0}, x.options());
  };
  std::vector<at::Tensor> dparams;
  for (const at::Tensor& t : out.dparams) dparams.push_back(result(t));
  return {result(out.dx), result(out.dh0), result(out.dc0), std::move(dparams)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) { m.impl("layer_backward", layer_backward); }

}  // namespace fusedrnn
