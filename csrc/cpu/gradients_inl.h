// What is parallel over time, once a chunk's dgates stand: gradients of weights, biases and inputs.
//
//   dW_ih += dgates^T x,  dW_hh += dgates^T h_prev,  db += sum of dgates,  dx += dgates W_ih
//
// Each thread owns rows of the weights' gradients and rows of dx, or its group's own sums and rows
// (chunk_rows_inl.h), and sums in a fixed order: the result does not depend on who comes first.
#pragma once

#include "cpu/backward_inl.h"
#include "cpu/chunk_rows_inl.h"

FUSEDRNN_ISA_BEGIN

// k is cut so that a block of a panel stays in a private cache while all rows pass by, and no
// longer than Sums::kInRegisters allows.
inline constexpr int64_t kBlockK = kAddedInTurn;

// From so many panels of columns on, the threads' shares of them are nearly equal.
inline constexpr int64_t kPanelsPerThread = 4;

template <class S, class E>
class ChunkGradients : public ChunkRows<S, E> {
  using Base = ChunkRows<S, E>;

 public:
  ChunkGradients(Cell cell, const BackwardArgs<S, E>& args,
                 const BackwardDirection<S, E>& direction, const Slot& slot)
      : Base(cell, args, direction, slot),
        hidden_(sizes_.hidden_padded()),
        packs_on_the_way_(!apart_ && d_.chunk.first && d_.chunk.last &&
                          (input_panels() % slot.threads == 0 ||
                           input_panels() >= kPanelsPerThread * slot.threads)),
        columns_(args.columns + slot.thread * args.columns_stride) {}

  // W_ih by input column, for dx.
  void pack() const {
    if (args_.dx == nullptr || d_.packed.input == nullptr || packs_on_the_way_) return;
    pack_input(d_.packed.input, share(weight_words(), slot_.thread, slot_.threads),
               Range{0, input_panels()});
  }

  void accumulate() const {
    if (rows_ == 1 && !apart_ && d_.chunk.first && to_.dw_hr == nullptr) {
      weight_gradients_of_one();
    } else {
      accumulate_weights();
    }
    if (args_.dx != nullptr && rows_ > 0) {  // a group may have none
      if (d_.packed.input == nullptr) {
        input_gradient_of_few();
      } else {
        input_gradient();
      }
    }
    if (apart_) d_.group_has_sum[slot_.group] = 1;
    meet();
  }

 private:
  using Base::blocks_, Base::args_, Base::sizes_, Base::schedule_, Base::d_, Base::slot_,
      Base::apart_, Base::dgates_, Base::output_, Base::rows_, Base::words_, Base::writes_,
      Base::to_;
  using Base::chunk_row, Base::find_previous, Base::meet, Base::own, Base::panels, Base::previous,
      Base::x_at, Base::x_row;
  using Base::kInput, Base::kState;
  using typename Base::F, typename Base::W, typename Base::Operand;
  static constexpr int64_t kValues = kValuesPerWord<F>;
  static constexpr int64_t kWidth = kChunkVectors * kLanes<S>;
  // Rows of a weight's gradient that a thread works on at a time: some whole tiles.
  static constexpr int64_t kGradientRows = kMatrix<F> ? 2 * kMatrixRows : 24;
  static_assert(kGradientRows <= kMostGradientRows);

  int64_t weight_words() const { return format_words<F>(blocks_.gates * hidden_); }
  int64_t input_panels() const { return panel_count<S>(sizes_.input, kChunkVectors); }

  void accumulate_weights() const {
    const Range words = own(words_);
    if (to_.dw_ih != nullptr) {
      pack_rows(kInput, sizes_.input, words, [&](int64_t row) { return x_at(row); });
    }
    if (to_.dw_hh != nullptr) {
      find_previous({words.begin * kValues, std::min(words.end * kValues, rows_)});
      pack_rows(kState, sizes_.output, words, [&](int64_t row) { return previous()[row]; });
    }
    meet();
    weight_gradients();
    if (to_.dw_hr != nullptr) {
      meet();
      pack_rows(kState, sizes_.hidden, words,
                [&](int64_t row) { return d_.h_tilde + chunk_row(row) * hidden_; });
      meet();
      projection_gradient();
    }
  }

  void pack_input(W* packed, Range words, Range panels) const {
    pack_by_column<kChunkVectors, F>(
        packed, sizes_.input, weight_words(), words, panels, [&](int64_t i) -> const E* {
          const int64_t unit = i % hidden_;
          if (unit >= sizes_.hidden) return nullptr;
          return weight_row<F, E>(d_.weights.w_ih, i / hidden_ * sizes_.hidden + unit,
                                  sizes_.input);
        });
  }

  // The summed rows as panels, k being the rows; the last word is filled up with zeros.
  template <class RowAt>
  void pack_rows(Operand which, int64_t columns, Range words, RowAt row_at) const {
    pack_by_column<kChunkVectors, F>(
        panels(which), columns, words_, words, Range{0, panel_count<S>(columns, kChunkVectors)},
        [&](int64_t row) -> const E* { return row < rows_ ? row_at(row) : nullptr; });
  }

  W* column(int64_t i) const { return columns_ + i * column_words(words_); }

  // `width` columns of `from` become rows of this thread's scratch, one word of k after another.
  void take_columns(const E* from, int64_t stride, int64_t width) const {
    constexpr int lanes = kLanes<W>;
    for (int64_t word = 0; word < words_; word += lanes) {
      for (int64_t i = 0; i < width; i += lanes) {
        Vec<W> block[lanes];
        const bool more = word + lanes < words_;
        for (int r = 0; r < lanes; ++r) {
          const int64_t row = (word + r) * kValues;
          const auto row_at = [&](int64_t index) __attribute__((always_inline)) {
            return index < rows_ ? from + chunk_row(index) * stride + i : nullptr;
          };
          for (int64_t v = 0; more && v < kValues; ++v) {
            fetch_to_read(row_at(std::min(row + lanes * kValues + v, rows_ - 1)));
          }
          block[r] = word_of_rows<F>(row_at(row), row_at(row + 1), width - i);
        }
        transpose<W>(block);
        for (int64_t r = 0; r < std::min<int64_t>(lanes, width - i); ++r) {
          store(column(i + r) + word, block[r]);
        }
      }
    }
  }

  // The columns' sums to either bias's gradient, where wanted. In blocks, whose sums are added in
  // turn: the error grows with a block's length and the number of blocks, not with the number of
  // rows.
  void add_sums(S* db_ih, S* db_hh, int64_t width) const {
    if (db_ih == nullptr && db_hh == nullptr) return;
    constexpr int lanes = kLanes<S>;
    constexpr int64_t block = 16 * lanes;
    for (int64_t i = 0; i < width; i += lanes) {
      Vec<S> sums[lanes] = {};
      for (int64_t r = 0; r < std::min<int64_t>(lanes, width - i); ++r) {
        for (int64_t first = 0; first < words_; first += block) {
          Vec<S> some{};
          for (int64_t word = first; word < std::min(first + block, words_); word += lanes) {
            some += F::totals(load(column(i + r) + word));
          }
          sums[r] += some;
        }
      }
      const Vec<S> sum = sums_of<S>(sums);
      for (S* to : {db_ih, db_hh}) {
        if (to == nullptr) continue;
        const Vec<S> before = writes_ ? Vec<S>{} : load(to + i, width - i);
        store(to + i, before + sum, width - i);
      }
    }
  }

  // to (width, n) += columns^T (panels of `which`)
  void add_outer(S* to, int64_t n, int64_t width, Operand which) const {
    const Range rows = {0, width}, all = {0, panel_count<S>(n, kChunkVectors)};
    const auto fetch = [&](int64_t row, int64_t panel) __attribute__((always_inline)) {
      for (int v = 0; v < kChunkVectors; ++v) {
        fetch_to_write(to + row * n + panel * kWidth + v * kLanes<S>);
      }
    };
    for (int64_t k = 0; k == 0 || k < words_; k += kBlockK) {
      const auto epilogue = [&]<int R, int NV>(const Tile<S, R, NV>& tile, int64_t row,
                                               int64_t panel) __attribute__((always_inline)) {
        for (int r = 0; r < R; ++r) with_next_tile(rows, all, row + R + r, panel, fetch);
        put_tile(tile, panel, n, !writes_ || k > 0, [&](int r) { return to + (row + r) * n; });
      };
      product<F, kChunkVectors, Sums::kInRegisters>(
          rows, all, [&](int64_t r) { return column(r) + k; }, panels(which) + k * kWidth,
          words_ * kWidth, std::min(kBlockK, words_ - k), epilogue);
    }
  }

  template <int R, int NV, class RowAt>
  static FUSEDRNN_HD void put_tile(const Tile<S, R, NV>& tile, int64_t panel, int64_t columns,
                                   bool add, RowAt row_at) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      S* row = row_at(r);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        const int64_t column = panel * kWidth + v * kLanes<S>;
        const int64_t valid = columns - column;
        if (valid <= 0) continue;
        Vec<S> value = tile.sum[r][v];
        if (add) value += load(row + column, valid);
        store(row + column, value, valid);
      }
    }
  }

  void weight_gradients() const {
    const int64_t units = sizes_.hidden;
    const int64_t per_block = (units + kGradientRows - 1) / kGradientRows;
    const Range mine = own(blocks_.count * per_block);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int block = static_cast<int>(i / per_block);
      const int64_t unit = i % per_block * kGradientRows;
      const int64_t width = std::min(kGradientRows, units - unit);
      take_columns(dgates_ + block * hidden_ + unit, d_.dgates_stride, width);
      // Of this block in the parameter's gradient, of n columns; null: not wanted, or not its gate.
      const auto part = [&](S* gradient, int gate, int64_t n) {
        return gradient == nullptr || gate < 0 ? nullptr : gradient + (gate * units + unit) * n;
      };
      const int input_gate = blocks_.input_gate[block], hidden_gate = blocks_.hidden_gate[block];
      S* const dw_ih = part(to_.dw_ih, input_gate, sizes_.input);
      S* const dw_hh = part(to_.dw_hh, hidden_gate, sizes_.output);
      if (dw_ih != nullptr) add_outer(dw_ih, sizes_.input, width, kInput);
      if (dw_hh != nullptr) add_outer(dw_hh, sizes_.output, width, kState);
      add_sums(part(to_.db_ih, input_gate, 1), part(to_.db_hh, hidden_gate, 1), width);
    }
  }

  // The same of a chunk of one row, of which nothing need be packed: each row of a weight's
  // gradient is a multiple of x or of the state.
  void weight_gradients_of_one() const {
    const int64_t units = sizes_.hidden;
    const E* x = x_at(0);
    const E* state = entering_h(d_, schedule_, d_.chunk.begin, 0, output_);
    const E* h = state != nullptr ? state : reinterpret_cast<const E*>(args_.zeros);
    const Range mine = own(blocks_.count * units);
    for (int block = 0; block < blocks_.count; ++block) {
      const Range some = {std::max(mine.begin - block * units, int64_t{0}),
                          std::min(mine.end - block * units, units)};
      const E* dgates = dgates_ + block * hidden_;
      const auto put = [&](int gate, S* dw, uint16_t* half, S* db, const E* v, int64_t n) {
        if (gate < 0) return;
        const int64_t row0 = gate * units;
        if (half != nullptr) put_multiples(half + row0 * n, some, v, n, dgates);
        if (dw != nullptr) put_multiples(dw + row0 * n, some, v, n, dgates);
        for (int64_t i = some.begin; db != nullptr && i < some.end; ++i) {
          db[row0 + i] = value_of(dgates[i]);
        }
      };
      put(blocks_.input_gate[block], to_.dw_ih, d_.dw_ih_half, to_.db_ih, x, sizes_.input);
      put(blocks_.hidden_gate[block], to_.dw_hh, d_.dw_hh_half, to_.db_hh, h, sizes_.output);
    }
  }

  // Rows `rows` of n values of `to` = v times each one's factor.
  template <class T>
  static void put_multiples(T* to, Range rows, const E* v, int64_t n, const E* factors) {
    constexpr int lanes = kLanes<S>;
    const auto put = [&](T* at, Vec<S> value, int64_t valid) __attribute__((always_inline)) {
      if constexpr (std::is_same_v<T, S>) {
        store(at, value, valid);
      } else if constexpr (std::is_same_v<S, float>) {
        Bf16::store_half(at, value, valid);
      }
    };
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      T* at = to + row * n;
      const Vec<S> factor = broadcast(value_of(factors[row]));
      int64_t i = 0;
      for (; i + lanes <= n; i += lanes) put(at + i, read(v + i) * factor, lanes);
      if (i < n) put(at + i, read(v + i, n - i) * factor, n - i);
    }
  }

  // dW_hr (P, H) += dh^T (o tanh(c))
  void projection_gradient() const {
    const int64_t blocks = (sizes_.output + kGradientRows - 1) / kGradientRows;
    const Range mine = own(blocks);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t unit = i * kGradientRows;
      const int64_t width = std::min(kGradientRows, sizes_.output - unit);
      take_columns(d_.dh + unit, output_, width);
      add_outer(to_.dw_hr + unit * sizes_.hidden, sizes_.hidden, width, kState);
    }
  }

  // dx where W_ih was not packed, of few rows; threads share the columns.
  void input_gradient_of_few() const {
    static constexpr int gates[] = {0, 1, 2, 3};
    const BlockRows<E> weight = {weight_row<F, E>(d_.weights.w_ih, 0, sizes_.input),
                                 gates,
                                 blocks_.gates,
                                 sizes_.hidden,
                                 hidden_,
                                 sizes_.input};
    const E* dgates = dgates_ + blocks_.input_begin() * hidden_;
    const int64_t panels = panel_count<S>(sizes_.input, kChunkVectors);
    product_by_column<S>(
        Range{0, rows_}, share(panels, slot_.thread, slot_.threads),
        [&](int64_t row) { return dgates + row * d_.dgates_stride; }, weight,
        [&](int64_t row, int64_t column, Vec<S> value) __attribute__((always_inline)) {
          S* to = args_.dx + x_row(row) * sizes_.input + column;
          const int64_t valid = sizes_.input - column;
          store(to, args_.add_dx ? value + load(to, valid) : value, valid);
        });
  }

  void input_gradient() const {
    const int64_t all = weight_words();
    const E* dgates = dgates_ + blocks_.input_begin() * hidden_;
    // A tile's height, which decides how its sums are taken, depends on no number of threads.
    const int64_t count = tile_count<F, kChunkVectors>(rows_);
    const Tiles tiles = {{0, rows_}, count, packs_on_the_way_ ? Range{0, count} : own(count)};
    const Range rows = {tiles.begin(tiles.mine.begin), tiles.begin(tiles.mine.end)};
    const Range mine = packs_on_the_way_ ? own(input_panels()) : Range{0, input_panels()};
    const int64_t at_once = packs_on_the_way_ ? 1 : mine.size();
    const int64_t place = mine.end * all - std::min(kBlockK, all);
    for (int64_t first = mine.begin; first < mine.end; first += at_once) {
      const Range panels = {first, first + at_once};
      for (int64_t k = 0; k < all; k += kBlockK) {
        const int64_t size = std::min(kBlockK, all - k);
        W* packed = d_.packed.input;
        if (packs_on_the_way_) {
          packed += (place - first * all - k) * kWidth;
          pack_input(packed, Range{k, k + size}, panels);
        }
        const auto row_at = [&](int64_t row) {
          return as_words<E>(dgates + chunk_row(row) * d_.dgates_stride) + k;
        };
        const auto fetch = [&](int64_t row, int64_t panel) __attribute__((always_inline)) {
          if (panel == panels.begin) fetch_row(row_at(row), size);
        };
        const auto epilogue = [&]<int R, int NV>(const Tile<S, R, NV>& tile, int64_t row,
                                                 int64_t panel) __attribute__((always_inline)) {
          for (int r = 0; r < R; ++r) with_next_tile(rows, panels, row + R + r, panel, fetch);
          put_tile(tile, panel, sizes_.input, args_.add_dx || k > 0,
                   [&](int r) { return args_.dx + x_row(row + r) * sizes_.input; });
        };
        product_of_tiles<F, kChunkVectors, Sums::kInRegisters>(
            tiles, panels, row_at, packed + k * kWidth, all * kWidth, size, epilogue);
      }
    }
  }

  const int64_t hidden_;  // padded
  // Where W_ih serves a single chunk, threads share dx's columns, not its rows: a block of W_ih is
  // packed and used by one thread, and all blocks share one place, the last of its panels' that
  // holds a whole one, in its own cache.
  const bool packs_on_the_way_;
  W* const columns_;
};

template <Cell kCell, class S, class E = S>
void backward_chunk(const BackwardArgs<S, E>& args, const Slot& slot) {
  if (args.direction[0].chunk.first) {
    for (int i = slot.direction_begin; i < slot.direction_end; ++i) {
      BackwardChunk<kCell, S, E>(args, args.direction[i], slot).pack();
    }
    for (int i = 0; i < args.directions; ++i) {
      ChunkGradients<S, E>(kCell, args, args.direction[i], slot).pack();
    }
    slot.wait_team();
  }
  for (int i = slot.direction_begin; i < slot.direction_end; ++i) {
    BackwardChunk<kCell, S, E>(args, args.direction[i], slot).walk();
  }
  const bool apart = sums_apart(args, slot);
  for (int i = 0; i < args.directions; ++i) {
    // Groups that sum apart wait for nobody, but share the scratch of the direction before.
    if (i == 0 ? !apart : apart) slot.wait_team();
    ChunkGradients<S, E>(kCell, args, args.direction[i], slot).accumulate();
  }
  if (args.apart_groups > 1 && args.direction[0].chunk.last) {
    slot.wait_team();
    for (int i = 0; i < args.directions; ++i) {
      add_up(kCell, args, args.direction[i], slot);
    }
  }
  release_matrix_unit();
}

FUSEDRNN_ISA_END
