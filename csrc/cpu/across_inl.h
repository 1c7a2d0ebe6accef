// Products with weights as they lie, for calls too short to pack them. Of few rows as in
// few_rows_inl.h. Of more: the call's rows lie across the vectors and the weights' rows take the
// place of a tile's rows, so that the few are packed, not the many.
#pragma once

#include "cpu/few_rows_inl.h"

FUSEDRNN_ISA_BEGIN

// Vectors of rows in a panel.
inline constexpr int kAcrossVectors = 2;

// Rows of k words to panels [k][vectors][lanes], the lanes being rows; row_at(row) points to one.
// The last panel is filled up with the last row.
template <class Word, class RowAt>
void pack_across(Word* packed, Range rows, int64_t k, RowAt row_at) {
  constexpr int lanes = kLanes<Word>, width = kAcrossVectors * lanes;
  for (int64_t row = rows.begin; row < rows.end; row += width, packed += width * k) {
    for (int v = 0; v < kAcrossVectors; ++v) {
      const Word* from[lanes];
      for (int r = 0; r < lanes; ++r) from[r] = row_at(std::min(row + v * lanes + r, rows.end - 1));
      for (int64_t i = 0; i < k; i += lanes) {
        Vec<Word> block[lanes];
        for (int r = 0; r < lanes; ++r) block[r] = load(from[r] + i, k - i);
        transpose<Word>(block);
        for (int64_t r = 0; r < lanes && i + r < k; ++r) {
          store(packed + (i + r) * width + v * lanes, block[r]);
        }
      }
    }
  }
}

// A term of a panel of rows, packed: their products with rows of k words of weights. Those from
// `next` on are fetched meanwhile, unless that is null.
template <class Word>
struct PackedTerm {
  const Word* packed;
  const Word* weights;
  int64_t k;
  const Word* next;
};

// k of a turn: as kAddedInTurn, for calls of so few rows that a product by columns of k, as torch's
// then is, has smaller errors still.
inline constexpr int64_t kAddedAcross = 256;

// to (vectors, rows, lanes of units) = the sum of all terms: the products of one panel of rows with
// up to `lanes` rows of weights, of which `valid` exist (the others give 0). A function, not
// inlined: it serves all cells.
template <class F>
__attribute__((noinline)) void across_panel(typename F::Sum* to,
                                            const PackedTerm<typename F::Word>* terms, int count,
                                            int64_t valid) {
  using Sum = typename F::Sum;
  constexpr int lanes = kLanes<Sum>;
  constexpr int tall = std::min(8, FUSEDRNN_ACCUMULATORS / kAcrossVectors);
  constexpr int most =
      kMatrix<F> ? kMatrixRows : std::min(F::kMostRows < 6 ? F::kMostRows : tall, lanes);
  Vec<Sum> sums[kAcrossVectors][lanes];
  for (int v = 0; v < kAcrossVectors; ++v) {
    for (int64_t unit = valid; unit < lanes; ++unit) sums[v][unit] = Vec<Sum>{};
  }
  bool first = true;
  for (const auto* term = terms; term < terms + count; ++term) {
    for (int64_t i = 0; first || i < term->k; i += kAddedAcross, first = false) {
      product<F, kAcrossVectors, Sums::kInRegisters, most>(
          Range{0, valid}, Range{0, 1},
          [&](int64_t unit) { return term->weights + unit * term->k + i; },
          term->packed + i * kAcrossVectors * lanes, 0, std::min(kAddedAcross, term->k - i),
          [&]<int R, int NV>(const Tile<Sum, R, NV>& tile, int64_t unit, int64_t)
              __attribute__((always_inline)) {
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
                  for (int v = 0; v < kAcrossVectors; ++v) {
                    Vec<Sum>& sum = sums[v][unit + r];
                    sum = first ? tile.sum[r][v] : sum + tile.sum[r][v];
                  }
                }
              },
          /*from_end=*/false,
          term->next == nullptr ? nullptr : term->next + i * kLine<typename F::Word>);
    }
  }
  for (int v = 0; v < kAcrossVectors; ++v) {
    transpose<Sum>(sums[v]);
    for (int r = 0; r < lanes; ++r) store(to + (v * lanes + r) * lanes, sums[v][r]);
  }
}

// As product_by_unit, from rows that pack_across has packed.
template <int Gates, class F, int Count, class Epilogue>
FUSEDRNN_HD void product_across(Range rows, Range panels, int64_t units, bool from_end,
                                const PackedTerm<typename F::Word> (&terms)[Count],
                                Epilogue epilogue) {
  using P = UnitPanel<Gates>;
  using Sum = typename F::Sum;
  constexpr int lanes = kLanes<Sum>, width = kAcrossVectors * lanes;
  for (int64_t at = panels.begin; at < panels.end; ++at) {
    const int64_t panel = panel_at(panels, at, from_end);
    // Rows side by side, short ones, are no stream that a prefetcher follows.
    const int64_t units_on = (from_end ? -1 : 1) * P::blocks * lanes;
    for (int64_t row = rows.begin; row < rows.end; row += width) {
      alignas(64) Sum totals[P::vectors][width * lanes];
      for (int v = 0; v < P::vectors; ++v) {
        const int64_t unit = (panel * P::blocks + v / Gates) * lanes;
        const int64_t valid = std::clamp<int64_t>(units - unit, 0, lanes);
        const int64_t first = (v % Gates) * units + std::min(unit, units);
        PackedTerm<typename F::Word> here[Count];
        for (int i = 0; i < Count; ++i) {
          const auto& term = terms[i];
          const auto* weights = term.weights + first * term.k;
          const bool fetches = row == rows.begin && at + 1 < panels.end;
          here[i] = {term.packed + (row - rows.begin) * term.k, weights, term.k,
                     fetches ? weights + units_on * term.k : nullptr};
        }
        across_panel<F>(totals[v], here, Count, valid);
      }
      for (int64_t r = 0; r < width && row + r < rows.end; ++r) {
        Tile<Sum, 1, P::vectors> tile;
        for (int v = 0; v < P::vectors; ++v) tile.sum[0][v] = load(totals[v] + r * lanes);
        epilogue(tile, row + r, panel);
      }
    }
  }
}

// How many of `rows` are taken so: whole panels, and the rest where it nearly fills one. The others
// are quicker one by one (few_rows_inl.h).
template <class Word>
constexpr int64_t rows_across(int64_t rows) {
  constexpr int64_t width = kAcrossVectors * kLanes<Word>;
  const int64_t rest = rows % width;
  return rest * 8 > width * 5 ? rows : rows - rest;
}

// The sum of all terms by panels of units, from weights as they lie. `scratch` holds kMostAcross
// rows of each term, filled up to whole panels, or is null: then all rows are taken one by one.
template <int Gates, class F, class Epilogue, class... RowAt>
FUSEDRNN_HD void product_unpacked(Range rows, Range panels, int64_t units,
                                  typename F::Word* scratch, bool from_end, Epilogue epilogue,
                                  const Term<typename F::Word, RowAt>&... terms) {
  using Word = typename F::Word;
  constexpr int64_t width = kAcrossVectors * kLanes<Word>;
  const int64_t end = rows.begin + (scratch == nullptr ? 0 : rows_across<Word>(rows.size()));
  for (int64_t first = rows.begin; first < end; first += kMostAcross) {
    const Range some = {first, std::min(first + kMostAcross, end)};
    Word* to = scratch;
    const auto packed = [&](const auto& term) {
      const PackedTerm<Word> done = {to, term.weights, term.k, nullptr};
      pack_across(to, some, term.k, term.row_at);
      to += (some.size() + width - 1) / width * width * term.k;
      return done;
    };
    const PackedTerm<Word> all[] = {packed(terms)...};
    product_across<Gates, F>(some, panels, units, from_end, all, epilogue);
  }
  product_by_unit<Gates, F>(Range{end, rows.end}, panels, units, from_end, epilogue, terms...);
}

FUSEDRNN_ISA_END
