// Products of a few rows with packed panels: the micro-kernel under everything.
//
// A panel holds, for each k, the NV vectors of columns that one tile computes: [K][NV][lanes]. In
// the forward direction these are the gates of `lanes` hidden units, so that a tile ends with all
// gates of a unit in registers and its epilogue can apply the cell's equations there.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/vec.h"

FUSEDRNN_ISA_BEGIN

// Rows of a tile of NV vectors: the sums fill the registers and leave some for the operands.
// Double is there for proofs more than for speed: lower tiles, less code.
template <class S, int NV>
inline constexpr int kTileRows = std::min(FUSEDRNN_ACCUMULATORS / NV, sizeof(S) == 8 ? 3 : 6);

template <class S, int R, int NV>
struct Tile {
  Vec<S> sum[R][NV];
};

// tile.sum[r][v] = sum over k of a[r][k * a_step] * panel[k][v]
template <class S, int R, int NV>
FUSEDRNN_HD void multiply(Tile<S, R, NV>& tile, const S* const (&a)[R], int64_t a_step,
                          const S* panel, int64_t k) {
  // A sum waits for its last addition: short tiles use several sets of sums to hide that.
  constexpr int sets = R * NV >= 8 ? 1 : R * NV >= 4 ? 2 : 4;
  constexpr int lanes = kLanes<S>;
  Vec<S> sum[sets][R][NV] = {};
  auto step = [&](Vec<S>(&s)[R][NV], int64_t at, const S* columns) __attribute__((always_inline)) {
    Vec<S> b[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) b[v] = load(columns + v * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<S> left = broadcast(a[r][at]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) s[r][v] += left * b[v];
    }
  };
  int64_t i = 0;
  for (; i + sets <= k; i += sets) {
#pragma GCC unroll 4
    for (int u = 0; u < sets; ++u) step(sum[u], (i + u) * a_step, panel + (i + u) * (NV * lanes));
  }
  for (; i < k; ++i) step(sum[0], i * a_step, panel + i * (NV * lanes));
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      if constexpr (sets == 1) tile.sum[r][v] = sum[0][r][v];
      if constexpr (sets == 2) tile.sum[r][v] = sum[0][r][v] + sum[1][r][v];
      if constexpr (sets == 4) {
        tile.sum[r][v] = (sum[0][r][v] + sum[1][r][v]) + (sum[2][r][v] + sum[3][r][v]);
      }
    }
  }
}

template <class S, int NV, int R, class RowAt, class Epilogue>
FUSEDRNN_HD void multiply_rows(int64_t row, int64_t panel, RowAt& row_at, int64_t a_step,
                               const S* weights, int64_t k, Epilogue& epilogue) {
  const S* a[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) a[r] = row_at(row + r);
  Tile<S, R, NV> tile;
  multiply(tile, a, a_step, weights, k);
  epilogue(tile, row, panel);
}

// Calls f with `height` as a compile-time constant, 1 <= height <= Most.
template <int Most, class F>
FUSEDRNN_HD void with_height(int64_t height, F f) {
  if constexpr (Most > 1) {
    if (height < Most) return with_height<Most - 1>(height, f);
  }
  f(std::integral_constant<int, Most>{});
}

// Tiles over rows [row_begin, row_end) and panels [panel_begin, panel_end); row_at(row) points to a
// row's first element, epilogue(tile, row, panel) takes each finished tile. Tiles are as equal in
// height as can be: eight rows are four and four, not six and two.
template <class S, int NV, int MostRows = kTileRows<S, NV>, class RowAt, class Epilogue>
FUSEDRNN_HD void product(int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end,
                         RowAt row_at, int64_t a_step, const S* packed, int64_t panel_size,
                         int64_t k, Epilogue epilogue) {
  const int64_t rows = row_end - row_begin;
  if (rows <= 0) return;
  const int64_t tiles = (rows + MostRows - 1) / MostRows;
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const S* weights = packed + panel * panel_size;
    int64_t row = row_begin;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t height = rows * (t + 1) / tiles - rows * t / tiles;
      with_height<MostRows>(height, [&](auto r) __attribute__((always_inline)) {
        multiply_rows<S, NV, decltype(r)::value>(row, panel, row_at, a_step, weights, k, epilogue);
      });
      row += height;
    }
  }
}

// For an epilogue that touches lines which no prefetcher foresees: f(row, panel) for the row of the
// tile after this one that stands where `row` less that tile's height stands in this one. Fetched
// now, they arrive while that tile is multiplied.
template <class F>
FUSEDRNN_HD void with_next_tile(Range rows, Range panels, int64_t row, int64_t panel, F f) {
  if (row >= rows.end) {
    row -= rows.size();
    ++panel;
  }
  if (row < rows.end && panel < panels.end) f(row, panel);
}

FUSEDRNN_ISA_END
