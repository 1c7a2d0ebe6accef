// The forward op on the CPU: allocation, chunks of time, teams.
#include <torch/library.h>

#include <tuple>

#include "cpu/call_cpu.h"
#include "cpu/call_scratch.h"
#include "cpu/weights_cpu.h"

namespace fusedrnn {
namespace {

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Of so few threads, each has gates of its own, so that no prefetcher runs into another's. Of more,
// the room that stays unused between their rows and units would be too much.
constexpr int kMostApart = 4;

// Whether the last call of these weights began at their other end.
bool began_at_other_end(const at::Tensor& weights) {
  thread_local uint64_t began = 0;  // by a hash of their place: to be wrong costs time alone
  const uint64_t bit = uint64_t{1} << (reinterpret_cast<uintptr_t>(weights.const_data_ptr()) *
                                           uint64_t{0x9E3779B97F4A7C15} >>
                                       58);
  return ((began ^= bit) & bit) != 0;
}

// Copies the cell states with which the walk leaves segment i for the next one.
template <class S, class W>
void keep_between_segments(const ForwardArgs<S, W>& args, const std::vector<int64_t>& bounds,
                           int64_t i, S* cells) {
  const Schedule& schedule = args.schedule;
  const int64_t hidden = args.sizes.hidden_padded();
  const int64_t segments = static_cast<int64_t>(bounds.size()) - 1;
  for (int d = 0; d < args.directions; ++d) {
    const int64_t bound = args.direction[d].reverse ? segments - 1 - i : i + 1;
    if (bound == 0 || bound == segments) continue;
    for (int64_t b = 0; b < schedule.rows[bounds[bound]]; ++b) {
      const S* from = args.direction[d].c + state_row(schedule, b) * hidden;
      const int64_t row = (bound - 1) * schedule.batch + b;
      std::copy(from, from + hidden, cells + (row * args.directions + d) * hidden);
    }
  }
}

// Results as the kernels write them: h_n undefined where y holds it, gates and cells empty where
// they are not kept.
struct ForwardTensors {
  at::Tensor y, h_n, c_n, gates, cells;
};

template <class S, class E>
class ForwardRun {
 public:
  // training: whether a backward call is to follow.
  ForwardRun(const CpuCall& call, const ScheduleStorage& storage, const LayerInputs& in,
             bool training, const ForwardTensors& out)
      : layer_(call.layer),
        isa_(call.isa),
        out_(out),
        hidden_(layer_.sizes.hidden_padded()),
        output_(layer_.sizes.output_padded()),
        width_(saved_blocks(layer_.cell) * hidden_),
        saved_stride_(layer_.saved_stride()),
        stride_(row_stride<S>(width_)),
        keeps_gates_(out.gates.numel() > 0),
        gates_as_kept_(out.gates.scalar_type() == kDtype<S>),
        in_segments_(!keeps_gates_ && out.cells.numel() > 0),
        work_(workload_of(call, storage.view, training ? 3 : 1)),
        packs_(worth_packing(work_)),
        joins_(packs_ && joins_input(work_, at::get_num_threads(), isa_.vector_bytes)),
        bounds_(bounds(storage.view)),
        most_rows_(chunk_rows(storage.view, bounds_)),
        state_rows_(
            state_rows(work_, at::get_num_threads(), std::min(hidden_, output_) * sizeof(S))),
        x_(in.x),
        h0_(in.h0),
        c0_(in.c0) {
    args_.sizes = layer_.sizes;
    args_.schedule = storage.view;
    if (!state_rows_.empty()) args_.schedule.state_row = state_rows_.data();
    args_.directions = layer_.directions;
    args_.save = keeps_gates_;
    args_.joined = joins_ ? padded(layer_.sizes.input) : 0;
    if (!packs_ && goes_back_and_forth(args_.schedule, work_)) {
      args_.by_panel = most_rows_ < kLeastAcross;
      args_.from_end = began_at_other_end(in.params[0]);
    }
    // The cell state needs no room of its own.
    walks_in_c_n_ = !kNarrow && lies_as_read(layer_.sizes.hidden, args_.schedule);
    for (int d = 0; d < layer_.directions; ++d) describe(d, storage, in);
    allocate();
    fill_states(storage.has_empty_rows);
  }

  void run() {
    const auto kernel = isa_.table<S, E>().forward[static_cast<int>(layer_.cell)];
    const int64_t chunks = static_cast<int64_t>(bounds_.size()) - 1;
    for (int64_t i = 0; i < chunks; ++i) {
      for (int d = 0; d < layer_.directions; ++d) enter_chunk(d, i);
      run_chunk(work_, args_, kernel);
      if (in_segments_) {
        keep_between_segments(args_, bounds_, i, out_.cells.mutable_data_ptr<S>());
      }
      for (int d = 0; d < layer_.directions; ++d) leave_chunk(d);
    }
    keep_final_states();
  }

 private:
  static constexpr bool kNarrow = !std::is_same_v<S, E>;

  std::vector<int64_t> bounds(const Schedule& schedule) const {
    if (in_segments_) return segment_bounds(schedule);
    // No gates that should stay in the cache until a step reads them: nothing to cut the walk for.
    if (joins_ && !keeps_gates_) return {0, schedule.steps};
    return chunk_bounds(schedule, work_);
  }

  void describe(int d, const ScheduleStorage& storage, const LayerInputs& in) {
    ForwardDirection<S, Word<E>>& dir = args_.direction[d];
    const Sizes& sizes = layer_.sizes;
    weights_[d] = WeightValues<S, E>(layer_, in.params, d, /*biases=*/true);
    dir.reverse = d == 1;
    dir.weights = weights_[d].view();
    if constexpr (kNarrow) {
      dir.x_half = x_.data();
      dir.y_half = data_of<E>(out_.y) + d * sizes.output;
    } else {
      dir.x = x_.data();
      dir.y = data_of<E>(out_.y) + d * sizes.output;
    }
    dir.y_stride = layer_.directions * sizes.output;
    dir.reset = storage.reset_of(d);
    dir.saved_stride = layer_.directions * saved_stride_;
    dir.gates_stride = keeps_gates_ && gates_as_kept_ ? dir.saved_stride : stride_;
    dir.cells_stride = layer_.directions * hidden_;
    if (!has_cell_state(layer_.cell)) return;
    if (keeps_gates_) dir.cells = out_.cells.mutable_data_ptr<S>() + d * hidden_;
    if (walks_in_c_n_) dir.c = out_.c_n.mutable_data_ptr<S>() + d * layer_.batch * hidden_;
  }

  void allocate() {
    const Sizes& sizes = layer_.sizes;
    const int threads = most_of_plans(work_, args_.schedule, bounds_).threads;
    const int64_t states = state_row(args_.schedule, layer_.batch);
    if constexpr (kNarrow) scratch_.want(&h_n_, layer_.directions * layer_.batch * sizes.output);
    scratch_.want_zeros(&args_.zeros, sizes.zero_count());
    for (int d = 0; d < layer_.directions; ++d) {
      ForwardDirection<S, Word<E>>& dir = args_.direction[d];
      if (packs_) {
        want_packed(scratch_, layer_.cell, sizes, kWordValues<E>, joins_, dir.packed);
      }
      want_biases(scratch_, layer_.cell, sizes, dir.packed);
      for (S*& h : dir.h) scratch_.want(&h, states * (args_.joined + output_));
      if (has_cell_state(layer_.cell) && !walks_in_c_n_) scratch_.want(&dir.c, states * hidden_);
      if (sizes.projected) scratch_.want(&dir.h_tilde, states * hidden_);
      if (!(keeps_gates_ && gates_as_kept_) && (keeps_gates_ || !joins_)) {
        const bool in_one_place = (keeps_gates_ && !kNarrow) || threads > kMostApart;
        dir.gates_thread_stride = in_one_place ? 0 : most_rows_ * stride_;
        scratch_.want(&dir.gates, (in_one_place ? 1 : threads) * most_rows_ * stride_);
      }
    }
    if constexpr (kNarrow) want_words(scratch_, threads, most_rows_, kWordValues<E>, args_);
    if (!packs_ && most_rows_ >= kLeastAcross) {
      args_.across_stride = whole_panels(std::min(most_rows_, kMostAcross)) *
                            words_of<E>(std::max(sizes.input + sizes.output, sizes.hidden));
      scratch_.want(&args_.across, threads * args_.across_stride);
    }
    want_rows(scratch_, threads, layer_.batch, args_);
    if (!joins_) want_group_rows(scratch_, threads, most_rows_, args_);
    scratch_.allocate();
    if constexpr (!kNarrow) h_n_ = out_.h_n.mutable_data_ptr<S>();
  }

  void fill_states(bool has_empty_rows) {
    const Schedule& schedule = args_.schedule;
    const int64_t h_size = layer_.batch * layer_.sizes.output;
    const int64_t c_size = layer_.batch * layer_.sizes.hidden;
    if (has_empty_rows) {
      const int64_t all = layer_.directions * h_size;
      if (h0_.data() != nullptr) {
        std::copy(h0_.data(), h0_.data() + all, h_n_);
      } else {
        std::fill(h_n_, h_n_ + all, S(0));
      }
    }
    const bool all_start_at_once =
        schedule.steps > 0 && schedule.rows[schedule.steps - 1] == schedule.rows[0];
    for (int d = 0; d < layer_.directions; ++d) {
      ForwardDirection<S, Word<E>>& dir = args_.direction[d];
      dir.h_n = h_n_ + d * h_size;
      for (S* h : dir.h) {
        fill_state(h, h0_.data() ? h0_.data() + d * h_size : nullptr, layer_.sizes.output, schedule,
                   args_.joined);
        if (all_start_at_once) break;
      }
      if (dir.c != nullptr) {
        fill_state(dir.c, c0_.data() ? c0_.data() + d * c_size : nullptr, layer_.sizes.hidden,
                   schedule);
      }
    }
  }

  void enter_chunk(int d, int64_t index) {
    ForwardDirection<S, Word<E>>& dir = args_.direction[d];
    dir.chunk = chunk_of(bounds_, index, dir.reverse, false);
    if (!keeps_gates_) return;
    const int64_t first = args_.schedule.row0[dir.chunk.begin];
    const int64_t at = (first * layer_.directions + d) * saved_stride_;
    if constexpr (kNarrow) {
      dir.saved_half = data_of<uint16_t>(out_.gates) + at;
    } else if (gates_as_kept_) {
      dir.gates = data_of<S>(out_.gates) + at;
    }
  }

  void leave_chunk(int d) {
    ForwardDirection<S, Word<E>>& dir = args_.direction[d];
    dir.turn ^= (dir.chunk.end - dir.chunk.begin) & 1;
    if (!keeps_gates_ || gates_as_kept_ || kNarrow) return;
    const int64_t first = args_.schedule.row0[dir.chunk.begin];
    const int64_t rows = args_.schedule.row0[dir.chunk.end] - first;
    out_.gates.narrow(0, first, rows)
        .select(1, d)
        .narrow(1, 0, width_)
        .copy_(at::from_blob(dir.gates, {rows, width_}, {stride_, 1}, kDtype<S>));
  }

  // Those that the kernels have not written where they are wanted.
  void keep_final_states() {
    const Schedule& schedule = args_.schedule;
    const Sizes& sizes = layer_.sizes;
    const auto keep = [&](const S* from, int64_t n, E* to) {
      if constexpr (kNarrow) {
        isa_.bf16.round(from, to, n);
      } else {
        std::copy(from, from + n, to);
      }
    };
    if (kNarrow && out_.h_n.defined()) {
      keep(h_n_, layer_.directions * layer_.batch * sizes.output, data_of<E>(out_.h_n));
    }
    if (!has_cell_state(layer_.cell) || walks_in_c_n_) return;
    E* to = data_of<E>(out_.c_n);
    for (int d = 0; d < layer_.directions; ++d) {
      for (int64_t b = 0; b < layer_.batch; ++b) {
        const int64_t row = d * layer_.batch + caller_row(schedule, b);
        keep(args_.direction[d].c + state_row(schedule, b) * hidden_, sizes.hidden,
             to + row * sizes.hidden);
      }
    }
  }

  const Layer& layer_;
  const Isa& isa_;
  const ForwardTensors& out_;
  const int64_t hidden_, output_;  // padded
  const int64_t width_;            // of a row of gates
  const int64_t saved_stride_;     // from one to the next of those that are kept,
  const int64_t stride_;           // and of the others
  const bool keeps_gates_;
  const bool gates_as_kept_;  // in the arithmetic's type
  const bool in_segments_;    // the cell state is kept between segments of time alone
  const Workload work_;
  const bool packs_, joins_;
  const std::vector<int64_t> bounds_;
  const int64_t most_rows_;
  const std::vector<int64_t> state_rows_;
  const Values<E> x_;
  const Values<S> h0_, c0_;
  bool walks_in_c_n_;
  WeightValues<S, E> weights_[2];
  ForwardArgs<S, Word<E>> args_{};
  Scratch scratch_;
  S* h_n_ = nullptr;  // (D, B, P): the result, or where that is narrow, before it is rounded
};

Outputs layer_forward(const std::string& mode, const at::Tensor& x, const OptionalTensor& lengths,
                      const OptionalTensor& batch_sizes, const OptionalTensor& reset,
                      const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList params,
                      bool has_biases, bool bidirectional, bool save, bool recompute) {
  const LayerInputs in{x, lengths, batch_sizes, reset, h0, c0, params};
  const Layer layer(mode, in, has_biases, bidirectional);
  const ScheduleStorage storage(layer, in);
  const Sizes& sizes = layer.sizes;
  const bool lstm = has_cell_state(layer.cell);
  const auto exact = x.options().dtype(layer.accumulate);
  const int64_t directions = layer.directions;
  // Narrow layers read and write bfloat16 as it is; half precision is else widened on the way in
  // and rounded on the way out.
  const CpuCall call(layer);
  const bool narrow = call.narrow;
  const auto kept = narrow ? x.options() : exact;
  // Of a single step, the output and the final state are one.
  ForwardTensors out;
  if (!(layer.one_step && narrow)) out.h_n = plain_empty(layer.state_shape(sizes.output), kept);
  out.y = layer.one_step && !narrow ? out.h_n : empty_tensor(layer.y_shape(), kept);
  if (storage.padded) zero_padding(out.y, layer, storage.view);
  const bool save_gates = save && keeps_gates(layer.cell) && !recompute;
  const bool save_cells = save && lstm;
  const auto empty_where = [](bool wanted, at::IntArrayRef shape,
                              const at::TensorOptions& options) {
    return wanted ? empty_tensor(shape, options) : plain_empty({0}, options);
  };
  const int64_t stride = layer.saved_stride();
  out.c_n = empty_where(lstm, layer.state_shape(sizes.hidden), kept);
  out.gates = empty_where(save_gates, {layer.rows, directions, stride}, x.options());
  out.cells = empty_where(save_cells, layer.cells_shape(recompute), exact);
  // What no step reaches: the same call gives the same tensors.
  const int64_t gates_width = saved_blocks(layer.cell) * sizes.hidden_padded();
  if (save_gates && stride > gates_width) {
    out.gates.narrow(2, gates_width, stride - gates_width).zero_();
  }
  if (storage.padded) {
    const int64_t valid = storage.view.row0[storage.view.steps];
    if (save_gates) out.gates.narrow(0, valid, layer.rows - valid).zero_();
    if (save_cells && !recompute) out.cells.narrow(0, valid, layer.rows - valid).zero_();
  }
  if (save_cells && recompute && (storage.padded || layer.packed)) out.cells.zero_();
  with_types(call,
             [&]<class S, class E>() { ForwardRun<S, E>(call, storage, in, save, out).run(); });
  if (layer.one_step) {
    if (narrow) out.h_n = out.y;
    out.y = plain_empty({0}, x.options());
  }
  return {as_dtype(out.y, layer.dtype), as_dtype(out.h_n, layer.dtype),
          as_dtype(out.c_n, layer.dtype), out.gates, out.cells};
}

at::Tensor activation(const std::string& name, const std::string& isa_name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(name == "sigmoid" || name == "tanh",
                    "name: expected 'sigmoid' or 'tanh', got '", name, "'");
  const Isa* isa = find_isa(isa_name);
  TORCH_CHECK_VALUE(isa != nullptr, "isa: '", isa_name, "' is not usable here");
  const at::Tensor from = x.contiguous();
  at::Tensor to = at::empty_like(from);
  const auto run = [&]<class S>() {
    const KernelTable<S>& table = isa->table<S>();
    const FlushDenormals flush;
    (name == "tanh" ? table.tanh : table.sigmoid)(from.const_data_ptr<S>(),
                                                  to.mutable_data_ptr<S>(), from.numel());
  };
  if (x.scalar_type() == at::kDouble) {
    run.operator()<double>();
  } else {
    TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, "x: expected float32 or float64, got ",
                     x.scalar_type());
    run.operator()<float>();
  }
  return to;
}

}  // namespace

TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) {
  m.impl("layer_forward", layer_forward);
  m.impl("activation", activation);
}

}  // namespace fusedrnn
