// One chunk of a layer, forward: the projection of the inputs, then the time loop.
#pragma once

#include "cpu/cell_forward_inl.h"
#include "cpu/forward_products_inl.h"

FUSEDRNN_ISA_BEGIN

template <Cell kCell, class S, class F>
class ForwardChunk : public ForwardProducts<gate_blocks(kCell), S, F> {
  static constexpr int kGates = gate_blocks(kCell);
  using Base = ForwardProducts<kGates, S, F>;

 public:
  using typename Base::Word;

  ForwardChunk(const ForwardArgs<S, Word>& args, const ForwardDirection<S, Word>& direction,
               const Slot& slot)
      : Base(kCell, args, direction, slot),
        save_(args.save),
        other_end_first_(args.from_end),
        rows_(args.rows + slot.thread * args.rows_stride) {}

  void walk() {
    turn_ = d_.turn;
    const Chunk& chunk = d_.chunk;
    if (known()) return step(chunk.begin);
    if (joined_ > 0 && chunk.first) {
      join_input(d_.reverse ? chunk.end - 1 : chunk.begin, d_.h[turn_]);
      slot_.wait_parts();
    }
    for (int64_t i = 0; i < chunk.end - chunk.begin; ++i) {
      step(d_.reverse ? chunk.end - 1 - i : chunk.begin + i);
      turn_ ^= 1;
    }
  }

 private:
  using Base::kExact;
  using Base::left_rows;
  using Base::sizes_, Base::schedule_, Base::d_, Base::slot_, Base::gates_, Base::zeros_,
      Base::across_, Base::hidden_, Base::output_, Base::own_panels_, Base::own_output_panels_,
      Base::joined_, Base::joined_inputs_, Base::state_stride_, Base::two_terms_, Base::projects_,
      Base::by_panel_, Base::own_rows_, Base::first_row_;
  using typename Base::OutputPanel, typename Base::Panel;
  using CellStep = CellForward<kCell, S, Saved<S, Word>>;
  using Row = typename CellStep::Row;

  Row row_of(int64_t t, int64_t b) const {
    const int64_t packed_row = schedule_.row0[t] + b, chunk_row = packed_row - first_row_;
    const bool cut = is_reset(d_.reset, schedule_, t, b);
    Row row{};
    S* gates = gates_ == nullptr ? nullptr : gates_ + chunk_row * d_.gates_stride;
    row.gates = projects_ ? gates : d_.packed.bias;
    if constexpr (kExact) {
      row.saved = gates;
    } else if (save_) {
      row.saved = d_.saved_half + chunk_row * d_.saved_stride;
    }
    if constexpr (kCell == Cell::kLstm) {
      row.c = d_.c + state_row(schedule_, b) * hidden_;
      row.c_prev = cut ? zeros_ : row.c;
      if (save_) row.cells = d_.cells + packed_row * d_.cells_stride;
      if (sizes_.projected) row.h_tilde = d_.h_tilde + state_row(schedule_, b) * hidden_;
    }
    // Beside the step's x stand zeros already.
    row.h_prev = cut && joined_ == 0 ? zeros_ : state_at(d_.h[turn_], b);
    row.left = row.h_prev - joined_inputs_;
    row.h = state_at(d_.h[turn_ ^ 1], b);
    row.y = io_row(schedule_, packed_row) * d_.y_stride;
    return row;
  }

  // Whether the chunk's states are; never of a cell whose state is all that backward needs.
  bool known() const { return keeps_gates(kCell) && d_.known != nullptr; }

  // row_of where states are known: the product reads them there, and none is made.
  Row known_row_of(int64_t t, int64_t b) const {
    const int64_t before = previous_row(schedule_, d_.reverse, t, b);
    Row row = row_of(t, b);
    if (!is_reset(d_.reset, schedule_, t, b) && before >= 0) {
      row.left = d_.known + io_row(schedule_, before) * d_.y_stride;
      if (kCell == Cell::kLstm) row.c_prev = d_.cells + before * d_.cells_stride;
    }
    row.c = row.cells;
    row.h_prev = zeros_;
    row.y = slot_.thread * std::max(hidden_, output_);
    row.h = row.h_tilde = d_.h[1] + row.y;
    return row;
  }

  // This group's rows of all the chunk's steps, each behind the one that it takes its cell from.
  __attribute__((noinline)) Range known_rows() const {
    const Chunk& chunk = d_.chunk;
    Range rows = {0, 0};
    for (int64_t i = 0; i < chunk.end - chunk.begin; ++i) {
      const int64_t t = d_.reverse ? chunk.end - 1 - i : chunk.begin + i;
      const int64_t end = std::min(own_rows_.end, schedule_.rows[t]);
      for (int64_t b = own_rows_.begin; b < end; ++b) {
        ::new (&rows_[rows.end++]) Row(known_row_of(t, b));
      }
    }
    return rows;
  }

  // Step t, or where states are known, all the chunk's.
  void step(int64_t t) {
    const bool known = this->known();
    const Range mine =
        known ? known_rows() : Range{own_rows_.begin, std::min(own_rows_.end, schedule_.rows[t])};
    // Made in place: a copy would read wide what was just written in pieces, and wait for it.
    for (int64_t b = mine.begin; !known && b < mine.end; ++b) ::new (&rows_[b]) Row(row_of(t, b));
    const Row* const at_row = rows_;
    const bool from_end = (turn_ != 0) != other_end_first_;
    const auto left = [&](int64_t b) __attribute__((always_inline)) { return at_row[b].left; };
    const auto put_output = [&](int64_t b, int64_t unit, Vec<S> h) __attribute__((always_inline)) {
      const Row& row = at_row[b];
      store(row.h + unit, h);
      if constexpr (std::is_same_v<F, Bf16>) {
        if (d_.y_half != nullptr) {
          return F::store_half(d_.y_half + row.y + unit, h, sizes_.output - unit);
        }
      }
      store(d_.y + row.y + unit, h, sizes_.output - unit);
    };

    // In a single step nobody has written any before.
    if (slot_.parts > 1 && schedule_.steps > 1 && !known) fetch_states(mine);

    const CellStep cell = {hidden_, save_, d_.packed.bias_hn};
    const auto fetch_of = [&](const Row& row, int64_t unit) __attribute__((always_inline)) {
      for (int g = 0; g < kGates; ++g) {
        if (!kExact) fetch_to_read(row.gates + g * hidden_ + unit);
        if (row.saved != nullptr) fetch_to_write(row.saved + g * hidden_ + unit);
      }
      if (kCell == Cell::kLstm && save_) fetch_to_write(row.cells + unit);
      if (d_.y_half != nullptr) {
        fetch_to_write(d_.y_half + row.y + unit);
      } else {
        fetch_to_write(d_.y + row.y + unit);
      }
    };
    const auto fetch = [&](int64_t b, int64_t panel) __attribute__((always_inline)) {
      const int64_t unit = panel * Panel::blocks * kLanes<S>;
      const Row& row = at_row[b];
      fetch_of(row, unit);
      if (kCell == Cell::kLstm) fetch_to_write(row.c + unit);
      fetch_to_write(row.h + unit);
    };
    // The states are near: every step has them. Not before a barrier, which it would hold up; of
    // the other cells it made no step quicker.
    const int64_t next = d_.reverse ? t - 1 : t + 1;
    const bool ahead = kCell == Cell::kLstm && slot_.parts == 1 && !known;
    const int64_t rows_next = ahead ? rows_in_chunk(schedule_, d_.chunk, next) : 0;
    const auto fetch_next_step = [&](int64_t b, int64_t panel) __attribute__((always_inline)) {
      if (b < rows_next) fetch_of(row_of(next, b), panel * Panel::blocks * kLanes<S>);
    };
    const auto apply = [&]<int R, int NV>(const Tile<S, R, NV>& tile, int64_t b0,
                                          int64_t panel) __attribute__((always_inline)) {
      constexpr int blocks = NV / kGates;
      typename CellStep::Half half[R][blocks];
      const auto each_row = [&](auto f) __attribute__((always_inline)) {
        const auto row = [&](int r) __attribute__((always_inline)) {
#pragma GCC unroll 4
          for (int block = 0; block < blocks; ++block) {
            const int64_t unit = (panel * Panel::blocks + block) * kLanes<S>;
            // A panel's first vector always does.
            const bool exists = block % Panel::blocks == 0 || unit < hidden_;
            f(r, block, unit, exists);
          }
        };
        // A short tile stays in registers. A tall one is a loop over its rows: unrolled, the
        // cell's code for every height would not fit the caches of decoded instructions.
        if constexpr (R <= 2) {
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r) row(r);
        } else {
#pragma GCC unroll 1
          for (int r = 0; r < R; ++r) row(r);
        }
      };
      each_row([&](int r, int block, int64_t unit, bool exists) __attribute__((always_inline)) {
        if (R > 2 && block == 0) {
          with_next_tile(mine, own_panels_, from_end, b0 + R + r, panel, fetch, fetch_next_step);
        }
        half[r][block] = exists ? cell.begin(tile.sum[r] + block * kGates, at_row[b0 + r], unit)
                                : typename CellStep::Half{};
      });
      each_row([&](int r, int block, int64_t unit, bool exists) __attribute__((always_inline)) {
        if (!exists) return;
        const Vec<S> h = cell.finish(half[r][block], at_row[b0 + r], unit);
        if (kCell == Cell::kLstm && sizes_.projected) {
          store(at_row[b0 + r].h_tilde + unit, h);
        } else {
          put_output(b0 + r, unit, h);
        }
      });
    };
    if constexpr (kExact && kCell != Cell::kGru) {
      if (two_terms_) {
        const auto x = [&](int64_t b) {
          return d_.x + io_row(schedule_, schedule_.row0[t] + b) * sizes_.input;
        };
        product_unpacked<kGates, F>(mine, own_panels_, sizes_.hidden, across_, from_end, apply,
                                    Term<S, decltype(x)>{x, d_.weights.w_ih, sizes_.input},
                                    Term<S, decltype(left)>{left, d_.weights.w_hh, sizes_.output});
      }
    }
    if (!two_terms_) {
      const auto from = left_rows(mine, sizes_.output, left);
      const auto multiply = [&](Range panels) {
        this->template multiply_units<kGates>(
            mine, panels, from, d_.packed.recurrent, d_.weights.w_hh, d_.packed.recurrent_scale,
            sizes_.hidden, joined_inputs_ + sizes_.output, apply, from_end);
      };
      const int64_t at_once = by_panel_ ? kRowPanels<Panel::vectors> : own_panels_.size();
      const int64_t turns = by_panel_ ? (own_panels_.size() + at_once - 1) / at_once : 1;
      for (int64_t i = 0; i < turns; ++i) {
        const int64_t begin = own_panels_.begin + (from_end ? turns - 1 - i : i) * at_once;
        const Range panels = {begin, std::min(begin + at_once, own_panels_.end)};
        if (by_panel_) this->project(panels);
        multiply(panels);
      }
    }
    if (known) return;
    if constexpr (kCell == Cell::kLstm) {
      if (sizes_.projected) {
        slot_.wait_parts();
        project_output(mine, put_output);
      }
    }
    keep_final(t, mine);
    if (joined_ > 0) join_input(d_.reverse ? t - 1 : t + 1, d_.h[turn_ ^ 1]);
    slot_.wait_parts();
  }

  // h = W_hr h_tilde
  template <class Put>
  __attribute__((noinline)) void project_output(Range rows, Put put_output) const {
    const auto h_tilde = [&](int64_t b) { return rows_[b].h_tilde; };
    const auto put = [&]<int R, int NV>(const Tile<S, R, NV>& tile, int64_t b0, int64_t panel)
                         __attribute__((always_inline)) {
#pragma GCC unroll 8
                           for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
                             for (int v = 0; v < NV; ++v) {
                               const int64_t unit = (panel * OutputPanel::blocks + v) * kLanes<S>;
                               if (unit < output_) put_output(b0 + r, unit, tile.sum[r][v]);
                             }
                           }
                         };
    this->template multiply_units<1>(
        rows, own_output_panels_, left_rows(rows, sizes_.hidden, h_tilde), d_.packed.projection,
        d_.weights.w_hr, d_.packed.projection_scale, sizes_.output, sizes_.hidden, put);
  }

  S* state_at(S* h, int64_t b) const {
    return h + state_row(schedule_, b) * state_stride_ + joined_;
  }

  // Makes the states in h those that step t reads: this thread's columns of x in front of them, and
  // where t begins a new segment, zeros for its units.
  __attribute__((noinline)) void join_input(int64_t t, S* h) const {
    const Range columns = share(sizes_.input, slot_.part, slot_.parts);
    const Range units = own_units(sizes_.output);
    const int64_t end = std::min(own_rows_.end, rows_at(schedule_, t));
    for (int64_t b = own_rows_.begin; b < end; ++b) {
      S* state = state_at(h, b);
      const S* x = d_.x + io_row(schedule_, schedule_.row0[t] + b) * sizes_.input;
      std::copy(x + columns.begin, x + columns.end, state - sizes_.input + columns.begin);
      if (is_reset(d_.reset, schedule_, t, b)) {
        std::fill(state + units.begin, state + units.end, S(0));
      }
    }
  }

  // This thread's units of h, of `limit` units in all.
  Range own_units(int64_t limit) const {
    const int64_t width = (sizes_.projected ? OutputPanel::blocks : Panel::blocks) * kLanes<S>;
    const int64_t begin = std::min(own_output_panels_.begin * width, limit);
    return {begin, std::min(own_output_panels_.end * width, limit)};
  }

  // Parts write their units of h and read all others': those arrive side by side so, and the lines
  // to be written have become this core's own by the time they are.
  void fetch_states(Range rows) const {
    const Range units = own_units(output_);
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      const S* read = state_at(d_.h[turn_], b);
      S* write = state_at(d_.h[turn_ ^ 1], b);
      for (int64_t i = -joined_; i < output_; i += kLine<S>) fetch_to_read(read + i);
      for (int64_t i = units.begin; i < units.end; i += kLine<S>) fetch_to_write(write + i);
    }
  }

  // Copies this thread's units of the rows for which t was the last step walked to h_n.
  void keep_final(int64_t t, Range mine) const {
    const int64_t going_on = d_.reverse ? (t == 0 ? 0 : mine.end) : rows_at(schedule_, t + 1);
    const Range units = own_units(sizes_.output);
    for (int64_t b = std::max(mine.begin, going_on); b < mine.end; ++b) {
      const S* from = state_at(d_.h[turn_ ^ 1], b);
      std::copy(from + units.begin, from + units.end,
                d_.h_n + caller_row(schedule_, b) * sizes_.output + units.begin);
    }
  }

  const bool save_;
  const bool other_end_first_;
  Row* const rows_;  // of the step
  int turn_ = 0;
};

template <Cell kCell, class S, class F = Exact<S>>
void forward_chunk(const ForwardArgs<S, typename F::Word>& args, const Slot& slot) {
  for (int i = slot.direction_begin; i < slot.direction_end; ++i) {
    ForwardChunk<kCell, S, F> chunk(args, args.direction[i], slot);
    if (args.direction[i].chunk.first) {
      chunk.pack();
      if (slot.groups > 1) slot.wait_team();
    }
    chunk.project();
    chunk.walk();
  }
  release_matrix_unit();
}

// The packing alone, by one thread.
template <Cell kCell, class S, class F = Exact<S>>
void forward_pack(const ForwardArgs<S, typename F::Word>& args, const Slot& slot) {
  ForwardChunk<kCell, S, F>(args, args.direction[0], slot).pack();
}

FUSEDRNN_ISA_END
