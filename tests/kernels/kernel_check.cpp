// The kernels without torch, in float and double: every cell, direction, ragged rows, resets,
// projection and split of a team, forward against plain loops in double and backward against finite
// differences. Built by tests/test_kernels.py, with sanitizers by `make sanitize`; each array has
// exactly the size that recurrence.h promises, so that a read past its end is seen.
//
// Exit status 0: all agree. The argument names the instruction set.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <deque>
#include <functional>
#include <iterator>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "cpu/isa.h"
#include "cpu/plan.h"
#include "problem.h"

namespace fusedrnn {
namespace {

// Tolerances: of a kernel's rounding, and of finite differences beside it.
template <class S>
constexpr double kExact = std::is_same_v<S, double> ? 1e-12 : 2e-6;
template <class S>
constexpr double kDifference = std::is_same_v<S, double> ? 2e-7 : 5e-6;

// The groups' rows of a state lie two rows apart.
std::vector<int64_t> state_rows(const Case& c) {
  std::vector<int64_t> rows;
  for (int group = 0; group < c.plan.groups; ++group) {
    const Range own = share(c.batch, group, c.plan.groups);
    for (int64_t b = own.begin; b < own.end; ++b) rows.push_back(b + 2 * group);
  }
  return rows;
}

// Rows of `units` values, padded, where the states lie; NaN between them.
template <class S>
std::vector<S> place_rows(const Values& from, const std::vector<int64_t>& at, int64_t units,
                          int64_t in_front = 0) {
  const int64_t stride = in_front + padded(units);
  std::vector<S> to((at.back() + 1) * stride, std::numeric_limits<S>::quiet_NaN());
  for (size_t b = 0; b < at.size(); ++b) {
    S* row = &to[at[b] * stride + in_front];
    std::fill(std::copy(&from[b * units], &from[b * units] + units, row), row + padded(units),
              S(0));
  }
  return to;
}

template <class S>
std::vector<S> pad_rows(const Values& from, int64_t rows, int64_t units) {
  std::vector<int64_t> at(rows);
  std::iota(at.begin(), at.end(), 0);
  return place_rows<S>(from, at, units);
}

// Scratch for the kernels, zeros, with a margin behind each piece that nobody may touch.
template <class S>
class Rooms {
 public:
  S* take(int64_t values) {
    std::vector<S>& room = rooms_.emplace_back(values + kMargin, kUntouched);
    std::fill(room.begin(), room.end() - kMargin, S(0));
    return room.data();
  }
  bool untouched() const {
    return std::all_of(rooms_.begin(), rooms_.end(), [](const std::vector<S>& room) {
      return std::all_of(room.end() - kMargin, room.end(),
                         [](S value) { return value == kUntouched; });
    });
  }

 private:
#ifdef __SANITIZE_ADDRESS__  // which sees every step beyond a piece, reads too
  static constexpr int64_t kMargin = 0;
#else
  static constexpr int64_t kMargin = 4096;
#endif
  static constexpr S kUntouched = std::numeric_limits<S>::max();
  std::deque<std::vector<S>> rooms_;
};

void run(const Plan& plan, const std::function<void(const Slot&)>& body) {
  Barriers barriers(plan.threads());
  std::vector<std::thread> threads;
  for (int i = 0; i < plan.threads(); ++i) {
    threads.emplace_back([&, i] { body(slot_of(plan, i, 1, barriers)); });
  }
  for (std::thread& thread : threads) thread.join();
}

int failures = 0;

void fail(const char* what, const Case& c, double worst) {
  ++failures;
  std::printf(
      "%s: cell %d B %ld I %ld H %ld P %ld T %ld reverse %d reset %d groups %d parts %d joined %d: "
      "%g\n",
      what, static_cast<int>(c.cell), long(c.batch), long(c.input), long(c.hidden), long(c.output),
      long(c.lengths[0]), c.reverse, c.reset, c.plan.groups, c.plan.parts, c.joined, worst);
}

void expect_close(const char* what, const Case& c, const Values& got, const Values& want,
                  double tolerance) {
  double scale = 1, worst = 0;
  for (double value : want) scale = std::max(scale, std::abs(value));
  for (size_t i = 0; i < want.size(); ++i) {
    const double error = std::abs(got[i] - want[i]) / scale;
    worst = error <= worst ? worst : error;  // a NaN counts
  }
  if (!(worst < tolerance)) fail(what, c, worst);
}

Chunk chunk_at(const Case& c, int64_t steps, int64_t index, bool from_end) {
  const int64_t count = (steps + c.chunk - 1) / c.chunk;
  const int64_t at = from_end ? count - 1 - index : index;
  return {at * c.chunk, std::min(steps, (at + 1) * c.chunk), index == 0, index == count - 1};
}

template <class S>
void check(const Case& c, const Problem& p, const Expected& want) {
  using Array = std::vector<S>;
  const KernelTable<S>& table = current_isa().table<S>();
  const int64_t H = c.hidden, P = c.output, Hp = padded(H), Pp = padded(P), pairs = p.row0.back();
  const int64_t gates = gate_blocks(c.cell), width = saved_blocks(c.cell) * Hp;
  const int64_t steps = p.steps(), chunks = (steps + c.chunk - 1) / c.chunk;
  const auto whole = [](int64_t columns) { return (columns + 63) / 64 * 64; };
  const std::vector<int64_t> at = state_rows(c);
  const Schedule schedule = {steps,   c.batch, p.rows.data(), p.row0.data(),
                             nullptr, nullptr, at.data()};
  const Array x = as<S>(p.x), dy = as<S>(p.dy);
  const Array w_ih = as<S>(p.w_ih), w_hh = as<S>(p.w_hh), w_hr = as<S>(p.w_hr);
  const Array b_ih = as<S>(p.b_ih), b_hh = as<S>(p.b_hh);
  const Weights<S> weights = {w_ih.data(), w_hh.data(), b_ih.data(), b_hh.data(),
                              p.sizes.projected ? w_hr.data() : nullptr};
  const uint8_t* reset = p.reset.empty() ? nullptr : p.reset.data();
  const Array zeros(4 * Hp);

  Rooms<S> rooms;
  Array y(pairs * P), h_n = as<S>(p.h0);
  S *const saved = rooms.take(pairs * width), *const cells = rooms.take(pairs * Hp);
  const int64_t joined = c.joined ? padded(c.input) : 0;
  Array h_a = place_rows<S>(p.h0, at, P, joined), h_b = h_a, cell = place_rows<S>(p.c0, at, H);
  ForwardArgs<S> forward{};
  forward.sizes = p.sizes;
  forward.schedule = schedule;
  forward.directions = 1;
  forward.save = true;
  forward.joined = joined;
  forward.zeros = zeros.data();
  ForwardDirection<S>& f = forward.direction[0];
  f.reverse = c.reverse;
  f.weights = weights;
  f.packed = {rooms.take(gates * whole(Hp) * c.input),
              rooms.take(gates * whole(Hp) * ((c.joined ? c.input : 0) + P)),
              rooms.take(whole(Pp) * H), rooms.take(gates * whole(Hp)), rooms.take(Hp)};
  if (c.joined) {
    f.packed.input = nullptr;
  } else if (pairs < 12 || steps == 1) {
    f.packed.input = f.packed.recurrent = f.packed.projection = nullptr;
    forward.across_stride = whole(pairs) * std::max(c.input + P, H);
    forward.across = rooms.take(c.plan.threads() * forward.across_stride);
  }
  std::vector<ForwardRow<S, S>> rows(c.plan.threads() * c.batch);
  forward.rows = rows.data();
  forward.rows_stride = c.batch;
  std::vector<int64_t> group_rows(c.plan.threads() * pairs);
  forward.group_rows = group_rows.data();
  forward.group_rows_stride = pairs;
  f.x = x.data();
  f.y = y.data();
  f.y_stride = P;
  f.gates_stride = width;
  f.cells = cells;
  f.cells_stride = Hp;
  f.h[0] = h_a.data();
  f.h[1] = h_b.data();
  f.c = cell.data();
  f.h_tilde = rooms.take((at.back() + 1) * Hp);
  f.h_n = h_n.data();
  f.reset = reset;
  for (int64_t i = 0; i < chunks; ++i) {
    f.chunk = chunk_at(c, steps, i, c.reverse);
    f.gates = saved + p.row0[f.chunk.begin] * width;
    run(c.plan, [&](const Slot& slot) { table.forward[static_cast<int>(c.cell)](forward, slot); });
    f.turn ^= (f.chunk.end - f.chunk.begin) & 1;
  }
  expect_close("y", c, wide(y.data(), y.size()), want.result.y, kExact<S>);
  expect_close("h_n", c, wide(h_n.data(), h_n.size()), want.result.h_n, kExact<S>);
  if (c.cell == Cell::kLstm) {
    for (int64_t b = 0; b < c.batch; ++b) {
      expect_close("c_n", c, wide(&cell[at[b] * Hp], H), wide(&want.result.c_n[b * H], H),
                   kExact<S>);
    }
  }

  const Array h0 = pad_rows<S>(p.h0, c.batch, P), c0 = pad_rows<S>(p.c0, c.batch, H);
  const Array dh_n = pad_rows<S>(p.dh_n, c.batch, P);
  Array carry = place_rows<S>(c.cell == Cell::kLstm ? p.dc_n : Values(c.batch * H), at, H);
  S *const dgates = rooms.take(pairs * width), *const next = rooms.take(c.batch * width);
  // What is written must not depend on what was there; what is added to, holds zeros.
  const S nan = std::numeric_limits<S>::quiet_NaN();
  const bool add_dx = c.reverse;
  Array dx(p.x.size(), add_dx ? 0 : nan), dh0 = as<S>(p.dh_n), dc0 = as<S>(p.dc_n);
  Array dw_ih(p.w_ih.size(), nan), dw_hh(p.w_hh.size(), nan), dw_hr(p.w_hr.size(), nan);
  Array db_ih(p.b_ih.size(), nan), db_hh(p.b_hh.size(), nan);
  std::vector<const S*> previous(pairs);
  BackwardArgs<S> backward{};
  backward.sizes = p.sizes;
  backward.schedule = schedule;
  backward.directions = 1;
  backward.zeros = zeros.data();
  backward.dx = dx.data();
  backward.add_dx = add_dx;
  std::vector<BackwardRow<S, S>> rows_back(c.plan.threads() * c.batch);
  backward.rows = rows_back.data();
  backward.rows_stride = c.batch;
  backward.previous = previous.data();
  backward.panels[0] = rooms.take(pairs * whole(c.input));
  backward.panels[1] = rooms.take(pairs * whole(std::max(P, H)));
  backward.columns_stride = column_words(pairs) * kMostGradientRows;
  backward.columns = rooms.take(c.plan.threads() * backward.columns_stride);
  BackwardDirection<S>& d = backward.direction[0];
  d.reverse = c.reverse;
  d.weights = weights;
  d.packed = {rooms.take(gates * Hp * whole(c.input)), rooms.take(gates * Hp * whole(P)),
              rooms.take(P * whole(Hp)), nullptr, nullptr};
  d.x = x.data();
  d.y = y.data();
  d.y_stride = d.dy_stride = P;
  d.dy = dy.data();
  d.gates_stride = width;
  d.cells = cells;
  d.cells_stride = Hp;
  d.h0 = h0.data();
  d.c0 = c0.data();
  d.dh_n = dh_n.data();
  d.dgates = dgates;
  d.dgates_stride = width;
  d.dgates_next = next;
  d.carry = carry.data();
  if (p.sizes.projected) {
    d.dh = rooms.take(pairs * Pp);
    d.h_tilde = rooms.take(pairs * Hp);
    d.dw_hr = dw_hr.data();
  }
  d.dh0 = dh0.data();
  if (c.cell == Cell::kLstm) d.dc0 = dc0.data();
  d.dw_ih = dw_ih.data();
  d.dw_hh = dw_hh.data();
  d.db_ih = db_ih.data();
  d.db_hh = db_hh.data();
  d.reset = reset;
  for (int64_t i = 0; i < chunks; ++i) {
    d.chunk = chunk_at(c, steps, i, !c.reverse);
    d.gates = saved + p.row0[d.chunk.begin] * width;
    run(c.plan,
        [&](const Slot& slot) { table.backward[static_cast<int>(c.cell)](backward, slot); });
    const int64_t t = c.reverse ? d.chunk.end - 1 : d.chunk.begin;
    const S* from = dgates + (p.row0[t] - p.row0[d.chunk.begin]) * width;
    std::copy(from, from + p.rows[t] * width, next);
  }
  const Array* const found[] = {&dx, &dh0, &dc0, &dw_ih, &dw_hh, &db_ih, &db_hh, &dw_hr};
  static_assert(std::size(found) == std::size(kGradients));
  for (size_t k = 0; k < std::size(found); ++k) {
    const Values& expected = want.gradients[k];
    Values some;
    for (size_t i = 0; some.size() < expected.size(); i += sample_stride(*found[k])) {
      some.push_back((*found[k])[i]);
    }
    expect_close(kGradients[k].name, c, some, expected, kDifference<S>);
  }
  if (!rooms.untouched()) fail("scratch overrun", c, 0);
}

// Plans that depend on the distance of threads share units alone, and the farther these are, the
// fewer they use.
void check_plans() {
  int hang = 0;
  for (Cell cell : {Cell::kLstm, Cell::kGru, Cell::kRnnTanh}) {
    for (int64_t hidden : {16, 32, 64, 128, 256, 512}) {
      for (int64_t batch : {1, 2, 3, 4, 8, 64}) {
        for (int64_t steps : {1, 2, 20, 100}) {
          for (int directions : {1, 2}) {
            for (int products : {1, 3}) {
              for (int threads : {1, 2, 3, 4, 16}) {
                Workload work = {cell,
                                 {hidden, hidden, hidden, false},
                                 directions,
                                 batch,
                                 steps * batch,
                                 4,
                                 4,
                                 products};
                const bool hangs = depends_on_distance(work, threads);
                hang += hangs;
                int parts = kMaxThreads;
                for (Distance d : {Distance::kNear, Distance::kUnknown, Distance::kFar}) {
                  work.distance = d;
                  const Plan plan = plan_team(work, threads);
                  const bool right =
                      !hangs || (plan.groups == 1 && plan.directions == 1 && plan.parts <= parts);
                  if (!right || plan.threads() > threads) {
                    ++failures;
                    std::printf("plan: cell %d B %ld H %ld T %ld threads %d distance %d\n",
                                static_cast<int>(cell), long(batch), long(hidden), long(steps),
                                threads, static_cast<int>(d));
                  }
                  parts = plan.parts;
                }
              }
            }
          }
        }
      }
    }
  }
  if (hang == 0) {
    ++failures;
    std::printf("no plan depends on the distance of threads\n");
  }
}

}  // namespace
}  // namespace fusedrnn

int main(int argc, char** argv) {
  using namespace fusedrnn;
  if (argc > 1) set_isa(argv[1]);
  int cases = 0;
  const auto check_types = [&](const Case& c) {
    const Problem p = make_problem(c);
    const Expected want = expect(c, p);
    check<float>(c, p, want);
    check<double>(c, p, want);
    cases += 2;
    if (keeps_n_apart(c.cell)) return;
    Case joined = c;
    joined.joined = true;
    check<float>(joined, p, want);
    check<double>(joined, p, want);
    cases += 2;
  };
  for (Cell cell : {Cell::kLstm, Cell::kGru, Cell::kRnnTanh, Cell::kRnnRelu}) {
    for (const std::vector<int64_t>& lengths : {std::vector<int64_t>{1},
                                                std::vector<int64_t>(37, 1),
                                                {5},
                                                {4, 4, 4, 4, 4, 4, 4},
                                                {6, 5, 5, 2, 1, 0}}) {
      for (auto [input, hidden] : {std::pair<int64_t, int64_t>{3, 5}, {17, 16}, {2, 35}}) {
        for (bool reverse : {false, true}) {
          for (bool reset : {false, true}) {
            for (Plan plan : {Plan{1, 1, 1}, Plan{1, 2, 1}, Plan{1, 1, 2}, Plan{1, 2, 2}}) {
              for (int64_t output : {hidden, int64_t{4}}) {
                if (output != hidden && cell != Cell::kLstm) continue;
                check_types({cell, static_cast<int64_t>(lengths.size()), input, hidden, output,
                             lengths, reverse, reset, plan, 2});
              }
            }
          }
        }
      }
    }
  }
  // W_ih by blocks, the last of which is shorter.
  for (Cell cell : {Cell::kLstm, Cell::kGru}) {
    for (Plan plan : {Plan{1, 1, 1}, Plan{1, 1, 2}}) {
      check_types({cell, 17, 64, 176, 176, std::vector<int64_t>(17, 1), false, false, plan, 2});
    }
  }
  check_plans();
  std::printf("%s: %d cases, %d failures\n", current_isa().name, cases, failures);
  return failures == 0 ? 0 : 1;
}
