// Products of few rows with weights as they lie, for calls too short to pack them: by unit,
// forward, and by column, backward. Of more rows: across_inl.h.
#pragma once

#include "cpu/pack_inl.h"

FUSEDRNN_ISA_BEGIN

// A term of R rows' products with rows of weights, row-major, k words each.
template <class Word, int R>
struct DotTerm {
  const Word* a[R];
  const Word* weights;
  int64_t k;
};

// sums[set][r][l] += the products of row a[r] and row w[l] of weights, their lanes apart. The sets
// take the vectors of k in turns.
template <class F, int Sets, int R, int Group>
FUSEDRNN_HD void multiply_weight_rows(Vec<typename F::Sum> (&sums)[Sets][R][Group],
                                      const typename F::Word* const (&a)[R],
                                      const typename F::Word* const (&w)[Group], int64_t k) {
  constexpr int lanes = kLanes<typename F::Sum>;
  const auto step = [&](auto& s, auto load_at) __attribute__((always_inline)) {
    for_each_constant<F::kParts>([&](auto part) __attribute__((always_inline)) {
      const auto left_at = [&](int r) __attribute__((always_inline)) {
        return F::template left<part>(load_at(a[r]));
      };
      decltype(left_at(0)) left[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) left[r] = left_at(r);
#pragma GCC unroll 16
      for (int l = 0; l < Group; ++l) {
        const auto right = F::template right<part>(load_at(w[l]));
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) s[r][l] = F::add(s[r][l], left[r], right);
      }
    });
  };
  int64_t i = 0;
  for (; i + Sets * lanes <= k; i += Sets * lanes) {
#pragma GCC unroll 4
    for (int u = 0; u < Sets; ++u) {
      step(sums[u], [&](const auto* from) { return load(from + i + u * lanes); });
    }
  }
  for (; i + lanes <= k; i += lanes) {
    step(sums[0], [&](const auto* from) { return load(from + i); });
  }
  if (i < k) step(sums[0], [&](const auto* from) { return load(from + i, k - i); });
}

// How many rows of weights dot_rows takes at a time beside R other rows: a power of two.
template <class Sum, int R>
constexpr int weight_rows() {
  int rows = kLanes<Sum>;
  while (rows * R > FUSEDRNN_ACCUMULATORS && rows > 1) rows /= 2;
  return rows;
}

// From so many vectors on a single row takes the weights' rows one after another, where a vector is
// a line: read from one end to the other they come from the private cache up to 1.6 times as fast
// as several side by side. Narrower vectors would take as many loads again for the row's own
// values.
inline constexpr int kWorthOneByOne = 8;
inline constexpr bool kTakesOneByOne = sizeof(Vec<float>) == 64;

// to[r * to_stride + l] = the sum of all terms: the products of row r and row l of weights, for
// `lanes` rows l, of which `valid` exist (the others give 0). A function, not inlined: it serves
// all cells.
template <class F, int R, int Count>
__attribute__((noinline)) void dot_rows(typename F::Sum* to, int64_t to_stride,
                                        const DotTerm<typename F::Word, R> (&terms)[Count],
                                        int64_t valid) {
  using Sum = typename F::Sum;
  constexpr int lanes = kLanes<Sum>;
  const auto in_groups = [&]<int Group, int Sets>() __attribute__((always_inline)) {
    // By value: the compiler would read them again at each turn.
    DotTerm<typename F::Word, R> mine[Count];
#pragma GCC unroll 2
    for (int i = 0; i < Count; ++i) mine[i] = terms[i];
    Vec<Sum> all[R][lanes];
    for (int first = 0; first < lanes; first += Group) {
      Vec<Sum> sums[Sets][R][Group] = {};
#pragma GCC unroll 2
      for (int i = 0; i < Count; ++i) {
        const typename F::Word* w[Group];
#pragma GCC unroll 16
        for (int l = 0; l < Group; ++l) {
          w[l] = mine[i].weights + std::min<int64_t>(first + l, valid - 1) * mine[i].k;
        }
        multiply_weight_rows<F>(sums, mine[i].a, w, mine[i].k);
      }
      // A group's lanes are added up as far as they meet, while the sums are in registers.
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        Vec<Sum> row[Group];
#pragma GCC unroll 16
        for (int l = 0; l < Group; ++l) {
          row[l] = sums[0][r][l];
          if constexpr (Sets == 4) {
            row[l] = (row[l] + sums[1][r][l]) + (sums[2][r][l] + sums[3][r][l]);
          }
        }
        add_stages<1, Group, Sum>(row);
        all[r][first] = row[0];
      }
    }
    for (int r = 0; r < R; ++r) {
      Vec<Sum> row[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; i += Group) row[i] = all[r][i];
      add_stages<Group, lanes, Sum>(row);
      for (int64_t l = valid; l < lanes; ++l) row[0][l] = 0;
      store(to + r * to_stride, row[0]);
    }
  };
  constexpr bool may = R == 1 && kTakesOneByOne;
  const bool one_by_one = may && terms[0].k >= kWorthOneByOne * lanes;
  if constexpr (may) {
    if (one_by_one) in_groups.template operator()<1, 4>();
  }
  if (!one_by_one) in_groups.template operator()<weight_rows<Sum, R>(), 1>();
}

// A term of a sum of products: rows of k words, row_at(row) pointing to one, with rows of weights
// of as many, row-major.
template <class Word, class RowAt>
struct Term {
  RowAt row_at;
  const Word* weights;
  int64_t k;
};

// The sum of all terms by panels of units, as product()'s, from weights (Gates * units, k) as they
// lie: for calls so short that packing would cost more than it saves.
template <int Gates, class F, class Epilogue, class... RowAt>
FUSEDRNN_HD void product_by_unit(Range rows, Range panels, int64_t units, bool from_end,
                                 Epilogue epilogue, const Term<typename F::Word, RowAt>&... terms) {
  using P = UnitPanel<Gates>;
  using Sum = typename F::Sum;
  constexpr int lanes = kLanes<Sum>, most = std::min(F::kMostRows, kTallRows);
  const int64_t blocks = (rows.size() + most - 1) / most;
  for (int64_t i = panels.begin; i < panels.end; ++i) {
    const int64_t panel = panel_at(panels, i, from_end);
    for (int64_t block = 0; block < blocks; ++block) {
      const Range mine = share(rows.size(), block, blocks);
      alignas(64) Sum totals[most][P::vectors * lanes];
      with_height<most>(mine.size(), [&](auto height) {
        constexpr int R = decltype(height)::value;
        // A term's rows, and its rows of weights from `first` on.
        const auto here = [&](const auto& term, int64_t first) __attribute__((always_inline)) {
          DotTerm<typename F::Word, R> all = {{}, term.weights + first * term.k, term.k};
          for (int r = 0; r < R; ++r) all.a[r] = term.row_at(rows.begin + mine.begin + r);
          return all;
        };
        for (int v = 0; v < P::vectors; ++v) {
          Sum* to = totals[0] + v * lanes;
          const int64_t unit = (panel * P::blocks + v / Gates) * lanes;
          const int64_t valid = std::min<int64_t>(lanes, units - unit);
          if (valid > 0) {
            dot_rows<F, R, sizeof...(terms)>(to, P::vectors * lanes,
                                             {here(terms, (v % Gates) * units + unit)...}, valid);
          } else {
            for (int r = 0; r < R; ++r) store(to + r * P::vectors * lanes, Vec<Sum>{});
          }
        }
      });
      for (int64_t r = 0; r < mine.size(); ++r) {
        Tile<Sum, 1, P::vectors> tile;
        for (int v = 0; v < P::vectors; ++v) tile.sum[0][v] = load(totals[r] + v * lanes);
        epilogue(tile, rows.begin + mine.begin + r, panel);
      }
    }
  }
}

// The rows of a weight (blocks * units, columns), row-major in whole words, and the values that go
// with them in a row of gradients: block i of those, units_padded apart, belongs to rows
// [gates[i] * units, + units).
template <class E>
struct BlockRows {
  const E* weight;
  const int* gates;
  int blocks;
  int64_t units, units_padded, columns;
};

// to[r] (Vectors of them) = the sum over `units` of `blocks` of a[r]'s value times the weight's row
// there, from `column` on, or added to it where `add`: the product of few rows by column, from
// weights as they lie.
template <class S, class E, int R, int Vectors>
__attribute__((noinline)) void sum_weight_rows(S* to, const E* const (&a)[R],
                                               const BlockRows<E>& rows, Range blocks, Range units,
                                               int64_t column, bool add) {
  constexpr int lanes = kLanes<S>;
  // Narrow pieces of rows lie far apart: no prefetcher follows.
  constexpr int64_t ahead = Vectors == kChunkVectors ? 12 : 0;
  const int64_t valid = rows.columns - column;
  const int64_t stride = values_apart<FormatOf<E>>(rows.columns);
  // Two loops: in one with both ways to read, g++ 12 keeps the sums in memory.
  const auto sum = [&](auto whole) __attribute__((always_inline)) {
    Vec<S> sums[R][Vectors] = {};
    for (int64_t i = blocks.begin; i < blocks.end; ++i) {
      const E* w = rows.weight + (rows.gates[i] * rows.units + units.begin) * stride + column;
      for (int64_t unit = units.begin; unit < units.end; ++unit, w += stride) {
        const int64_t at = i * rows.units_padded + unit;
        if constexpr (whole && ahead > 0) {
#pragma GCC unroll 16
          for (int64_t c = 0; c < Vectors * lanes; c += kLine<E>) {
            fetch_to_read(w + ahead * stride + c);
          }
        }
#pragma GCC unroll 16
        for (int v = 0; v < Vectors; ++v) {
          const E* from = w + v * lanes;
          const Vec<S> right = whole ? read(from) : read(from, valid - v * lanes);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) sums[r][v] += broadcast(value_of(a[r][at])) * right;
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) {
        S* at = to + (r * Vectors + v) * lanes;
        store(at, add ? load(at) + sums[r][v] : sums[r][v]);
      }
    }
  };
  if (valid >= Vectors * lanes) {
    sum(std::true_type{});
  } else {
    sum(std::false_type{});
  }
}

// Panels that a single row takes at once: the more of a weight's row it reads in one go, the faster
// that comes.
inline constexpr int kPanelsOfOne = 4;

// f(row, column, vector) for every vector of those sums that begins within the columns, for `rows`,
// row_at(row) pointing to a row of gradients, and `panels` of kChunkVectors.
template <class S, class E, class RowAt, class Visit>
void product_by_column(Range rows, Range panels, RowAt row_at, const BlockRows<E>& weight,
                       Visit f) {
  constexpr int lanes = kLanes<S>, most = std::min(4, FUSEDRNN_ACCUMULATORS / kChunkVectors);
  constexpr int64_t width = kChunkVectors * lanes;
  const int64_t blocks_at_once = std::max<int64_t>(1, kAddedInTurn / weight.units);
  alignas(64) S sums[std::max(most, kPanelsOfOne) * width];
  // Rows from `first` on, R of them, and as many panels from `panel` on.
  const auto visit = [&]<int R, int Panels>(int64_t first, int64_t panel) {
    constexpr int vectors = Panels * kChunkVectors;
    const E* a[R];
    for (int r = 0; r < R; ++r) a[r] = row_at(first + r);
    for (int64_t i = 0; i < weight.blocks; i += blocks_at_once) {
      for (int64_t unit = 0; unit < weight.units; unit += kAddedInTurn) {
        sum_weight_rows<S, E, R, vectors>(
            sums, a, weight, {i, std::min<int64_t>(i + blocks_at_once, weight.blocks)},
            {unit, std::min(unit + kAddedInTurn, weight.units)}, panel * width, i + unit > 0);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < vectors; ++v) {
        const int64_t column = panel * width + v * lanes;
        if (column >= weight.columns) break;
        f(first + r, column, load(sums + (r * vectors + v) * lanes));
      }
    }
  };
  if (rows.size() == 1) {
    int64_t panel = panels.begin;
    while (panel < panels.end) {
      // The last one, if not whole, by itself: it is read through masks.
      const int64_t whole = std::min(panels.end, weight.columns / width) - panel;
      const int64_t some = std::clamp<int64_t>(whole, 1, kPanelsOfOne);
      with_height<kPanelsOfOne>(some, [&](auto count) {
        visit.template operator()<1, decltype(count)::value>(rows.begin, panel);
      });
      panel += some;
    }
    return;
  }
  const int64_t blocks = (rows.size() + most - 1) / most;
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    for (int64_t block = 0; block < blocks; ++block) {
      const Range mine = share(rows.size(), block, blocks);
      with_height<most>(mine.size(), [&](auto height) {
        visit.template operator()<decltype(height)::value, 1>(rows.begin + mine.begin, panel);
      });
    }
  }
}

FUSEDRNN_ISA_END
