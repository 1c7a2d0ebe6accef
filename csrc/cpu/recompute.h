// What forward has left out to save memory: gates and cells, made anew from x and y a chunk at a
// time, just before backward reads them.
//
// The states are known, they are the layer's output, so nothing is walked: a chunk's rows are one
// product, whatever its steps, and nobody waits for anybody.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/call_cpu.h"
#include "cpu/call_scratch.h"
#include "cpu/weights_cpu.h"

namespace fusedrnn {

template <class S, class E>
class Recompute {
 public:
  // A backward call over the chunks between `bounds`, which are forward's segments; cells:
  // (segments - 1, B, D, Hp), of an LSTM, the cell states between them. Both to be kept as long as
  // this.
  Recompute(const CpuCall& call, const ScheduleStorage& storage, const LayerInputs& in,
            const S* cells, const Workload& work, const std::vector<int64_t>& bounds)
      : layer_(call.layer),
        kernel_(call.isa.table<S, E>().forward[static_cast<int>(layer_.cell)]),
        bounds_(bounds),
        work_(work),
        hidden_(layer_.sizes.hidden_padded()),
        stride_(row_stride<E>(saved_blocks(layer_.cell) * hidden_)),
        between_(cells) {
    args_.sizes = layer_.sizes;
    args_.schedule = storage.view;
    args_.directions = layer_.directions;
    args_.save = true;
    const int64_t most_rows = chunk_rows(args_.schedule, bounds);
    const int threads = most_of_plans(work, args_.schedule, bounds).threads;
    scratch_.want_zeros(&args_.zeros, args_.sizes.zero_count());
    want_rows(scratch_, threads, most_rows, args_);
    want_group_rows(scratch_, threads, most_rows, args_);
    if constexpr (kNarrow) want_words(scratch_, threads, most_rows, kWordValues<E>, args_);
    for (int d = 0; d < layer_.directions; ++d) {
      ForwardDirection<S, Word<E>>& dir = args_.direction[d];
      weights_[d] = WeightValues<S, E>(layer_, in.params, d, /*biases=*/true);
      dir.reverse = d == 1;
      dir.weights = weights_[d].view();
      dir.reset = storage.reset_of(d);
      want_scratch(d, most_rows, threads);
    }
    scratch_.allocate();
    fill_states(in);
  }

  // For the chunks that the directions are about to walk back: tells them where gates and cells
  // are.
  void run(BackwardDirection<S, E>* directions) {
    for (int d = 0; d < layer_.directions; ++d) enter_chunk(d, directions[d]);
    run_chunk(work_, args_, kernel_);
  }

 private:
  static constexpr bool kNarrow = !std::is_same_v<S, E>;

  void want_scratch(int d, int64_t most_rows, int threads) {
    ForwardDirection<S, Word<E>>& dir = args_.direction[d];
    const int64_t output = layer_.sizes.output_padded();
    want_packed(scratch_, layer_.cell, layer_.sizes, kWordValues<E>, /*joins=*/false, dir.packed);
    want_biases(scratch_, layer_.cell, layer_.sizes, dir.packed);
    scratch_.want(&dir.h[0], layer_.batch * output);
    scratch_.want(&dir.h[1], threads * std::max(hidden_, output));
    dir.gates_stride = row_stride<S>(saved_blocks(layer_.cell) * hidden_);
    scratch_.want(&dir.gates, most_rows * dir.gates_stride);
    if constexpr (kNarrow) {
      dir.saved_stride = stride_;
      scratch_.want(&dir.saved_half, most_rows * stride_);
      scratch_.want(&widened_[d], most_rows_with_neighbours() * layer_.sizes.output);
    }
    dir.cells_stride = hidden_;
    if (has_cell_state(layer_.cell)) {
      scratch_.want(&dir.c, layer_.batch * hidden_);
      scratch_.want(&cells_[d], (most_rows + layer_.batch) * hidden_);
    }
  }

  void fill_states(const LayerInputs& in) {
    const Values<S> h0(in.h0), c0(in.c0);
    for (int d = 0; d < layer_.directions; ++d) {
      ForwardDirection<S, Word<E>>& dir = args_.direction[d];
      const auto fill = [&](S* to, const Values<S>& states, int64_t units) {
        const S* from = states.data();
        if (from != nullptr) from += d * layer_.batch * units;
        fill_state(to, from, units, args_.schedule);
      };
      fill(dir.h[0], h0, layer_.sizes.output);
      if (dir.c != nullptr) fill(dir.c, c0, layer_.sizes.hidden);
      dir.y = dir.h[1];
    }
  }

  void enter_chunk(int d, BackwardDirection<S, E>& to) {
    ForwardDirection<S, Word<E>>& dir = args_.direction[d];
    const Schedule& schedule = args_.schedule;
    dir.chunk = to.chunk;
    to.gates_stride = stride_;
    if constexpr (kNarrow) {
      dir.x_half = to.x;
      dir.known = widen(d, to);
      dir.y_stride = layer_.sizes.output;
      to.gates = dir.saved_half;
    } else {
      dir.x = to.x;
      dir.known = to.y;
      dir.y_stride = to.y_stride;
      to.gates = dir.gates;
    }
    if (!has_cell_state(layer_.cell)) return;
    // Beside the chunk's own cells stand those of the step walked just before it: behind them in
    // the reverse direction, else in front.
    const int64_t t = dir.reverse ? dir.chunk.end : dir.chunk.begin;  // where the chunk begins
    const int64_t before = dir.reverse ? t : t - 1;
    const int64_t first_step = dir.reverse ? dir.chunk.begin : std::max<int64_t>(before, 0);
    dir.cells = cells_[d] - schedule.row0[first_step] * hidden_;
    to.cells = dir.cells;
    to.cells_stride = hidden_;
    if (t == 0 || t == schedule.steps) return;
    const int64_t bound = std::lower_bound(bounds_.begin(), bounds_.end(), t) - bounds_.begin();
    const int64_t rows = (bound - 1) * schedule.batch;
    for (int64_t b = 0; b < schedule.rows[t]; ++b) {
      const S* from = between_ + ((rows + b) * layer_.directions + d) * hidden_;
      std::copy(from, from + hidden_, dir.cells + (schedule.row0[before] + b) * hidden_);
    }
  }

  // The first and the last step, exclusive, of a chunk and of its neighbours.
  std::pair<int64_t, int64_t> with_neighbours(const Chunk& chunk) const {
    return {std::max<int64_t>(chunk.begin - 1, 0), std::min(chunk.end + 1, args_.schedule.steps)};
  }

  // Rows of x and y of steps before `step`.
  int64_t io_rows(int64_t step) const {
    const Schedule& schedule = args_.schedule;
    return schedule.io_row == nullptr ? schedule.row0[step] : step * schedule.batch;
  }

  int64_t most_rows_with_neighbours() const {
    int64_t most = 0;
    for (size_t i = 0; i + 1 < bounds_.size(); ++i) {
      const auto [begin, end] = with_neighbours({bounds_[i], bounds_[i + 1], false, false});
      most = std::max(most, io_rows(end) - io_rows(begin));
    }
    return most;
  }

  // The direction's part of y around the chunk in the arithmetic's type, (io rows, P).
  const S* widen(int d, const BackwardDirection<S, E>& from) {
    const auto [begin, end] = with_neighbours(from.chunk);
    const int64_t first = io_rows(begin), output = layer_.sizes.output;
    S* to = widened_[d] - first * output;
    for (int64_t row = first; row < io_rows(end); ++row) {
      const auto* y = reinterpret_cast<const c10::BFloat16*>(from.y + row * from.y_stride);
      std::copy(y, y + output, to + row * output);
    }
    return to;
  }

  const Layer& layer_;
  void (*const kernel_)(const ForwardArgs<S, Word<E>>&, const Slot&);
  const std::vector<int64_t>& bounds_;
  const Workload work_;
  const int64_t hidden_;    // padded
  const int64_t stride_;    // of a row of gates as backward reads them
  const S* const between_;  // cells
  WeightValues<S, E> weights_[2];
  ForwardArgs<S, Word<E>> args_{};
  Scratch scratch_;
  S *cells_[2] = {}, *widened_[2] = {};
};

}  // namespace fusedrnn
