// One chunk of a layer, forward: the projection of the inputs, then the time loop.
#pragma once

#include "cpu/across_inl.h"
#include "cpu/cell_forward_inl.h"
#include "cpu/walk.h"

FUSEDRNN_ISA_BEGIN

template <Cell kCell, class S, class F>
class ForwardChunk {
 public:
  using Word = typename F::Word;

  ForwardChunk(const ForwardArgs<S, Word>& args, const ForwardDirection<S, Word>& direction,
               const Slot& slot)
      : sizes_(args.sizes),
        schedule_(args.schedule),
        d_(direction),
        slot_(slot),
        save_(args.save),
        gates_(d_.gates + (slot.group * slot.parts + slot.part) * d_.gates_apart),
        zeros_(args.zeros),
        words_(args.words + slot.thread * args.words_stride),
        across_(args.across == nullptr ? nullptr : args.across + slot.thread * args.across_stride),
        factors_(args.factors + slot.thread * args.factors_stride),
        group_rows_(slot.groups == 1 ? nullptr
                                     : args.group_rows + slot.thread * args.group_rows_stride),
        hidden_(sizes_.hidden_padded()),
        output_(sizes_.output_padded()),
        panels_(panel_count<S>(hidden_, Panel::blocks)),
        output_panels_(panel_count<S>(output_, OutputPanel::blocks)),
        own_panels_(share(panels_, slot.part, slot.parts)),
        own_output_panels_(sizes_.projected ? share(output_panels_, slot.part, slot.parts)
                                            : own_panels_),
        packs_on_the_way_(d_.packed.input != nullptr && d_.chunk.first && d_.chunk.last &&
                          slot.groups == 1),
        // The GRU's n scales the half that comes from h: it stays apart.
        joins_input_(kExact && kCell != Cell::kGru && across_ != nullptr && schedule_.steps == 1),
        own_rows_(own_rows(schedule_, d_.chunk, slot)),
        first_row_(schedule_.row0[d_.chunk.begin]) {}

  // Each thread packs the panels that it will read, or its group's share of them.
  void pack() const {
    const auto mine = [&](Range panels) {
      const Range r = share(panels.size(), slot_.group, slot_.groups);
      return Range{panels.begin + r.begin, panels.begin + r.end};
    };
    const auto& w = d_.weights;
    pack_bias<kCell>(d_.packed, w, sizes_, mine(own_panels_));
    if (d_.packed.input == nullptr) return;
    if (!packs_on_the_way_) pack_input(d_.packed.input, mine(own_panels_));
    pack_by_unit<kGates>(d_.packed.recurrent, w.w_hh, sizes_.hidden, words_of<F>(sizes_.output),
                         mine(own_panels_));
    if (sizes_.projected) {
      pack_by_unit<1>(d_.packed.projection, w.w_hr, sizes_.output, words_of<F>(sizes_.hidden),
                      mine(own_output_panels_));
    }
  }

  // A group projects the rows that it walks: no other core reads their gates.
  void project() const {
    if (joins_input_) return;
    const int64_t rows = group_rows_ == nullptr
                             ? schedule_.row0[d_.chunk.end] - first_row_
                             : find_chunk_rows(schedule_, d_.chunk, own_rows_, group_rows_);
    const Range mine = {0, rows};
    const auto chunk_row = [&](int64_t row) __attribute__((always_inline)) {
      return group_rows_ == nullptr ? row : group_rows_[row];
    };
    const auto x_offset = [&](int64_t row) {
      return io_row(schedule_, first_row_ + chunk_row(row)) * sizes_.input;
    };
    const auto row_at = [&](int64_t row) { return d_.x + x_offset(row); };
    const auto fetch = [&](int64_t row, int64_t panel) __attribute__((always_inline)) {
      S* gates = gates_ + chunk_row(row) * d_.gates_stride + panel * Panel::blocks * kLanes<S>;
      for (int g = 0; g < kGates; ++g) fetch_to_write(gates + g * hidden_);
      // The first panel is the first to read x: the beginning of its rows, which are a stream each.
      if (kExact && panel == own_panels_.begin) fetch_row(row_at(row), sizes_.input);
    };
    const auto epilogue = [&]<int R, int NV>(const Tile<S, R, NV>& tile, int64_t row,
                                             int64_t panel) __attribute__((always_inline)) {
      for (int r = 0; R > 2 && r < R; ++r) {
        with_next_tile(mine, own_panels_, row + R + r, panel, fetch);
      }
      S* gates[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) gates[r] = gates_ + chunk_row(row + r) * d_.gates_stride;
      each(tile, panel, hidden_, [&](int r, int v, int64_t unit) __attribute__((always_inline)) {
        const int64_t at = (v % kGates) * hidden_ + unit;
        store(gates[r] + at, tile.sum[r][v] + load(d_.packed.bias + at));
      });
    };
    const auto multiply = [&](auto left) __attribute__((always_inline)) {
      const int64_t at_once = packs_on_the_way_ ? 1 : own_panels_.size();
      for (int64_t i = own_panels_.begin; i < own_panels_.end; i += at_once) {
        const Range panels = {i, i + at_once};
        Word* packed = d_.packed.input;
        if (packs_on_the_way_) {
          packed += (own_panels_.end - 1 - i) * panel_words(sizes_.input);
          pack_input(packed, panels);
        }
        multiply_units<kGates>(mine, panels, left, packed, d_.weights.w_ih, d_.packed.input_scale,
                               sizes_.hidden, sizes_.input, epilogue);
      }
    };
    if constexpr (std::is_same_v<F, Bf16>) {
      if (d_.x_half != nullptr) {
        for (int64_t row = mine.begin; row < mine.end; ++row) {
          F::copy_row(words_at(row - mine.begin, sizes_.input), d_.x_half + x_offset(row),
                      sizes_.input);
        }
      } else {
        write_rows(mine, sizes_.input, row_at);
      }
      multiply([&](int64_t row) { return words_at(row - mine.begin, sizes_.input); });
    } else {
      multiply(left_rows(mine, sizes_.input, row_at));
    }
  }

  void walk() {
    turn_ = d_.turn;
    const Chunk& chunk = d_.chunk;
    for (int64_t i = 0; i < chunk.end - chunk.begin; ++i) {
      step(d_.reverse ? chunk.end - 1 - i : chunk.begin + i);
      turn_ ^= 1;
    }
  }

 private:
  static constexpr int kGates = gate_blocks(kCell);
  static constexpr bool kExact = std::is_same_v<F, Exact<S>>;
  using Saved = std::conditional_t<kExact, S, uint16_t>;
  using Panel = UnitPanel<kGates>;
  using OutputPanel = UnitPanel<1>;

  static int64_t panel_words(int64_t k) { return words_of<F>(k) * Panel::vectors * kLanes<S>; }

  void pack_input(Word* packed, Range panels) const {
    pack_by_unit<kGates>(packed, d_.weights.w_ih, sizes_.hidden, words_of<F>(sizes_.input), panels);
  }

  // The index-th of this thread's rows of k values in words.
  Word* words_at(int64_t index, int64_t k) const { return words_ + index * words_of<F>(padded(k)); }

  template <class RowAt>
  FUSEDRNN_HD void write_rows(Range rows, int64_t k, RowAt row_at) const {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int64_t index = row - rows.begin;
      factors_[index] = F::write_row(words_at(index, k), row_at(row), k);
    }
  }

  // The rows as a product reads them: as they are, or written in words before.
  template <class RowAt>
  FUSEDRNN_HD auto left_rows(Range rows, int64_t k, RowAt row_at) const {
    if constexpr (kExact) {
      return row_at;
    } else {
      write_rows(rows, k, row_at);
      return [this, rows, k](int64_t row) { return words_at(row - rows.begin, k); };
    }
  }

  // Products with panels of units, packed, or from the weights as they lie. k counts values.
  template <int Gates, class Left, class Epilogue>
  FUSEDRNN_HD void multiply_units(Range rows, Range panels, Left left, const Word* packed,
                                  const Word* weights, const ColumnScale& scale, int64_t units,
                                  int64_t k, Epilogue epilogue, bool from_end = false) const {
    constexpr int vectors = UnitPanel<Gates>::vectors;
    const int64_t words = words_of<F>(k);
    const auto values = [&]<int R, int NV>(const Tile<typename F::Sum, R, NV>& tile, int64_t row,
                                           int64_t panel) __attribute__((always_inline)) {
      if constexpr (std::is_same_v<typename F::Sum, S>) {
        epilogue(tile, row, panel);
      } else {
        epilogue(scaled<Gates, S>(tile, scale, factors_ + (row - rows.begin), panel, units), row,
                 panel);
      }
    };
    if constexpr (!std::is_same_v<F, Int8>) {  // 8-bit weights are frozen ones, and packed
      if (packed == nullptr) {
        return product_unpacked<Gates, F>(rows, panels, units, across_, values,
                                          Term<Word, Left>{left, weights, words});
      }
    }
    product<F, vectors>(rows, panels, left, 1, packed, words * vectors * kLanes<S>, words, values,
                        from_end);
  }

  // f(r, v, unit) for every vector of the tile that lies within `limit` units.
  template <int R, int NV, class Visit>
  static FUSEDRNN_HD void each(const Tile<S, R, NV>&, int64_t panel, int64_t limit, Visit f) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        const int64_t unit = (panel * Panel::blocks + v / kGates) * kLanes<S>;
        if (unit < limit) f(r, v, unit);
      }
    }
  }

  void step(int64_t t) {
    const int64_t rows = schedule_.rows[t], row0 = schedule_.row0[t];
    const Range mine = {own_rows_.begin, std::min(own_rows_.end, rows)};
    const S* h_read = d_.h[turn_];
    S* h_write = d_.h[turn_ ^ 1];
    const auto is_cut = [&](int64_t b) { return is_reset(d_.reset, schedule_, t, b); };
    const auto h_prev = [&](int64_t b) {
      return is_cut(b) ? zeros_ : h_read + state_row(schedule_, b) * output_;
    };
    const auto put_output = [&](int64_t b, int64_t unit, Vec<S> h) __attribute__((always_inline)) {
      store(h_write + state_row(schedule_, b) * output_ + unit, h);
      const int64_t at = io_row(schedule_, row0 + b) * d_.y_stride + unit;
      if constexpr (std::is_same_v<F, Bf16>) {
        if (d_.y_half != nullptr) return F::store_half(d_.y_half + at, h, sizes_.output - unit);
      }
      store(d_.y + at, h, sizes_.output - unit);
    };

    // In a single step nobody has written any before.
    if (slot_.parts > 1 && schedule_.steps > 1) fetch_states(h_read, h_write, mine);

    using CellStep = CellForward<kCell, S, Saved>;
    const CellStep cell = {hidden_, save_, d_.packed.bias_hn};
    const auto row_of = [&](int64_t b) __attribute__((always_inline)) {
      typename CellStep::Row row{};
      const int64_t chunk_row = row0 - first_row_ + b;
      S* gates = gates_ + chunk_row * d_.gates_stride;
      row.gates = joins_input_ ? d_.packed.bias : gates;
      if constexpr (kExact) {
        row.saved = gates;
      } else if (save_) {
        row.saved = d_.saved_half + chunk_row * d_.saved_stride;
      }
      if constexpr (kCell == Cell::kLstm) {
        row.c = d_.c + state_row(schedule_, b) * hidden_;
        row.state = is_cut(b) ? zeros_ : row.c;
        if (save_) row.cells = d_.cells + (row0 + b) * d_.cells_stride;
      } else if constexpr (kCell == Cell::kGru) {
        row.state = h_prev(b);
      }
      return row;
    };
    const auto fetch_of = [&](int64_t row, int64_t panel) __attribute__((always_inline)) {
      const int64_t unit = panel * Panel::blocks * kLanes<S>, chunk_row = row - first_row_;
      for (int g = 0; g < kGates; ++g) {
        fetch_to_write(gates_ + chunk_row * d_.gates_stride + g * hidden_ + unit);
        if (!kExact && save_) {
          fetch_to_write(d_.saved_half + chunk_row * d_.saved_stride + g * hidden_ + unit);
        }
      }
      if (kCell == Cell::kLstm && save_) fetch_to_write(d_.cells + row * d_.cells_stride + unit);
      const int64_t at = io_row(schedule_, row) * d_.y_stride + unit;
      if (d_.y_half != nullptr) {
        fetch_to_write(d_.y_half + at);
      } else {
        fetch_to_write(d_.y + at);
      }
    };
    const auto fetch = [&](int64_t b, int64_t panel) __attribute__((always_inline)) {
      const int64_t unit = panel * Panel::blocks * kLanes<S>;
      fetch_of(row0 + b, panel);
      if (kCell == Cell::kLstm) fetch_to_write(d_.c + state_row(schedule_, b) * hidden_ + unit);
      fetch_to_write(h_write + state_row(schedule_, b) * output_ + unit);
    };
    // The states are near: every step has them. Not before a barrier, which it would hold up; of
    // the other cells it made no step quicker.
    const int64_t next = d_.reverse ? t - 1 : t + 1;
    const bool ahead = kCell == Cell::kLstm && slot_.parts == 1;
    const int64_t rows_next = ahead ? rows_in_chunk(schedule_, d_.chunk, next) : 0;
    const auto fetch_next_step = [&](int64_t b, int64_t panel) __attribute__((always_inline)) {
      if (b < rows_next) fetch_of(schedule_.row0[next] + b, panel);
    };
    const auto apply = [&]<int R, int NV>(const Tile<S, R, NV>& tile, int64_t b0,
                                          int64_t panel) __attribute__((always_inline)) {
      constexpr int blocks = NV / kGates;
      typename CellStep::Half half[R][blocks] = {};
      const auto each_row = [&](auto f) __attribute__((always_inline)) {
        const auto row = [&](int r) __attribute__((always_inline)) {
#pragma GCC unroll 4
          for (int block = 0; block < blocks; ++block) {
            const int64_t unit = (panel * Panel::blocks + block) * kLanes<S>;
            if (unit < hidden_) f(r, block, unit);
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
      each_row([&](int r, int block, int64_t unit) __attribute__((always_inline)) {
        if (R > 2 && block == 0) {
          with_next_tile(mine, own_panels_, b0 + R + r, panel, fetch, fetch_next_step);
        }
        half[r][block] = cell.begin(tile.sum[r] + block * kGates, row_of(b0 + r), unit);
      });
      each_row([&](int r, int block, int64_t unit) __attribute__((always_inline)) {
        const Vec<S> h = cell.finish(half[r][block], row_of(b0 + r), unit);
        if (kCell == Cell::kLstm && sizes_.projected) {
          store(d_.h_tilde + state_row(schedule_, b0 + r) * hidden_ + unit, h);
        } else {
          put_output(b0 + r, unit, h);
        }
      });
    };
    if (joins_input_) {
      if constexpr (kExact) {
        const auto x = [&](int64_t b) { return d_.x + io_row(schedule_, row0 + b) * sizes_.input; };
        product_unpacked<kGates, F>(
            mine, own_panels_, sizes_.hidden, across_, apply,
            Term<S, decltype(x)>{x, d_.weights.w_ih, sizes_.input},
            Term<S, decltype(h_prev)>{h_prev, d_.weights.w_hh, sizes_.output});
      }
    } else {
      multiply_units<kGates>(mine, own_panels_, left_rows(mine, sizes_.output, h_prev),
                             d_.packed.recurrent, d_.weights.w_hh, d_.packed.recurrent_scale,
                             sizes_.hidden, sizes_.output, apply, turn_ != 0);
    }
    if constexpr (kCell == Cell::kLstm) {
      if (sizes_.projected) {
        slot_.wait_parts();
        const auto h_tilde = [&](int64_t b) {
          return d_.h_tilde + state_row(schedule_, b) * hidden_;
        };
        const auto put = [&]<int R, int NV>(const Tile<S, R, NV>& tile, int64_t b0,
                                            int64_t panel) __attribute__((always_inline)) {
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) {
              const int64_t unit = (panel * OutputPanel::blocks + v) * kLanes<S>;
              if (unit < output_) put_output(b0 + r, unit, tile.sum[r][v]);
            }
          }
        };
        multiply_units<1>(mine, own_output_panels_, left_rows(mine, sizes_.hidden, h_tilde),
                          d_.packed.projection, d_.weights.w_hr, d_.packed.projection_scale,
                          sizes_.output, sizes_.hidden, put);
      }
    }
    keep_final(t, mine, h_write);
    slot_.wait_parts();
  }

  // This thread's units of h, of `limit` units in all.
  Range own_units(int64_t limit) const {
    const int64_t width = (sizes_.projected ? OutputPanel::blocks : Panel::blocks) * kLanes<S>;
    const int64_t begin = std::min(own_output_panels_.begin * width, limit);
    return {begin, std::min(own_output_panels_.end * width, limit)};
  }

  // Parts write their units of h and read all others': those arrive side by side so, and the lines
  // to be written have become this core's own by the time they are.
  void fetch_states(const S* h_read, S* h_write, Range rows) const {
    constexpr int64_t line = 64 / sizeof(S);
    const Range units = own_units(output_);
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      const int64_t row = state_row(schedule_, b) * output_;
      for (int64_t i = 0; i < output_; i += line) fetch_to_read(h_read + row + i);
      for (int64_t i = units.begin; i < units.end; i += line) fetch_to_write(h_write + row + i);
    }
  }

  // Copies this thread's units of the rows for which t was the last step walked to h_n.
  void keep_final(int64_t t, Range mine, const S* h) const {
    const int64_t going_on = d_.reverse ? (t == 0 ? 0 : mine.end) : rows_at(schedule_, t + 1);
    const Range units = own_units(sizes_.output);
    for (int64_t b = std::max(mine.begin, going_on); b < mine.end; ++b) {
      const S* from = h + state_row(schedule_, b) * output_;
      std::copy(from + units.begin, from + units.end,
                d_.h_n + caller_row(schedule_, b) * sizes_.output + units.begin);
    }
  }

  const Sizes& sizes_;
  const Schedule& schedule_;
  const ForwardDirection<S, Word>& d_;
  const Slot& slot_;
  const bool save_;
  S* const gates_;
  const S* const zeros_;
  Word* const words_;
  Word* const across_;
  S* const factors_;
  int64_t* const group_rows_;
  const int64_t hidden_, output_;  // padded
  const int64_t panels_, output_panels_;
  const Range own_panels_, own_output_panels_;
  // Panels of W_ih that this thread reads just once share the last one's place: they never leave
  // its own cache.
  const bool packs_on_the_way_;
  // A single step of many rows: one sum of both products, no projection before.
  const bool joins_input_;
  const Range own_rows_;
  const int64_t first_row_;  // packed, of the chunk
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
}

// The packing alone, by one thread.
template <Cell kCell, class S, class F = Exact<S>>
void forward_pack(const ForwardArgs<S, typename F::Word>& args, const Slot& slot) {
  ForwardChunk<kCell, S, F>(args, args.direction[0], slot).pack();
}

FUSEDRNN_ISA_END
