// Packing and forward products of one chunk, the projection of its inputs among them: what is the
// same for all cells of as many gates.
#pragma once

#include "cpu/across_inl.h"
#include "cpu/walk.h"

FUSEDRNN_ISA_BEGIN

template <int kGates, class S, class F>
class ForwardProducts {
 public:
  using Word = typename F::Word;

  ForwardProducts(Cell cell, const ForwardArgs<S, Word>& args,
                  const ForwardDirection<S, Word>& direction, const Slot& slot)
      : sizes_(args.sizes),
        schedule_(args.schedule),
        d_(direction),
        slot_(slot),
        n_apart_(keeps_n_apart(cell)),
        gates_(d_.gates + (slot.group * slot.parts + slot.part) * d_.gates_thread_stride),
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
        joined_(args.joined),
        joined_inputs_(joined_ > 0 ? sizes_.input : 0),
        state_stride_(joined_ + output_),
        two_terms_(kExact && !n_apart_ && across_ != nullptr && schedule_.steps == 1),
        projects_(joined_ == 0 && !two_terms_),
        by_panel_(kExact && args.by_panel && projects_),
        own_rows_(own_rows(schedule_, d_.chunk, slot)),
        first_row_(schedule_.row0[d_.chunk.begin]) {}

  // Each thread packs the panels that it will read, or its group's share of them.
  void pack() const {
    const auto mine = [&](Range panels) {
      const Range r = share(panels.size(), slot_.group, slot_.groups);
      return Range{panels.begin + r.begin, panels.begin + r.end};
    };
    const auto& w = d_.weights;
    pack_bias<kGates>(d_.packed, w, sizes_, n_apart_, mine(own_panels_));
    if (d_.packed.recurrent == nullptr) return;
    if (d_.packed.input != nullptr && !packs_on_the_way_) {
      pack_input(d_.packed.input, mine(own_panels_), format_words<F>(sizes_.input));
    }
    const int64_t outputs = format_words<F>(sizes_.output), all = joined_inputs_ + outputs;
    if (joined_ > 0) pack_input(d_.packed.recurrent, mine(own_panels_), all);
    pack_by_unit<kGates>(d_.packed.recurrent, w.w_hh, sizes_.hidden, outputs, mine(own_panels_),
                         joined_inputs_, all);
    if (sizes_.projected) {
      const int64_t hidden = format_words<F>(sizes_.hidden);
      pack_by_unit<1>(d_.packed.projection, w.w_hr, sizes_.output, hidden, mine(own_output_panels_),
                      0, hidden);
    }
  }

  void project() const {
    if (projects_ && !by_panel_) project(own_panels_);
  }

 protected:
  // A group projects the rows that it walks: no other core reads their gates.
  __attribute__((noinline)) void project(Range panels) const {
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
      const int64_t at_once = packs_on_the_way_ ? 1 : panels.size();
      for (int64_t i = panels.begin; i < panels.end; i += at_once) {
        const Range some = {i, i + at_once};
        Word* packed = d_.packed.input;
        if (packs_on_the_way_) {
          packed += (own_panels_.end - 1 - i) * panel_words(sizes_.input);
          pack_input(packed, some, format_words<F>(sizes_.input));
        }
        multiply_units<kGates>(mine, some, left, packed, d_.weights.w_ih, d_.packed.input_scale,
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

  static constexpr bool kExact = std::is_same_v<F, Exact<S>>;
  using Panel = UnitPanel<kGates>;
  using OutputPanel = UnitPanel<1>;

  static int64_t panel_words(int64_t k) { return format_words<F>(k) * Panel::vectors * kLanes<S>; }

  // As the first rows of panels of `all` rows.
  void pack_input(Word* packed, Range panels, int64_t all) const {
    pack_by_unit<kGates>(packed, d_.weights.w_ih, sizes_.hidden, format_words<F>(sizes_.input),
                         panels, 0, all);
  }

  // The index-th of this thread's rows of k values in words.
  Word* words_at(int64_t index, int64_t k) const {
    return words_ + index * format_words<F>(padded(k));
  }

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
    const int64_t words = format_words<F>(k);
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
        return product_unpacked<Gates, F>(rows, panels, units, across_, from_end, values,
                                          Term<Word, Left>{left, weights, words});
      }
    }
    product<F, vectors>(rows, panels, left, packed, words * vectors * kLanes<S>, words, values,
                        from_end);
  }

  // f(r, v, unit) for every vector of the tile that lies within `limit` units, of gate v % kGates.
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

  const Sizes& sizes_;
  const Schedule& schedule_;
  const ForwardDirection<S, Word>& d_;
  const Slot& slot_;
  const bool n_apart_;
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
  // A state's row holds the step's x in front of it: one product, no projection before.
  const int64_t joined_, joined_inputs_, state_stride_;
  // A single step of many rows: one sum of both products, no projection before either.
  const bool two_terms_;
  const bool projects_;
  const bool by_panel_;  // and when, in place of project()
  const Range own_rows_;
  const int64_t first_row_;  // packed, of the chunk
};

FUSEDRNN_ISA_END
