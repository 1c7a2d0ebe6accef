// The memory that kernel_check.cpp lends to the kernels, laid out as recurrence.h promises.
#pragma once

#include <algorithm>
#include <deque>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/team.h"
#include "problem.h"
#include "recurrence.h"

namespace fusedrnn {

// The groups' rows of a state lie two rows apart.
inline std::vector<int64_t> state_rows(const Case& c) {
  std::vector<int64_t> rows;
  for (int group = 0; group < c.plan.groups; ++group) {
    const Range own = share(c.batch, group, c.plan.groups);
    for (int64_t b = own.begin; b < own.end; ++b) rows.push_back(b + 2 * group);
  }
  return rows;
}

// Rows of `units` values, padded, where the states lie; NaN between them.
template <class E>
std::vector<E> place_rows(const Values& from, const std::vector<int64_t>& at, int64_t units,
                          int64_t in_front = 0) {
  const int64_t stride = in_front + padded(units);
  const E nan = as<E>(std::numeric_limits<double>::quiet_NaN());
  std::vector<E> to((at.back() + 1) * stride, nan);
  for (size_t b = 0; b < at.size(); ++b) {
    E* row = &to[at[b] * stride + in_front];
    std::fill(row, row + padded(units), E(0));
    for (int64_t i = 0; i < units; ++i) row[i] = as<E>(from[b * units + i]);
  }
  return to;
}

template <class E>
std::vector<E> pad_rows(const Values& from, int64_t rows, int64_t units) {
  std::vector<int64_t> at(rows);
  std::iota(at.begin(), at.end(), 0);
  return place_rows<E>(from, at, units);
}

// A weight's rows, each of whole words.
template <class E>
class WeightRows {
 public:
  WeightRows(const Values& from, int64_t columns) {
    constexpr int64_t each = sizeof(Word<E>) / sizeof(E);
    const int64_t stride = words_of<E>(columns) * each;
    values_.assign(from.size() / columns * stride, E(0));
    for (size_t i = 0; i < from.size(); ++i) {
      values_[i / columns * stride + i % columns] = as<E>(from[i]);
    }
  }
  const Word<E>* words() const { return reinterpret_cast<const Word<E>*>(values_.data()); }

 private:
  std::vector<E> values_;
};

// Scratch for the kernels, zeros, with a margin behind each piece that nobody may touch.
class Rooms {
 public:
  template <class T>
  T* take(int64_t values) {
    const size_t size = values * sizeof(T);
    std::vector<unsigned char>& room = rooms_.emplace_back(size + kMargin, kUntouched);
    std::fill_n(room.begin(), size, 0);
    return reinterpret_cast<T*>(room.data());
  }
  bool untouched() const {
    return std::all_of(rooms_.begin(), rooms_.end(), [](const std::vector<unsigned char>& room) {
      return std::all_of(room.end() - kMargin, room.end(),
                         [](unsigned char byte) { return byte == kUntouched; });
    });
  }

 private:
#ifdef __SANITIZE_ADDRESS__  // which sees every step beyond a piece, reads too
  static constexpr int64_t kMargin = 0;
#else
  static constexpr int64_t kMargin = 16384;
#endif
  static constexpr unsigned char kUntouched = 0x7d;
  std::deque<std::vector<unsigned char>> rooms_;
};

}  // namespace fusedrnn
