// Products of a few rows with packed panels: the micro-kernel under everything.
//
// A panel holds, for each k, the NV vectors of columns that one tile computes. In the forward
// direction these are the gates of `lanes` hidden units, so that a tile ends with all gates of a
// unit and its epilogue can apply the cell's equations there. k counts the words of a format
// (formats_inl.h), which hold one value or several. A panel lies in strips of vectors that a tall
// tile multiplies at a time: [strip][K][vectors][lanes].
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/matrix_inl.h"

FUSEDRNN_ISA_BEGIN

// Vectors of a strip: as many as a tall tile has registers for, its rows being the longer side. Six
// rows by two vectors read a panel from the private cache half as often as three by four.
constexpr int strip_vectors(int vectors) {
  int strip = vectors;
  while (strip * kTallRows > FUSEDRNN_ACCUMULATORS || vectors % strip != 0) --strip;
  return strip;
}

// Where the vector of column `v` at row i of k stands in a panel of NV vectors.
template <int NV, int Lanes>
constexpr int64_t panel_offset(int64_t i, int v, int64_t k) {
  constexpr int strip = strip_vectors(NV);
  return ((v / strip * k + i) * strip + v % strip) * Lanes;
}

// Rows of a tile of NV vectors: a strip's sums fill the registers and leave some for the operands.
// Double is there for proofs more than for speed: lower tiles, less code.
template <class F, int NV>
inline constexpr int kTileRows =
    kMatrix<F> ? kMatrixRows : std::min(FUSEDRNN_ACCUMULATORS / strip_vectors(NV), F::kMostRows);

// Off the hot path low tiles are enough: less code, faster to compile.
template <class F>
inline constexpr int kSideTileRows = kMatrix<F> ? kMatrixRows : std::min(3, F::kMostRows);

template <class S, int R, int NV>
struct Tile {
  Vec<S> sum[R][NV];
};

// Where rows are many, so many products are added one after another before that sum is added to the
// ones before it: the error grows with this number's root, not with k's.
inline constexpr int64_t kAddedInTurn = 512;

// Where an epilogue finds a tall tile's sums. In registers, which is quicker where k is short, it
// may do little more than store them, k is at most kAddedInTurn, and the tile is one strip.
enum class Sums { kInMemory, kInRegisters };

// Of a tall tile, the next panel is fetched meanwhile: from the shared cache it would come more
// slowly than its first tile takes it, while this panel's other tiles need nothing from there.
template <int R>
inline constexpr bool kFetchesAhead = R > 4;

// tile.sum[r][v] = sum over i < k of a[r][i * way] * (vector v at i * b_step), for `Width` of
// the tile's vectors from `first` on, or added to it where `add`; they are those of strips of Strip
// vectors, `strip_size` apart. A sum is that of `Sets` ones, which take k in turns. kFetchesAhead:
// k lines from `ahead` on are fetched into the private cache.
template <class F, int Strip, int Width, int Sets, int R, int NV, class Word = typename F::Word>
FUSEDRNN_HD void multiply(Tile<typename F::Sum, R, NV>& tile, int first, const Word* const (&a)[R],
                          int64_t way, const Word* strips, int64_t b_step, int64_t strip_size,
                          int64_t k, bool add, const Word* ahead) {
  // A loop of few multiplications at a turn loses a cycle of each to its branch, and to where the
  // cache of decoded instructions happens to cut it. Not a single row's, which waits for weights.
  constexpr int at_a_turn = Sets == 1 && R > 1 && R * Width * F::kParts <= 12 ? 2 : Sets;
  constexpr int lanes = kLanes<Word>;
  using Sums = Vec<typename F::Sum>[R][Width];
  Sums sum[Sets] = {};
  const auto step = [&](Sums& s, int64_t at, const Word* b) __attribute__((always_inline)) {
    for_each_constant<F::kParts>([&](auto part) __attribute__((always_inline)) {
      // Words are read again: there are no registers to keep them in.
      if constexpr (part > 0) asm volatile("" ::: "memory");
      const auto left_at = [&](int r) __attribute__((always_inline)) {
        return F::template left<part>(broadcast(a[r][at]));
      };
      const auto right_at = [&](int v) __attribute__((always_inline)) {
        const auto word = load(b + v / Strip * strip_size + v % Strip * lanes);
        if constexpr (R > 1 && std::is_same_v<F, Exact<typename F::Sum>>) {
          return F::template right<part>(kept(word));
        } else {
          return F::template right<part>(word);
        }
      };
      // The fewer operands stay in registers while the others pass by.
      if constexpr (R < Width) {
        decltype(left_at(0)) left[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) left[r] = left_at(r);
#pragma GCC unroll 8
        for (int v = 0; v < Width; ++v) {
          const auto right = right_at(v);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) s[r][v] = F::add(s[r][v], left[r], right);
        }
      } else {
        decltype(right_at(0)) right[Width];
#pragma GCC unroll 8
        for (int v = 0; v < Width; ++v) right[v] = right_at(v);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const auto left = left_at(r);
#pragma GCC unroll 8
          for (int v = 0; v < Width; ++v) s[r][v] = F::add(s[r][v], left, right[v]);
        }
      }
    });
  };
  int64_t i = 0;
  for (; i + at_a_turn <= k; i += at_a_turn) {
#pragma GCC unroll 4
    for (int u = 0; u < at_a_turn; ++u) {
      if constexpr (kFetchesAhead<R>) __builtin_prefetch(ahead + (i + u) * kLine<Word>, 0, 2);
      step(sum[u % Sets], (i + u) * way, strips + (i + u) * b_step);
    }
  }
  for (; i < k; ++i) step(sum[0], i * way, strips + i * b_step);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Width; ++v) {
      Vec<typename F::Sum> total = sum[0][r][v];
      if constexpr (Sets == 2) total += sum[1][r][v];
      if constexpr (Sets == 4) total = (total + sum[1][r][v]) + (sum[2][r][v] + sum[3][r][v]);
      Vec<typename F::Sum>& to = tile.sum[r][first + v];
      to = add ? to + total : total;
    }
  }
}

// Panels that a single row takes at once: up to eight vectors.
template <int NV>
inline constexpr int kRowPanels = NV <= 4 ? 2 : 1;

// The panel that is wanted next, and the how many-th tile of this one it is: each tile fetches a
// part.
template <class Word>
struct Ahead {
  const Word* panel;
  int64_t tile;
};

template <class F, int NV, int R, int Panels, Sums kSums = Sums::kInMemory, class RowAt,
          class Epilogue>
FUSEDRNN_HD void multiply_rows(int64_t row, int64_t panel, RowAt& row_at,
                               const typename F::Word* packed, int64_t panel_size, int64_t k,
                               Epilogue& epilogue, Ahead<typename F::Word> next,
                               bool from_end = false) {
  using Word = typename F::Word;
  const int64_t first = from_end && k > 0 ? k - 1 : 0, way = from_end ? -1 : 1;
  constexpr int strip = strip_vectors(NV), all = NV * Panels;
  constexpr bool in_registers = kSums == Sums::kInRegisters;
  static_assert(!in_registers || strip == NV);
  // At once where the registers hold all sums, and the operands beside them.
  constexpr int width = R * all + std::min(R, all) <= FUSEDRNN_ACCUMULATORS + 2 ? all : strip;
  // A sum waits for its last addition: short tiles use several sets of sums to hide that. A row's
  // last panel, alone, as many as the others: which one that is depends on the number of threads.
  constexpr int sums = R == 1 ? kRowPanels<NV> * NV : R * width;
  constexpr int sets = sums >= 8 ? 1 : sums >= 4 ? 2 : 4;
  constexpr int64_t b_step = strip * kLanes<Word>;
  // A panel's lines for each k.
  constexpr int64_t lines = std::max<int64_t>(1, NV * kLanes<Word> / kLine<Word>);
  const int64_t strip_size = panel_size / (NV / strip);
  const Word* a[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) a[r] = row_at(row + r) + first;
  Tile<typename F::Sum, R, all> tile;
#pragma GCC unroll 8
  for (int v = 0; v < all; v += width) {
    const Word* strips = packed + panel * panel_size + v / strip * strip_size + first * b_step;
    const int64_t part = (next.tile * (all / width) + v / width) % lines;
    const Word* ahead = next.panel + part * k * kLine<Word>;
    const auto add_products = [&](const Word* const(&from)[R], int64_t begin,
                                  int64_t end) __attribute__((always_inline)) {
      multiply<F, strip, width, sets>(tile, v, from, way, strips + begin * way * b_step,
                                      way * b_step, strip_size, end - begin, begin > 0,
                                      ahead + begin * kLine<Word>);
    };
    if constexpr (R <= 2 || in_registers) {
      add_products(a, 0, k);  // more code makes a short tile's loop slower
    } else {
      for (int64_t i = 0; i == 0 || i < k; i += kAddedInTurn) {
        const Word* from[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) from[r] = a[r] + i * way;
        add_products(from, i, std::min(i + kAddedInTurn, k));
      }
    }
    // From here on a tall tile lies in memory. Without this, g++ 12 lets some of the sums lose
    // their registers to a larger epilogue's values inside the loop, which then adds to memory.
    if constexpr (R > 2 && !in_registers) asm volatile("" : "+m"(tile));
  }
  epilogue(tile, row, panel);
}

// A single row takes two panels at once where they are narrow: a tile's epilogue is one chain of
// dependent instructions for each vector of units, and two hide each other. from_end: from the last
// k of the last panel to the first of the first.
template <class F, int NV, class RowAt, class Epilogue>
FUSEDRNN_HD void product_of_row(int64_t row, Range panels, RowAt row_at,
                                const typename F::Word* packed, int64_t panel_size, int64_t k,
                                Epilogue epilogue, bool from_end) {
  constexpr int at_once = kRowPanels<NV>;
  const int64_t pairs = panels.size() / at_once;
  const Ahead<typename F::Word> none = {packed, 0};  // a low tile fetches nothing
  const auto single = [&] __attribute__((always_inline)) {
    if (panels.size() % at_once == 0) return;
    multiply_rows<F, NV, 1, 1>(row, panels.end - 1, row_at, packed, panel_size, k, epilogue, none,
                               from_end);
  };
  if (from_end) single();
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t pair = from_end ? pairs - 1 - i : i;
    multiply_rows<F, NV, 1, at_once>(row, panels.begin + at_once * pair, row_at, packed, panel_size,
                                     k, epilogue, none, from_end);
  }
  if (!from_end) single();
}

// Calls f with `height` as a compile-time constant, 1 <= height <= Most.
template <int Most, class F>
FUSEDRNN_HD void with_height(int64_t height, F f) {
  if constexpr (Most > 1) {
    if (height < Most) return with_height<Most - 1>(height, f);
  }
  f(std::integral_constant<int, Most>{});
}

// Tiles over rows: as equal in height as can be, eight rows are four and four, not six and two.
struct Tiles {
  Range rows;     // of all tiles
  int64_t count;  // of tiles
  Range mine;     // of them
  int64_t begin(int64_t tile) const { return rows.begin + rows.size() * tile / count; }
};

template <class F, int NV, int MostRows = kTileRows<F, NV>>
constexpr int64_t tile_count(int64_t rows) {
  return (rows + MostRows - 1) / MostRows;
}

// The i-th of `panels` that a product takes, counted from panels.begin.
FUSEDRNN_HD int64_t panel_at(Range panels, int64_t i, bool from_end) {
  return from_end ? panels.begin + panels.end - 1 - i : i;
}

#ifdef FUSEDRNN_MATRIX_UNIT
// As product_of_tiles, of two rows or more. An epilogue takes a tile's rows by fours.
template <int NV, class RowAt, class Epilogue>
FUSEDRNN_HD void product_by_matrix(const Tiles& tiles, Range panels, RowAt row_at,
                                   const uint32_t* packed, int64_t panel_size, int64_t k,
                                   Epilogue epilogue, bool from_end) {
  constexpr int quad = 4;
  using Quad = Tile<float, quad, NV>;
  // Of the tallest tile, as the last one is: a lower one multiplies a row of the next one too.
  const int64_t tallest = (tiles.rows.size() + tiles.count - 1) / tiles.count;
  matrix::take_shape(tallest, k);
  // Where a panel leaves the first cache.
  constexpr int64_t first_cache = 32 << 10;
  const bool in_pairs = k % kLanes<uint32_t> == 0 && k * NV * sizeof(Vec<float>) > first_cache;
  const int64_t begin = tiles.begin(tiles.mine.begin);
  const int64_t end = tiles.begin(tiles.mine.end - 1) + tallest;
  bool even = true;
  for (int64_t row = begin + 1; row + 1 < end && even; ++row) {
    even = bytes_apart(row_at, row) == bytes_apart(row_at, begin);
  }
  const auto finish = [&](const Quad* done, int64_t t,
                          int64_t panel) __attribute__((always_inline)) {
    const int64_t end = tiles.begin(t + 1);
    int64_t row = tiles.begin(t);
    for (; row + quad <= end; row += quad) epilogue(*done++, row, panel);
    if (row == end) return;
    with_height<quad - 1>(end - row, [&](auto height) __attribute__((always_inline)) {
      Tile<float, decltype(height)::value, NV> rest;
      std::memcpy(&rest, done, sizeof(rest));
      epilogue(rest, row, panel);
    });
  };
  Quad sums[2][kMatrixRows / quad];
  Vec<float>* const to[] = {sums[0][0].sum[0], sums[1][0].sum[0]};
  const auto multiply = [&](auto evenly) __attribute__((always_inline)) {
    for (int64_t i = panels.begin; i < panels.end; ++i) {
      const int64_t panel = panel_at(panels, i, from_end);
      const uint32_t* right = packed + panel * panel_size;
      for (int64_t t = tiles.mine.begin; t < tiles.mine.end; ++t) {
        if (in_pairs && t + 1 < tiles.mine.end) {
          multiply_matrix_of_two<NV, evenly>(to, row_at, {tiles.begin(t), tiles.begin(t + 1)},
                                             tallest, right, k);
          finish(sums[0], t++, panel);
          finish(sums[1], t, panel);
        } else {
          multiply_matrix<NV, evenly>(to[0], row_at, tiles.begin(t), tallest, right, k);
          finish(sums[0], t, panel);
        }
      }
    }
  };
  if (even) {
    multiply(std::true_type{});
  } else {
    multiply(std::false_type{});
  }
}
#endif

// Tiles over rows and panels; row_at(row) points to a row's first element, epilogue(tile, row,
// panel) takes each finished tile. from_end: the last panel first. The walk's steps read the
// weights from either end in turn: what the last step left in a cache is used before it has to go.
// Tall tiles fetch k lines each from `wanted` on where it is given, in place of the next panel.
template <class F, int NV, Sums kSums = Sums::kInMemory, int MostRows = kTileRows<F, NV>,
          class RowAt, class Epilogue>
FUSEDRNN_HD void product_of_tiles(const Tiles& tiles, Range panels, RowAt row_at,
                                  const typename F::Word* packed, int64_t panel_size, int64_t k,
                                  Epilogue epilogue, bool from_end = false,
                                  const typename F::Word* wanted = nullptr) {
  if (tiles.mine.size() <= 0) return;
  if (tiles.rows.size() == 1) {
    product_of_row<F, NV>(tiles.rows.begin, panels, row_at, packed, panel_size, k, epilogue,
                          from_end);
    return;
  }
#ifdef FUSEDRNN_MATRIX_UNIT
  if constexpr (kMatrix<F>) {
    return product_by_matrix<NV>(tiles, panels, row_at, packed, panel_size, k, epilogue, from_end);
  }
#endif
  for (int64_t i = panels.begin; i < panels.end; ++i) {
    const int64_t panel = panel_at(panels, i, from_end);
    const int64_t next = panel_at(panels, std::min(i + 1, panels.end - 1), from_end);
    const auto* next_panel = wanted != nullptr ? wanted : packed + next * panel_size;
    for (int64_t t = tiles.mine.begin; t < tiles.mine.end; ++t) {
      const int64_t row = tiles.begin(t);
      with_height<MostRows>(tiles.begin(t + 1) - row, [&](auto r) __attribute__((always_inline)) {
        multiply_rows<F, NV, decltype(r)::value, 1, kSums>(
            row, panel, row_at, packed, panel_size, k, epilogue,
            {next_panel, wanted != nullptr ? 0 : t - tiles.mine.begin});
      });
    }
  }
}

template <class F, int NV, Sums kSums = Sums::kInMemory, int MostRows = kTileRows<F, NV>,
          class RowAt, class Epilogue>
FUSEDRNN_HD void product(Range rows, Range panels, RowAt row_at, const typename F::Word* packed,
                         int64_t panel_size, int64_t k, Epilogue epilogue, bool from_end = false,
                         const typename F::Word* wanted = nullptr) {
  const int64_t count = tile_count<F, NV, MostRows>(rows.size());
  product_of_tiles<F, NV, kSums, MostRows>({rows, count, {0, count}}, panels, row_at, packed,
                                           panel_size, k, epilogue, from_end, wanted);
}

// For an epilogue that touches lines which no prefetcher foresees: fetched now, they arrive while
// the next tile is multiplied. f(row, panel) for `row`, which is counted on past this tile; past
// the last row it goes on with the first ones in the next panel, and past the last panel with
// after_last(row, panel) in this one, where the next product, from the other end, begins.
template <class F, class After>
FUSEDRNN_HD void with_next_tile(Range rows, Range panels, bool from_end, int64_t row, int64_t panel,
                                F f, After after_last) {
  if (row < rows.end) return f(row, panel);
  row -= rows.size();
  if (row >= rows.end) return;
  const int64_t next = panel + (from_end ? -1 : 1);
  if (panels.begin <= next && next < panels.end) {
    f(row, next);
  } else {
    after_last(row, panel);
  }
}

template <class F>
FUSEDRNN_HD void with_next_tile(Range rows, Range panels, int64_t row, int64_t panel, F f) {
  with_next_tile(rows, panels, false, row, panel, f, [](int64_t, int64_t) {});
}

FUSEDRNN_ISA_END
