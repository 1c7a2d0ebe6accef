// Weights and rows in panel order.
#pragma once

#include "cpu/gemm_inl.h"
#include "cpu/team.h"
#include "recurrence.h"

FUSEDRNN_ISA_BEGIN

// How a cell's gates share a forward panel: Gates blocks of columns for each of Blocks neighbouring
// vectors of hidden units (more than one only where a single gate would leave the tile too small).
template <int Gates>
struct UnitPanel {
  static constexpr int gates = Gates;
  static constexpr int blocks = Gates == 1 ? 2 : 1;
  static constexpr int vectors = gates * blocks;
};

// Vectors of columns in the other panels: for dh, one product a step, few columns keep both threads
// of a small layer busy; for the products over a whole chunk, wide tiles.
inline constexpr int kStepVectors = 2;
inline constexpr int kChunkVectors = 4;

template <class S>
constexpr int64_t panel_count(int64_t columns, int blocks) {
  const int64_t width = blocks * kLanes<S>;
  return (columns + width - 1) / width;
}

// From weights (Gates * units, k), row-major, to panels by unit: [panel][k][vectors][lanes]. Each
// vector comes from a row of its own and goes to lines apart: too many streams for the hardware's
// prefetcher, so they are fetched ahead, the source into the larger cache, the target for writing.
template <int Gates, class S>
void pack_by_unit(S* packed, const S* weights, int64_t units, int64_t k, Range panels) {
  using P = UnitPanel<Gates>;
  constexpr int lanes = kLanes<S>;
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    S* to = packed + panel * (k * P::vectors * lanes);
    for (int v = 0; v < P::vectors; ++v) {
      const int64_t unit = (panel * P::blocks + v / Gates) * lanes;
      const int64_t valid = units - unit;
      const S* from = weights + ((v % Gates) * units + unit) * k;
      for (int64_t i = 0; i < k; i += lanes) {
        Vec<S> rows[lanes];
        for (int r = 0; r < lanes; ++r) {
          __builtin_prefetch(from + r * k + i + 4 * lanes, 0, 2);
          fetch_to_write(to + (i + r + 2 * lanes) * (P::vectors * lanes) + v * lanes);
          rows[r] = r < valid ? load(from + r * k + i, k - i) : Vec<S>{};
        }
        transpose<S>(rows);
        for (int64_t r = 0; r < lanes && i + r < k; ++r) {
          store(to + (i + r) * (P::vectors * lanes) + v * lanes, rows[r]);
        }
      }
    }
  }
}

// The products of product() by panels of units, from weights as they lie, row-major (Gates * units,
// k): for calls so short that packing would cost more than it saves.
template <int Gates, class F, class RowAt, class Epilogue>
FUSEDRNN_HD void product_by_unit(Range rows, Range panels, RowAt row_at,
                                 const typename F::Word* weights, int64_t units, int64_t k,
                                 Epilogue epilogue) {
  using P = UnitPanel<Gates>;
  using Sum = typename F::Sum;
  constexpr int lanes = kLanes<Sum>;
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const auto* a = row_at(row);
      Tile<Sum, 1, P::vectors> tile;
      for (int v = 0; v < P::vectors; ++v) {
        const int64_t unit = (panel * P::blocks + v / Gates) * lanes;
        const auto* w = weights + ((v % Gates) * units + unit) * k;
        Vec<Sum> sums[lanes] = {};
        if (unit + lanes <= units) {
          int64_t i = 0;
          for (; i + lanes <= k; i += lanes) {
            const auto left = load(a + i);
#pragma GCC unroll 16
            for (int l = 0; l < lanes; ++l) sums[l] = F::add(sums[l], left, load(w + l * k + i));
          }
          if (i < k) {
            const auto left = load(a + i, k - i);
            for (int l = 0; l < lanes; ++l) {
              sums[l] = F::add(sums[l], left, load(w + l * k + i, k - i));
            }
          }
        } else {
          for (int64_t l = 0; l < units - unit; ++l) {
            for (int64_t i = 0; i < k; i += lanes) {
              sums[l] = F::add(sums[l], load(a + i, k - i), load(w + l * k + i, k - i));
            }
          }
        }
        tile.sum[0][v] = sums_of<Sum>(sums);
      }
      epilogue(tile, row, panel);
    }
  }
}

// From rows of `columns` values to panels by column: [panel][k][Vectors][lanes], k and `rows`
// counting words. row_at(i) points to row i of values, or is null for a row of zeros.
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
        const int64_t valid = columns - column;
        Vec<W> word{};
        if constexpr (kValuesPerWord<F> == 1) {
          if (from != nullptr) word = load(from + column, valid);
        } else {
          if (from != nullptr) word = load_bits(from + column, valid);
          if (second != nullptr) word |= load_bits(second + column, valid) << 16;
        }
        store(to + (i * Vectors + v) * lanes, word);
      }
    }
  }
}

FUSEDRNN_ISA_END
