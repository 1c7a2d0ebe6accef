// Weights and rows in panel order.
#pragma once

#include "cpu/gemm_inl.h"
#include "cpu/team.h"
#include "recurrence.h"

FUSEDRNN_ISA_BEGIN

// How a cell's gates share a forward panel: Gates blocks of columns for each of Blocks neighbouring
// vectors of hidden units. Two where a strip would else be a single vector.
template <int Gates>
struct UnitPanel {
  static constexpr int gates = Gates;
  static constexpr int blocks = strip_vectors(Gates) == 1 ? 2 : 1;
  static constexpr int vectors = gates * blocks;
};

// Vectors of columns in the other panels: for dh, one product a step, few columns keep both threads
// of a small layer busy; for the products over a whole chunk, tiles as wide as tall ones can be.
inline constexpr int kStepVectors = 2;
inline constexpr int kChunkVectors = FUSEDRNN_ACCUMULATORS / kTallRows;

template <class S>
constexpr int64_t panel_count(int64_t columns, int blocks) {
  const int64_t width = blocks * kLanes<S>;
  return (columns + width - 1) / width;
}

// From weights (Gates * units, k), row-major, to panels by unit. Each vector comes from a row of
// its own and goes to lines apart: too many streams for the hardware's prefetcher, so they are
// fetched ahead, the source into the larger cache, the target for writing. They become the rows
// from `first` on of panels of `all` rows.
template <int Gates, class S>
void pack_by_unit(S* packed, const S* weights, int64_t units, int64_t k, Range panels,
                  int64_t first, int64_t all) {
  using P = UnitPanel<Gates>;
  constexpr int lanes = kLanes<S>;
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    S* to = packed + panel * (all * P::vectors * lanes);
    for (int v = 0; v < P::vectors; ++v) {
      const int64_t unit = (panel * P::blocks + v / Gates) * lanes;
      const int64_t valid = units - unit;
      const S* from = weights + ((v % Gates) * units + unit) * k;
      for (int64_t i = 0; i < k; i += lanes) {
        Vec<S> rows[lanes];
        for (int r = 0; r < lanes; ++r) {
          __builtin_prefetch(from + r * k + i + 4 * lanes, 0, 2);
          fetch_to_write(to + panel_offset<P::vectors, lanes>(first + i + r + 2 * lanes, v, all));
          rows[r] = r < valid ? load(from + r * k + i, k - i) : Vec<S>{};
        }
        transpose<S>(rows);
        for (int64_t r = 0; r < lanes && i + r < k; ++r) {
          store(to + panel_offset<P::vectors, lanes>(first + i + r, v, all), rows[r]);
        }
      }
    }
  }
}

// (Gates, padded units): b_ih + b_hh; n_apart: of the third gate, the GRU's n, b_ih alone.
template <int Gates, class S, class W>
void pack_bias(const PackedWeights<S, W>& packed, const Weights<S, W>& w, const Sizes& sizes,
               bool n_apart, Range panels) {
  constexpr int64_t width = UnitPanel<Gates>::blocks * kLanes<S>;
  const auto at = [](const S* bias, const uint16_t* half, int64_t i, int64_t n) {
    if constexpr (std::is_same_v<S, float>) {
      if (half != nullptr) return read(half + i, n);
    }
    return bias == nullptr ? Vec<S>{} : load(bias + i, n);
  };
  const int64_t hidden = sizes.hidden_padded(), end = std::min(panels.end * width, hidden);
  for (int64_t unit = panels.begin * width; unit < end; unit += kLanes<S>) {
    for (int g = 0; g < Gates; ++g) {
      const int64_t i = g * sizes.hidden + unit, n = sizes.hidden - unit;
      const Vec<S> ih = at(w.b_ih, w.b_ih_half, i, n), hh = at(w.b_hh, w.b_hh_half, i, n);
      const bool apart = n_apart && g == 2;
      store(packed.bias + g * hidden + unit, apart ? ih : ih + hh);
      if (apart) store(packed.bias_hn + unit, hh);
    }
  }
}

// The values of 8-bit sums in a panel by unit; factors: of the tile's rows.
template <int Gates, class S, int R, int NV>
FUSEDRNN_HD Tile<S, R, NV> scaled(const Tile<int32_t, R, NV>& tile, const ColumnScale& scale,
                                  const S* factors, int64_t panel, int64_t units) {
  Tile<S, R, NV> values;
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) {
    const int64_t unit = (panel * UnitPanel<Gates>::blocks + v / Gates) * kLanes<S>;
    const int64_t at = v % Gates * padded(units) + unit;
    const bool inside = unit < padded(units);
    const bool shifted = Int8::kShifted && inside;
    const Vec<int32_t> offset = shifted ? load(scale.offset + at) : Vec<int32_t>{};
    const Vec<S> factor = inside ? load(scale.factor + at) : Vec<S>{};
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<S> sum = __builtin_convertvector(tile.sum[r][v] - offset, Vec<S>);
      // Rounded: whether what it is added to would take it in without, g++ decides tile by tile.
      values.sum[r][v] = kept(sum * (factor * factors[r]));
    }
  }
  return values;
}

// From rows of `columns` values to panels by column, k and `rows` counting words. row_at(i) points
// to row i of values, or is null for a row of zeros.
template <int Vectors, class F, class RowAt>
void pack_by_column(typename F::Word* packed, int64_t columns, int64_t k, Range rows, Range panels,
                    RowAt row_at) {
  using W = typename F::Word;
  constexpr int lanes = kLanes<W>;
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    W* to = packed + panel * (k * Vectors * lanes);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const auto* from = row_at(kValuesPerWord<F> * i);
      [[maybe_unused]] const auto* second = from;
      if constexpr (kValuesPerWord<F> == 2) second = row_at(2 * i + 1);
      for (int v = 0; v < Vectors; ++v) {
        const int64_t column = (panel * Vectors + v) * lanes;
        store(to + panel_offset<Vectors, lanes>(i, v, k),
              word_of_rows<F>(from == nullptr ? from : from + column,
                              second == nullptr ? second : second + column, columns - column));
      }
    }
  }
}

FUSEDRNN_ISA_END
