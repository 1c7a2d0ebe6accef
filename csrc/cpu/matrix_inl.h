// Products by a matrix unit (AMX): one instruction multiplies up to 16 rows of 16 words with 16
// words of a panel's vector.
//
// FUSEDRNN_MATRIX_UNIT, from the kernel file: there is one, and the header that has its
// instructions.
#pragma once

#include "cpu/formats_inl.h"
#ifdef FUSEDRNN_MATRIX_UNIT
  #include FUSEDRNN_MATRIX_UNIT
#endif

FUSEDRNN_ISA_BEGIN

// The formats whose products it takes, of two rows and more.
#ifdef FUSEDRNN_MATRIX_UNIT
template <class F>
inline constexpr bool kMatrix = std::is_same_v<F, Bf16>;
#else
template <class F>
inline constexpr bool kMatrix = false;
#endif

inline constexpr int kMatrixRows = 16;

#ifdef FUSEDRNN_MATRIX_UNIT

namespace matrix {

// Registers: 0 to 3 hold sums, two more rows, two a panel's words. The second of either is as large
// as the first one, or has the tail of k.
inline constexpr int kSums = 4, kLeft[] = {4, 6}, kRight[] = {5, 7};

// What the registers are set to: `rows` rows, and `words` of k in the second ones. 0: nothing yet,
// as before the first product of a call.
struct Shape {
  uint8_t rows, words;
};
static thread_local Shape t_shape;

inline void take_shape(int64_t rows, int64_t k) {
  constexpr uint8_t line = kLine<uint32_t>;
  const int64_t tail = k % line, words = tail == 0 ? line : tail;
  if (t_shape.rows == rows && t_shape.words == words) return;
  t_shape = {static_cast<uint8_t>(rows), static_cast<uint8_t>(words)};
  struct alignas(64) {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } config = {};
  config.palette = 1;
  const auto has = [&](int i, uint8_t its_rows, uint8_t its_words) {
    config.rows[i] = its_rows;
    config.bytes[i] = its_words * sizeof(uint32_t);
  };
  for (int i = 0; i < kSums; ++i) has(i, t_shape.rows, line);
  has(kLeft[0], t_shape.rows, line);
  has(kRight[0], line, line);
  has(kLeft[1], t_shape.rows, t_shape.words);
  has(kRight[1], t_shape.words, line);
  configure(&config);
}

}  // namespace matrix

// From a row to the next one.
template <class RowAt>
FUSEDRNN_HD int64_t bytes_apart(RowAt row_at, int64_t row) {
  return reinterpret_cast<intptr_t>(row_at(row + 1)) - reinterpret_cast<intptr_t>(row_at(row));
}

// Rows as a register's load takes them: `rows` of them, equally far apart or, if not Even, copied.
template <bool Even, class RowAt>
class MatrixRowsFrom {
 public:
  FUSEDRNN_HD MatrixRowsFrom(RowAt row_at, int64_t row, int64_t rows)
      : row_at_(row_at), row_(row), rows_(rows), first_(row_at(row)) {
    if constexpr (Even) apart_ = bytes_apart(row_at, row);
  }

  // n words of each row from word i on.
  template <int Register>
  FUSEDRNN_HD void load_words(int64_t i, int64_t n) {
    if constexpr (Even) {
      matrix::load<Register>(first_ + i, apart_);
    } else {
      for (int64_t r = 0; r < rows_; ++r) copy_[r] = load(row_at_(row_ + r) + i, n);
      matrix::load<Register>(copy_, sizeof(copy_[0]));
    }
  }

 private:
  const RowAt row_at_;
  const int64_t row_, rows_;
  const uint32_t* const first_;
  int64_t apart_ = 0;
  Vec<uint32_t> copy_[Even ? 1 : kMatrixRows];
};

// sums (rows, NV vectors) = the products of `rows` rows from `row` on, row_at(row) pointing to one,
// with a panel [k][NV][lanes]. rows <= kMatrixRows, and the shape has been taken.
template <int NV, bool Even, class RowAt>
FUSEDRNN_HD void multiply_matrix(Vec<float>* sums, RowAt row_at, int64_t row, int64_t rows,
                                 const uint32_t* panel, int64_t k) {
  static_assert(NV <= matrix::kSums);
  constexpr int lanes = kLanes<uint32_t>;
  constexpr int64_t k_apart = NV * sizeof(Vec<uint32_t>);
  MatrixRowsFrom<Even, RowAt> left(row_at, row, rows);
  for_each_constant<NV>([](auto v) __attribute__((always_inline)) { matrix::zero<v>(); });
  const auto step = [&](auto side, int64_t i, int64_t n) __attribute__((always_inline)) {
    left.template load_words<matrix::kLeft[side]>(i, n);
    for_each_constant<NV>([&](auto v) __attribute__((always_inline)) {
      matrix::load<matrix::kRight[side]>(panel + (i * NV + v) * lanes, k_apart);
      matrix::multiply<v, matrix::kLeft[side], matrix::kRight[side]>();
    });
  };
  int64_t i = 0;
  for (; i + lanes <= k; i += lanes) step(std::integral_constant<int, 0>{}, i, lanes);
  if (i < k) step(std::integral_constant<int, 1>{}, i, k - i);
  for_each_constant<NV>(
      [&](auto v) __attribute__((always_inline)) { matrix::store<v>(sums + v, k_apart); });
}

// The same of two tiles, from row[0] and row[1] on, and whole lines of k: a panel's words come from
// a cache once for both.
template <int NV, bool Even, class RowAt>
FUSEDRNN_HD void multiply_matrix_of_two(Vec<float>* const (&sums)[2], RowAt row_at,
                                        const int64_t (&row)[2], int64_t rows,
                                        const uint32_t* panel, int64_t k) {
  constexpr int lanes = kLanes<uint32_t>;
  constexpr int64_t k_apart = NV * sizeof(Vec<uint32_t>);
  MatrixRowsFrom<Even, RowAt> left[] = {{row_at, row[0], rows}, {row_at, row[1], rows}};
  for_each_constant<(NV + 1) / 2>([&](auto pair) __attribute__((always_inline)) {
    constexpr int first = 2 * pair, width = std::min(2, NV - first);
    for_each_constant<2 * width>([](auto s) __attribute__((always_inline)) { matrix::zero<s>(); });
    for (int64_t i = 0; i < k; i += lanes) {
      left[0].template load_words<matrix::kLeft[0]>(i, lanes);
      left[1].template load_words<matrix::kLeft[1]>(i, lanes);
      for_each_constant<width>([&](auto v) __attribute__((always_inline)) {
        matrix::load<matrix::kRight[v]>(panel + (i * NV + first + v) * lanes, k_apart);
        matrix::multiply<v, matrix::kLeft[0], matrix::kRight[v]>();
        matrix::multiply<width + v, matrix::kLeft[1], matrix::kRight[v]>();
      });
    }
    for_each_constant<width>([&](auto v) __attribute__((always_inline)) {
      matrix::store<v>(sums[0] + first + v, k_apart);
      matrix::store<width + v>(sums[1] + first + v, k_apart);
    });
  });
}

#endif

// At a kernel's end: the unit is as if it had not been used, for whoever comes next.
inline void release_matrix_unit() {
#ifdef FUSEDRNN_MATRIX_UNIT
  if (matrix::t_shape.rows == 0) return;
  matrix::release();
  matrix::t_shape = {};
#endif
}

FUSEDRNN_ISA_END
