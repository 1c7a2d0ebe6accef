// The forward op on the CPU: allocation, chunks of time, teams.
#include <torch/library.h>

#include <tuple>

#include "cpu/ops_cpu.h"

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

// training: whether a backward call is to follow.
template <class S, class E>
void run_forward(const Layer& layer, const ScheduleStorage& storage, const LayerInputs& in,
                 bool training, const at::Tensor& y, const at::Tensor& h_n, const at::Tensor& c_n,
                 const at::Tensor& gates, const at::Tensor& cells) {
  const Sizes& sizes = layer.sizes;
  const bool save = gates.numel() > 0;
  const bool direct = gates.scalar_type() == kDtype<S>;
  const int64_t hidden = sizes.hidden_padded(), output = sizes.output_padded();
  const int64_t gates_width = saved_blocks(layer.cell) * hidden;
  const int64_t saved = layer.saved_width(), stride = row_stride<S>(gates_width);
  const bool in_segments = !save && cells.numel() > 0;
  const Workload work = workload_of(layer, storage.view, training ? 3 : 1);
  const bool packs = worth_packing(work);
  const bool joins = packs && joins_input(work, at::get_num_threads(), current_isa().vector_bytes);
  // No gates that should stay in the cache until a step reads them: nothing to cut the walk for.
  const std::vector<int64_t> bounds = in_segments      ? segment_bounds(storage.view)
                                      : joins && !save ? std::vector<int64_t>{0, storage.view.steps}
                                                       : chunk_bounds(storage.view, work);
  const int64_t most_rows = chunk_rows(storage.view, bounds);
  const int threads = most_of_plans(work, storage.view, bounds).threads;
  const std::vector<int64_t> apart =
      state_rows(work, at::get_num_threads(), std::min(hidden, output) * sizeof(S));
  Schedule schedule = storage.view;
  if (!apart.empty()) schedule.state_row = apart.data();
  constexpr bool narrow = !std::is_same_v<S, E>;
  // The cell state needs no room of its own.
  const bool walks_in_c_n = !narrow && lies_as_read(sizes.hidden, schedule);
  const int64_t states = state_row(schedule, layer.batch);

  const Values<E> x(in.x);
  const Values<S> h0(in.h0), c0(in.c0);
  WeightValues<S, E> weights[2];
  ForwardArgs<S, Word<E>> args{};
  args.sizes = sizes;
  args.schedule = schedule;
  args.directions = layer.directions;
  args.save = save;
  args.joined = joins ? padded(sizes.input) : 0;
  if (!packs && goes_back_and_forth(schedule, work)) {
    args.by_panel = most_rows < kLeastAcross;
    args.from_end = began_at_other_end(in.params[0]);
  }

  Scratch scratch;
  S* last = nullptr;  // (D, B, P): h_n, or where that is narrow, before it is rounded
  const int64_t h_size = layer.batch * sizes.output;
  if constexpr (narrow) scratch.want(&last, layer.directions * h_size);
  S* zeros = nullptr;
  const int64_t zero_count = layer.sizes.zero_count();
  scratch.want(&zeros, zero_count);
  for (int d = 0; d < layer.directions; ++d) {
    ForwardDirection<S, Word<E>>& dir = args.direction[d];
    weights[d] = WeightValues<S, E>(layer, in.params, d, /*biases=*/true);
    dir.reverse = d == 1;
    dir.weights = weights[d].view();
    if constexpr (narrow) {
      dir.x_half = x.data();
      dir.y_half = data_of<E>(y) + d * sizes.output;
    } else {
      dir.x = x.data();
      dir.y = data_of<E>(y) + d * sizes.output;
    }
    dir.y_stride = layer.directions * sizes.output;
    dir.reset = storage.reset_of(d);
    dir.gates_stride = save && direct ? layer.directions * saved : stride;
    dir.saved_stride = layer.directions * saved;
    dir.cells_stride = layer.directions * hidden;
    if (save && has_cell_state(layer.cell)) dir.cells = cells.mutable_data_ptr<S>() + d * hidden;
    if (packs) want_packed<E>(scratch, layer, joins, dir.packed);
    want_biases(scratch, layer, dir.packed);
    for (S*& h : dir.h) scratch.want(&h, states * (args.joined + output));
    if (has_cell_state(layer.cell)) {
      if (walks_in_c_n) {
        dir.c = c_n.mutable_data_ptr<S>() + d * layer.batch * hidden;
      } else {
        scratch.want(&dir.c, states * hidden);
      }
    }
    if (sizes.projected) scratch.want(&dir.h_tilde, states * hidden);
    if (!(save && direct) && (save || !joins)) {
      const bool in_one_place = (save && !narrow) || threads > kMostApart;
      dir.gates_apart = in_one_place ? 0 : most_rows * stride;
      scratch.want(&dir.gates, (in_one_place ? 1 : threads) * most_rows * stride);
    }
  }
  if constexpr (narrow) want_words<E>(scratch, threads, most_rows, args);
  if (!packs && most_rows >= kLeastAcross) {
    args.across_stride = whole_panels(std::min(most_rows, kMostAcross)) *
                         words_of<E>(std::max(sizes.input + sizes.output, sizes.hidden));
    scratch.want(&args.across, threads * args.across_stride);
  }
  args.rows_stride = rows_apart(layer.batch);
  scratch.want(&args.rows, threads * args.rows_stride);
  if (threads > 1 && !joins) {
    args.group_rows_stride = padded(most_rows);
    scratch.want(&args.group_rows, threads * args.group_rows_stride);
  }
  scratch.allocate();
  std::fill(zeros, zeros + zero_count, S(0));
  args.zeros = zeros;
  if constexpr (!narrow) last = h_n.mutable_data_ptr<S>();
  for (int d = 0; d < layer.directions; ++d) args.direction[d].h_n = last + d * h_size;
  if (storage.has_empty_rows) {
    const int64_t all = layer.directions * h_size;
    if (h0.data() != nullptr) {
      std::copy(h0.data(), h0.data() + all, last);
    } else {
      std::fill(last, last + all, S(0));
    }
  }
  const bool all_start_at_once =
      schedule.steps > 0 && schedule.rows[schedule.steps - 1] == schedule.rows[0];
  for (int d = 0; d < layer.directions; ++d) {
    ForwardDirection<S, Word<E>>& dir = args.direction[d];
    const int64_t c_size = layer.batch * sizes.hidden;
    for (S* h : dir.h) {
      fill_state(h, h0.data() ? h0.data() + d * h_size : nullptr, sizes.output, schedule,
                 args.joined);
      if (all_start_at_once) break;
    }
    if (dir.c != nullptr) {
      fill_state(dir.c, c0.data() ? c0.data() + d * c_size : nullptr, sizes.hidden, schedule);
    }
  }

  const auto kernel = current_isa().table<S, E>().forward[static_cast<int>(layer.cell)];
  const int64_t chunks = static_cast<int64_t>(bounds.size()) - 1;
  for (int64_t i = 0; i < chunks; ++i) {
    for (int d = 0; d < layer.directions; ++d) {
      ForwardDirection<S, Word<E>>& dir = args.direction[d];
      dir.chunk = chunk_of(bounds, i, dir.reverse, false);
      const int64_t at = (schedule.row0[dir.chunk.begin] * layer.directions + d) * saved;
      if (save && narrow) {
        dir.saved_half = data_of<uint16_t>(gates) + at;
      } else if (save && direct) {
        dir.gates = data_of<S>(gates) + at;
      }
    }
    run_chunk(work, args, kernel);
    if (in_segments) keep_between_segments(args, bounds, i, cells.mutable_data_ptr<S>());
    for (int d = 0; d < layer.directions; ++d) {
      ForwardDirection<S, Word<E>>& dir = args.direction[d];
      dir.turn ^= (dir.chunk.end - dir.chunk.begin) & 1;
      if (save && !direct && !narrow) {
        const int64_t first = schedule.row0[dir.chunk.begin];
        const int64_t rows = schedule.row0[dir.chunk.end] - first;
        gates.narrow(0, first, rows)
            .select(1, d)
            .narrow(1, 0, gates_width)
            .copy_(at::from_blob(dir.gates, {rows, gates_width}, {stride, 1}, h_n.options()));
      }
    }
  }

  const auto keep = [](const S* from, int64_t n, E* to) {
    if constexpr (narrow) {
      current_isa().bf16.round(from, to, n);
    } else {
      std::copy(from, from + n, to);
    }
  };
  if (narrow && h_n.defined()) keep(last, layer.directions * h_size, data_of<E>(h_n));
  if (has_cell_state(layer.cell) && !walks_in_c_n) {
    E* to = data_of<E>(c_n);
    for (int d = 0; d < layer.directions; ++d) {
      for (int64_t b = 0; b < layer.batch; ++b) {
        const int64_t row = d * layer.batch + caller_row(schedule, b);
        keep(args.direction[d].c + state_row(schedule, b) * hidden, sizes.hidden,
             to + row * sizes.hidden);
      }
    }
  }
}

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
  const bool narrow = is_narrow(layer);
  const auto kept = narrow ? x.options() : exact;
  // Of a single step, the output and the final state are one.
  at::Tensor h_n =
      layer.one_step && narrow ? at::Tensor() : plain_empty(layer.state_shape(sizes.output), kept);
  at::Tensor y = layer.one_step && !narrow ? h_n : empty_tensor(layer.y_shape(), kept);
  if (storage.padded) zero_padding(y, layer, storage.view);
  const bool save_gates = save && saved_blocks(layer.cell) > 1 && !recompute;
  const bool save_cells = save && lstm;
  const auto empty_where = [](bool wanted, at::IntArrayRef shape,
                              const at::TensorOptions& options) {
    return wanted ? empty_tensor(shape, options) : plain_empty({0}, options);
  };
  const at::Tensor c_n = empty_where(lstm, layer.state_shape(sizes.hidden), kept);
  const at::Tensor gates =
      empty_where(save_gates, {layer.rows, directions, layer.saved_width()}, x.options());
  const at::Tensor cells = empty_where(save_cells, layer.cells_shape(recompute), exact);
  // What no step reaches: the same call gives the same tensors.
  const int64_t gates_width = saved_blocks(layer.cell) * sizes.hidden_padded();
  if (save_gates && layer.saved_width() > gates_width) {
    gates.narrow(2, gates_width, layer.saved_width() - gates_width).zero_();
  }
  if (storage.padded) {
    const int64_t valid = storage.view.row0[storage.view.steps];
    if (save_gates) gates.narrow(0, valid, layer.rows - valid).zero_();
    if (save_cells && !recompute) cells.narrow(0, valid, layer.rows - valid).zero_();
  }
  if (save_cells && recompute && (storage.padded || layer.packed)) cells.zero_();
  with_types(layer, [&]<class S, class E>() {
    run_forward<S, E>(layer, storage, in, save, y, h_n, c_n, gates, cells);
  });
  if (layer.one_step) {
    if (narrow) h_n = y;
    y = plain_empty({0}, x.options());
  }
  return {as_dtype(y, layer.dtype), as_dtype(h_n, layer.dtype), as_dtype(c_n, layer.dtype), gates,
          cells};
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
