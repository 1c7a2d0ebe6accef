// One chunk of backpropagation through time: the steps in the opposite order, each giving the
// gradients of its gates, from which gradients_inl.h makes those of the weights and inputs.
#pragma once

#include "cell_math.h"
#include "cpu/state_gradients_inl.h"

FUSEDRNN_ISA_BEGIN

template <Cell kCell, class S, class E>
class BackwardChunk : public StateGradients<S, E> {
  using Base = StateGradients<S, E>;

 public:
  BackwardChunk(const BackwardArgs<S, E>& args, const BackwardDirection<S, E>& direction,
                const Slot& slot)
      : Base(kCell, args, direction, slot), rows_(args.rows + slot.thread * args.rows_stride) {}

  void walk() const {
    const Chunk& chunk = d_.chunk;
    for (int64_t i = 0; i < chunk.end - chunk.begin; ++i) {
      step(d_.reverse ? chunk.begin + i : chunk.end - 1 - i);
    }
    const int64_t t = d_.reverse ? chunk.end - 1 : chunk.begin;
    const Range rows = {own_rows_.begin, std::min(own_rows_.end, schedule_.rows[t])};
    if (chunk.last) {
      finish(t, rows);
    } else {
      keep_dgates(t, rows);
    }
  }

 private:
  using Base::dgates, Base::dgates_after, Base::dy_of, Base::each, Base::final_gradient,
      Base::finish, Base::from_end, Base::keep_dgates, Base::output_gradients, Base::zeros;
  using Base::kSideRows, Base::kWidth;
  using Base::sizes_, Base::schedule_, Base::d_, Base::slot_, Base::zeros_, Base::hidden_,
      Base::output_, Base::own_output_panels_, Base::own_hidden_panels_, Base::own_rows_,
      Base::first_row_;
  using typename Base::F;
  static constexpr int kGradientBlocks = gradient_blocks(kCell).count;

  using Row = BackwardRow<S, E>;

  // u: the step walked before t.
  Row row_of(int64_t t, int64_t u, int64_t b) const {
    const int64_t packed_row = schedule_.row0[t] + b;
    const bool starting = b >= rows_at(schedule_, u);
    Row row{};
    row.dgates = dgates(packed_row);
    row.dgates_after = dgates_after(u, b, starting);
    row.dy = dy_of(packed_row);
    if constexpr (is_rnn(kCell)) {
      row.h = d_.y + io_row(schedule_, packed_row) * d_.y_stride;
    } else {
      row.gates = d_.gates + (packed_row - first_row_) * d_.gates_stride;
      row.carry = d_.carry + state_row(schedule_, b) * hidden_;
      row.carried = !starting && is_reset(d_.reset, schedule_, u, b) ? zeros_ : row.carry;
      if constexpr (kCell == Cell::kLstm) {
        const int64_t before = previous_row(schedule_, d_.reverse, t, b);
        const bool cut = is_reset(d_.reset, schedule_, t, b);
        row.c = d_.cells + packed_row * d_.cells_stride;
        row.c_prev = cut           ? zeros_
                     : before >= 0 ? d_.cells + before * d_.cells_stride
                                   : d_.c0 + b * hidden_;
        if (d_.h_tilde != nullptr) row.h_tilde = d_.h_tilde + (packed_row - first_row_) * hidden_;
      } else {
        row.h = entering_h(d_, schedule_, t, b, output_);
        if (row.h == nullptr) row.h = zeros();
      }
    }
    return row;
  }

  void step(int64_t t) const {
    const int64_t u = d_.reverse ? t - 1 : t + 1;
    const int64_t rows = schedule_.rows[t], rows_before = rows_at(schedule_, u);
    const Range mine = {own_rows_.begin, std::min(own_rows_.end, rows)};
    const Range going_on = {mine.begin, std::min(mine.end, rows_before)};
    const Range starting = {std::max(mine.begin, rows_before), mine.end};
    for (int64_t b = mine.begin; b < mine.end; ++b) ::new (&rows_[b]) Row(row_of(t, u, b));
    if (kCell == Cell::kLstm && sizes_.projected) {
      // dh passes through W_hr before it meets the cell.
      output_gradients(t, u, going_on, false);
      output_gradients(t, u, starting, true);
      slot_.wait_parts();
      cell_gradients_of_projection(t, mine);
    } else {
      cell_gradients(t, u, going_on, false);
      cell_gradients(t, u, starting, true);
    }
    finish(u, {std::max(own_rows_.begin, rows), std::min(own_rows_.end, rows_before)});
    slot_.wait_parts();
  }

  __attribute__((noinline)) void cell_gradients(int64_t t, int64_t u, Range rows,
                                                bool starting) const {
    const int64_t next = d_.reverse ? t + 1 : t - 1;
    // Not before a barrier, which it would hold up.
    const int64_t rows_next = slot_.parts == 1 ? rows_in_chunk(schedule_, d_.chunk, next) : 0;
    const auto fetch_row = [&](int64_t b, int64_t panel)
                               __attribute__((always_inline)) { fetch(rows_[b], panel); };
    const auto fetch_next_step = [&](int64_t b, int64_t panel) __attribute__((always_inline)) {
      if (b < rows_next) fetch(row_of(next, t, b), panel);
    };
    const auto left = [&](int64_t b) __attribute__((always_inline)) {
      return as_words<E>(rows_[b].dgates_after);
    };
    this->template dh_product<kTileRows<F, kStepVectors>>(
        u, rows, starting, left,
        [&]<int R, int NV>(const Tile<S, R, NV>& tile, int64_t b0, int64_t panel)
            __attribute__((always_inline)) {
#pragma GCC unroll 1
              for (int r = 0; r < R; ++r) {
                if (R > 2) {
                  with_next_tile(rows, own_output_panels_, from_end(u), b0 + R + r, panel,
                                 fetch_row, fetch_next_step);
                }
                const Row& row = rows_[b0 + r];
#pragma GCC unroll 2
                for (int v = 0; v < NV; ++v) {
                  const int64_t unit = panel * kWidth + v * kLanes<S>;
                  if (unit >= hidden_) break;
                  Vec<S> dh = tile.sum[r][v] + read(row.dy + unit, sizes_.output - unit);
                  if (starting) dh += final_gradient(b0 + r, unit);
                  cell_gradient(row, unit, dh);
                }
              }
            });
  }

  // The row by value: its stores might otherwise change what it holds, for all the compiler knows.
  FUSEDRNN_HD void cell_gradient(const Row row, int64_t unit, Vec<S> dh) const {
    const int64_t stride = hidden_, units = sizes_.hidden - unit, outputs = sizes_.output - unit;
    // The padding's sums are zero times what the rows hold: NaN of an infinite x, which W_hh's
    // zeros would carry to every unit.
    const auto put = [&](int block, Vec<S> value) __attribute__((always_inline)) {
      write(row.dgates + block * stride + unit, with_first_lanes<S>(value, units));
    };
    if constexpr (is_rnn(kCell)) {
      put(0, RnnActivation<kCell>::backward(read(row.h + unit, outputs), dh));
    } else {
      const E* g = row.gates + unit;
      const Vec<S> g0 = read(g), g1 = read(g + stride), g2 = read(g + 2 * stride),
                   g3 = read(g + 3 * stride);
      const Vec<S> carried = load(row.carried + unit);
      if constexpr (kCell == Cell::kLstm) {
        const LstmGradient<Vec<S>> s =
            lstm_backward(LstmGates<Vec<S>>{g0, g1, g2, g3}, load(row.c_prev + unit),
                          load(row.c + unit), dh, carried);
        put(0, s.dgates.i);
        put(1, s.dgates.f);
        put(2, s.dgates.g);
        put(3, s.dgates.o);
        store(row.carry + unit, s.dc_prev);
        if (row.h_tilde != nullptr) write(row.h_tilde + unit, s.h_tilde);
      } else {
        const GruGradient<Vec<S>> s =
            gru_backward(g0, g1, g2, g3, read(row.h + unit, outputs), dh + carried);
        put(0, s.da_hn);
        put(1, s.da_r);
        put(2, s.da_z);
        put(3, s.da_in);
        store(row.carry + unit, s.dh_prev);
      }
    }
  }

  FUSEDRNN_HD void fetch(const Row& row, int64_t panel) const {
    for (int v = 0; v < kStepVectors; ++v) {
      const int64_t unit = panel * kWidth + v * kLanes<S>;
      for (int block = 0; block < kGradientBlocks; ++block) {
        fetch_to_write(row.dgates + block * hidden_ + unit);
        if (row.gates != nullptr) fetch_to_read(row.gates + block * hidden_ + unit);
      }
      if constexpr (kCell == Cell::kLstm) {
        fetch_to_read(row.c_prev + unit);
        fetch_to_read(row.c + unit);
      } else {
        fetch_to_read(row.h + unit);
      }
      if (row.carry != nullptr) fetch_to_write(row.carry + unit);
      if (d_.dy != nullptr) fetch_to_read(row.dy + unit);
    }
  }

  __attribute__((noinline)) void cell_gradients_of_projection(int64_t t, Range rows) const {
    const int64_t row0 = schedule_.row0[t] - first_row_;
    const auto row_at = [&](int64_t b) { return as_words<E>(d_.dh + (row0 + b) * output_); };
    const int64_t k = format_words<F>(sizes_.output);
    product<F, kStepVectors, Sums::kInMemory, kSideRows>(
        rows, own_hidden_panels_, row_at, d_.packed.projection, k * kWidth, k,
        [&](const auto& tile, int64_t b0, int64_t panel) __attribute__((always_inline)) {
          each(tile, b0, panel, hidden_,
               [&](int64_t b, int64_t unit, Vec<S> sum)
                   __attribute__((always_inline)) { cell_gradient(rows_[b], unit, sum); });
        });
  }

  Row* const rows_;  // of the step
};

FUSEDRNN_ISA_END
