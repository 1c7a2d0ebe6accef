// A layer's random problem, its results by plain loops in double and samples of its gradients by
// finite differences: what kernel_check.cpp holds the kernels against.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <random>
#include <type_traits>
#include <vector>

#include "cpu/team.h"
#include "recurrence.h"

namespace fusedrnn {

using Values = std::vector<double>;

inline std::mt19937 generator(1);

// bfloat16 is the upper half of a float, and uint16_t to the kernels. To the nearest.
inline uint16_t half_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return value != value ? 0x7fc0 : (bits + 0x8000u) >> 16;
}
inline float float_of(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Values that a float holds too.
inline Values random_values(int64_t n) {
  std::uniform_real_distribution<float> uniform(-0.7f, 0.7f);
  Values v(n);
  for (double& x : v) x = uniform(generator);
  return v;
}

template <class E>
E as(double value) {
  if constexpr (std::is_same_v<E, uint16_t>) {
    return half_of(static_cast<float>(value));
  } else {
    return static_cast<E>(value);
  }
}
template <class E>
std::vector<E> as(const Values& from) {
  std::vector<E> to;
  for (double value : from) to.push_back(as<E>(value));
  return to;
}
template <class E>
Values wide(const E* from, int64_t n) {
  if constexpr (std::is_same_v<E, uint16_t>) {
    Values to;
    for (int64_t i = 0; i < n; ++i) to.push_back(float_of(from[i]));
    return to;
  } else {
    return {from, from + n};
  }
}

// A layer of one direction, and how it is cut.
struct Case {
  Cell cell;
  int64_t batch, input, hidden, output;
  std::vector<int64_t> lengths;  // sorted, longest first
  bool reverse, reset;
  Plan plan;
  int64_t chunk;        // steps
  bool joined = false;  // forward: the input stands in front of the state
};

struct Problem {
  Sizes sizes;
  std::vector<int64_t> rows, row0;
  std::vector<uint8_t> reset;
  Values x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0;
  Values dy, dh_n, dc_n;  // the loss is their inner product with y, h_n and c_n
  int64_t steps() const { return static_cast<int64_t>(rows.size()); }
};

inline Problem make_problem(const Case& c) {
  Problem p;
  p.sizes = {c.input, c.hidden, c.output, c.output != c.hidden};
  p.rows.assign(c.lengths[0], 0);
  for (int64_t length : c.lengths) {
    for (int64_t t = 0; t < length; ++t) ++p.rows[t];
  }
  p.row0 = {0};
  for (int64_t n : p.rows) p.row0.push_back(p.row0.back() + n);
  const int64_t pairs = p.row0.back(), gates = gate_blocks(c.cell) * c.hidden;
  if (c.reset) {
    for (int64_t i = 0; i < pairs; ++i) p.reset.push_back(generator() % 4 == 0);
  }
  p.x = random_values(pairs * c.input);
  p.w_ih = random_values(gates * c.input);
  p.w_hh = random_values(gates * c.output);
  p.b_ih = random_values(gates);
  p.b_hh = random_values(gates);
  if (p.sizes.projected) p.w_hr = random_values(c.output * c.hidden);
  p.h0 = random_values(c.batch * c.output);
  p.c0 = random_values(c.batch * c.hidden);
  p.dy = random_values(pairs * c.output);
  p.dh_n = random_values(c.batch * c.output);
  p.dc_n = random_values(c.batch * c.hidden);
  return p;
}

// The same with values that a bfloat16 holds too.
inline Problem rounded(Problem p) {
  for (Values* values :
       {&p.x, &p.w_ih, &p.w_hh, &p.b_ih, &p.b_hh, &p.w_hr, &p.h0, &p.c0, &p.dy, &p.dh_n, &p.dc_n}) {
    for (double& value : *values) value = float_of(half_of(static_cast<float>(value)));
  }
  return p;
}

struct Result {
  Values y, h_n, c_n;
};

// The definition, one row and one unit at a time.
inline Result plain_forward(const Case& c, const Problem& p) {
  const int64_t H = c.hidden, P = c.output, I = c.input;
  const auto sigmoid = [](double a) { return 1 / (1 + std::exp(-a)); };
  Result r{Values(p.dy.size()), p.h0, p.c0};
  for (int64_t i = 0; i < p.steps(); ++i) {
    const int64_t t = c.reverse ? p.steps() - 1 - i : i;
    for (int64_t b = 0; b < p.rows[t]; ++b) {
      const int64_t row = p.row0[t] + b;
      double* h = &r.h_n[b * P];
      double* cell = &r.c_n[b * H];
      if (!p.reset.empty() && p.reset[row]) {
        std::fill(h, h + P, 0.0);
        std::fill(cell, cell + H, 0.0);
      }
      const auto side = [&](const Values& w, const Values& bias, const double* v, int64_t k,
                            int64_t gate) {
        double sum = bias[gate];
        for (int64_t j = 0; j < k; ++j) sum += w[gate * k + j] * v[j];
        return sum;
      };
      Values next(H);
      for (int64_t u = 0; u < H; ++u) {
        const auto from_x = [&](int g) {
          return side(p.w_ih, p.b_ih, &p.x[row * I], I, g * H + u);
        };
        const auto from_h = [&](int g) { return side(p.w_hh, p.b_hh, h, P, g * H + u); };
        const auto gate = [&](int g) { return from_x(g) + from_h(g); };
        if (c.cell == Cell::kLstm) {
          cell[u] = sigmoid(gate(1)) * cell[u] + sigmoid(gate(0)) * std::tanh(gate(2));
          next[u] = sigmoid(gate(3)) * std::tanh(cell[u]);
        } else if (c.cell == Cell::kGru) {
          const double z = sigmoid(gate(1));
          next[u] = (1 - z) * std::tanh(from_x(2) + sigmoid(gate(0)) * from_h(2)) + z * h[u];
        } else {
          next[u] = c.cell == Cell::kRnnTanh ? std::tanh(gate(0)) : std::max(gate(0), 0.0);
        }
      }
      if (p.sizes.projected) {
        for (int64_t j = 0; j < P; ++j) {
          h[j] = 0;
          for (int64_t u = 0; u < H; ++u) h[j] += p.w_hr[j * H + u] * next[u];
        }
      } else {
        std::copy(next.begin(), next.end(), h);
      }
      std::copy(h, h + P, &r.y[row * P]);
    }
  }
  return r;
}

inline double loss(const Case& c, const Problem& p) {
  const Result r = plain_forward(c, p);
  double sum = 0;
  for (size_t i = 0; i < r.y.size(); ++i) sum += r.y[i] * p.dy[i];
  for (size_t i = 0; i < r.h_n.size(); ++i) sum += r.h_n[i] * p.dh_n[i];
  if (c.cell == Cell::kLstm) {
    for (size_t i = 0; i < r.c_n.size(); ++i) sum += r.c_n[i] * p.dc_n[i];
  }
  return sum;
}

// Every how many entries of a gradient one is compared, for some `samples` of them.
template <class Array>
size_t sample_stride(const Array& gradient, size_t samples) {
  return gradient.size() / samples + 1;
}

inline constexpr struct {
  const char* name;
  Values Problem::* of;
} kGradients[] = {{"dx", &Problem::x},       {"dh0", &Problem::h0},     {"dc0", &Problem::c0},
                  {"dw_ih", &Problem::w_ih}, {"dw_hh", &Problem::w_hh}, {"db_ih", &Problem::b_ih},
                  {"db_hh", &Problem::b_hh}, {"dw_hr", &Problem::w_hr}};

struct Expected {
  Result result;
  size_t samples;                           // of each gradient
  Values gradients[std::size(kGradients)];  // samples; none where the cell has no such thing
};

inline Expected expect(const Case& c, const Problem& p, size_t samples) {
  constexpr double step = 1e-6;
  Expected e{plain_forward(c, p), samples, {}};
  for (size_t k = 0; k < std::size(kGradients); ++k) {
    Values Problem::* const of = kGradients[k].of;
    if (of == &Problem::c0 && c.cell != Cell::kLstm) continue;
    for (size_t i = 0; i < (p.*of).size(); i += sample_stride(p.*of, samples)) {
      Problem up = p, down = p;
      (up.*of)[i] += step;
      (down.*of)[i] -= step;
      e.gradients[k].push_back((loss(c, up) - loss(c, down)) / (2 * step));
    }
  }
  return e;
}

}  // namespace fusedrnn
