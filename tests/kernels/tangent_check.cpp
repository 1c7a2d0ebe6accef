// The kernels of the tangents without torch, in float and double, against the same equations one
// unit at a time with dual numbers of double, and plain loops. Built as kernel_check.cpp is; each
// array has exactly the size that tangents.h promises.
//
// Exit status 0: all agree. The argument names the instruction set.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cell_math.h"
#include "cpu/isa.h"
#include "dual.h"
#include "tangents.h"

namespace fusedrnn {
namespace {

using generic::Dual;
using D = Dual<double>;

int failures = 0, cases = 0;
std::mt19937 generator(1);

template <class S>
std::vector<S> random_values(int64_t count) {
  std::uniform_real_distribution<double> any(-1, 1);
  std::vector<S> values(count);
  for (S& value : values) value = static_cast<S>(any(generator));
  return values;
}

template <class S>
void expect(const char* what, int cell, int64_t rows, int64_t size, S got, double want) {
  const double tolerance = sizeof(S) == 8 ? 1e-12 : 1e-4;
  if (std::abs(got - want) <= tolerance * std::max(1.0, std::abs(want))) return;
  if (++failures <= 20) {
    std::printf("%s, %d bytes: cell %d, %ld rows, size %ld: %g, not %g\n", what, int(sizeof(S)),
                cell, long(rows), long(size), double(got), want);
  }
}

// Rows of values and of their tangents.
template <class S>
struct Pair {
  int64_t width;
  std::vector<S> value, tangent;
  Pair(int64_t rows, int64_t width)
      : width(width),
        value(random_values<S>(rows * width)),
        tangent(random_values<S>(rows * width)) {}
  DualRows<const S> in() const { return {{value.data(), width}, {tangent.data(), width}}; }
  DualRows<S> out() { return {{value.data(), width}, {tangent.data(), width}}; }
  D at(int64_t row, int64_t i) const { return {value[row * width + i], tangent[row * width + i]}; }
};

template <class S>
void check_step(Cell cell, int64_t rows, int64_t hidden) {
  ++cases;
  const KernelTable<S>& kernels = current_isa().table<S>();
  const int c = static_cast<int>(cell);
  const int64_t blocks = saved_blocks(cell), block = padded(hidden);
  const std::vector<S> gates = random_values<S>(rows * blocks * block);
  const std::vector<S> sums = random_values<S>(rows * blocks * hidden);
  const Pair<S> entering(rows, hidden), dh(rows, hidden);
  const Pair<S> after(rows, hidden);  // c of an LSTM, h of an RNN
  Pair<S> carry(rows, hidden), dgates(rows, blocks * hidden);
  const Pair<S> carried = carry;
  std::vector<S> c_tangent(rows * hidden), h_tangent = after.tangent;

  const StridedRows<const S> state = after.in().value;
  TangentStep<S> step = {
      rows,          hidden, {gates.data(), blocks * block}, block, {sums.data(), blocks * hidden},
      entering.in(), state,  {c_tangent.data(), hidden},     state, {h_tangent.data(), hidden}};
  kernels.tangents_forward[c](step);
  std::vector<S> given = after.tangent;  // of the state after the step
  TangentStep<S> again = step;
  again.c_tangent = again.h_tangent = {given.data(), hidden};
  kernels.tangents_backward[c]({again, dh.in(), carry.out(), dgates.out()});

  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t unit = 0; unit < hidden; ++unit) {
      const auto saved = [&](int b) -> double { return gates[(row * blocks + b) * block + unit]; };
      const auto sum = [&](int b) -> double { return sums[(row * blocks + b) * hidden + unit]; };
      const auto same = [&](const char* what, const std::vector<S>& got, double want) {
        expect(what, c, rows, hidden, got[row * hidden + unit], want);
      };
      const auto same_gates = [&](std::initializer_list<D> want) {
        int b = 0;
        for (const D& one : want) {
          const int64_t at = (row * blocks + b++) * hidden + unit;
          expect("dgates", c, rows, hidden, dgates.value[at], one.value);
          expect("tangent of dgates", c, rows, hidden, dgates.tangent[at], one.tangent);
        }
      };
      const auto same_carry = [&](D want) {
        same("carry", carry.value, want.value);
        same("tangent of carry", carry.tangent, want.tangent);
      };
      const D prev = entering.at(row, unit), gradient = dh.at(row, unit);
      const D now = after.at(row, unit);
      if (cell == Cell::kLstm) {
        const generic::LstmGates<D> y = {
            generic::sigmoid_at(saved(0), sum(0)), generic::sigmoid_at(saved(1), sum(1)),
            generic::tanh_at(saved(2), sum(2)), generic::sigmoid_at(saved(3), sum(3))};
        const double c_along = generic::lstm_cell_state(y, prev).tangent;
        same("tangent of c", c_tangent, c_along);
        same("tangent of h", h_tangent, generic::lstm_output(y.o, D{now.value, c_along}).tangent);
        const auto d = generic::lstm_backward(y, prev, now, gradient, carried.at(row, unit));
        same_gates({d.dgates.i, d.dgates.f, d.dgates.g, d.dgates.o});
        same_carry(d.dc_prev);
      } else if (cell == Cell::kGru) {
        const D r = generic::sigmoid_at(saved(0), sum(0)),
                z = generic::sigmoid_at(saved(1), sum(1));
        const D a_hn = {saved(3), sum(2)};
        const D n = generic::tanh_at(saved(2), generic::gru_sum(D{0, sum(3)}, r, a_hn).tangent);
        same("tangent of h", h_tangent, generic::gru_output(n, z, prev).tangent);
        const auto d = generic::gru_backward(r, z, n, a_hn, prev, gradient);
        same_gates({d.da_r, d.da_z, d.da_hn, d.da_in});
        same_carry(d.dh_prev);
      } else if (cell == Cell::kRnnTanh) {
        same("tangent of h", h_tangent, generic::Tanh::backward(now.value, sum(0)));
        same_gates({generic::Tanh::backward(now, gradient)});
      } else {
        const double slope = now.value > 0;
        same("tangent of h", h_tangent, slope * sum(0));
        same_gates({{slope * gradient.value, slope * gradient.tangent}});
      }
    }
  }
}

template <class S>
void check_product(int64_t rows, int64_t k, int64_t columns, bool transposed, bool add) {
  ++cases;
  const KernelTable<S>& kernels = current_isa().table<S>();
  const int64_t width = kTangentVectors * current_isa().vector_bytes / int64_t{sizeof(S)};
  const int64_t panels = (columns + width - 1) / width;
  const std::vector<S> w = random_values<S>(k * columns), a = random_values<S>(rows * k);
  const std::vector<S> before = random_values<S>(rows * columns);
  std::vector<S> packed(panels * width * k), out = before;
  kernels.tangents_pack(packed.data(), w.data(), transposed ? columns : k, transposed ? k : columns,
                        transposed);
  const int64_t half = panels / 2;
  for (auto [begin, end] : {std::pair{int64_t{0}, half}, {half, panels}}) {
    kernels.tangents_product(
        {rows, k, columns, begin, end, {a.data(), k}, packed.data(), {out.data(), columns}, add});
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      double want = add ? before[row * columns + column] : 0;
      for (int64_t i = 0; i < k; ++i) {
        want += double(a[row * k + i]) * w[transposed ? column * k + i : i * columns + column];
      }
      expect("product", transposed, rows, columns, out[row * columns + column], want);
    }
  }
}

template <class S>
void check_all() {
  for (Cell cell : {Cell::kLstm, Cell::kGru, Cell::kRnnTanh, Cell::kRnnRelu}) {
    for (int64_t rows : {0, 1, 2, 5}) {
      for (int64_t hidden : {1, 5, 16, 35}) check_step<S>(cell, rows, hidden);
    }
  }
  for (int64_t rows : {0, 1, 2, 5, 8, 17}) {
    for (int64_t k : {1, 7, 64, 1100}) {
      for (int64_t columns : {1, 20, 64, 75}) {
        for (bool transposed : {false, true}) {
          for (bool add : {false, true}) check_product<S>(rows, k, columns, transposed, add);
        }
      }
    }
  }
}

}  // namespace
}  // namespace fusedrnn

int main(int argc, char** argv) {
  using namespace fusedrnn;
  if (argc > 1) set_isa(argv[1]);
  check_all<float>();
  check_all<double>();
  std::printf("%s: %d cases, %d failures\n", current_isa().name, cases, failures);
  return failures == 0 ? 0 : 1;
}
