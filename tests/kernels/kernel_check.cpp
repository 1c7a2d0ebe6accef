// The kernels without torch, in float, double and bfloat16: every cell, direction, ragged rows,
// resets, projection and split of a team, forward against plain loops in double and backward
// against finite differences. Built by tests/test_kernels.py, with sanitizers by `make sanitize`;
// each array has exactly the size that recurrence.h promises, so that a read past its end is seen.
//
// Exit status 0: all agree. The argument names the instruction set.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <iterator>
#include <limits>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "cpu/isa.h"
#include "cpu/team.h"
#include "problem.h"
#include "rooms.h"

namespace fusedrnn {
namespace {

// Tolerances: of a kernel's rounding of what it keeps as E, and of finite differences beside it.
// In bfloat16 most values are off by 0.002; an RNN's, whose steps amplify, by up to 0.02 forward
// and 0.05 backward.
template <class E>
constexpr double by_size(double of_double, double of_float, double of_bfloat16) {
  return sizeof(E) == 8 ? of_double : sizeof(E) == 4 ? of_float : of_bfloat16;
}
template <class E>
constexpr double kExact = by_size<E>(1e-12, 2e-6, 4e-2);
template <class E>
constexpr double kDifference = by_size<E>(2e-7, 5e-6, 1e-1);

void run(const Plan& plan, const std::function<void(const Slot&)>& body) {
  Barriers barriers(plan.threads());
  std::vector<std::thread> threads;
  for (int i = 0; i < plan.threads(); ++i) {
    threads.emplace_back([&, i] { body(slot_of(plan, i, 1, barriers)); });
  }
  for (std::thread& thread : threads) thread.join();
}

int failures = 0;

void fail(const char* what, int bytes, const Case& c, double worst) {
  ++failures;
  std::printf(
      "%s, %d bytes: cell %d B %ld I %ld H %ld P %ld T %ld reverse %d reset %d groups %d parts %d "
      "joined %d: %g\n",
      what, bytes, static_cast<int>(c.cell), long(c.batch), long(c.input), long(c.hidden),
      long(c.output), long(c.lengths[0]), c.reverse, c.reset, c.plan.groups, c.plan.parts, c.joined,
      worst);
}

template <class E>
void expect_close(const char* what, const Case& c, const Values& got, const Values& want,
                  double tolerance = kExact<E>) {
  double scale = 1, worst = 0;
  for (double value : want) scale = std::max(scale, std::abs(value));
  for (size_t i = 0; i < want.size(); ++i) {
    const double error = std::abs(got[i] - want[i]) / scale;
    worst = error <= worst ? worst : error;  // a NaN counts
  }
  if (!(worst < tolerance)) fail(what, sizeof(E), c, worst);
}

Chunk chunk_at(const Case& c, int64_t steps, int64_t index, bool from_end) {
  const int64_t count = (steps + c.chunk - 1) / c.chunk;
  const int64_t at = from_end ? count - 1 - index : index;
  return {at * c.chunk, std::min(steps, (at + 1) * c.chunk), index == 0, index == count - 1};
}

// Gates and cells anew, from the states in y, against those of the walk that gave it: `forward` as
// it was then.
template <class S, class E>
void check_known(const Case& c, const Problem& p, ForwardArgs<S, Word<E>> forward,
                 const std::vector<E>& y, const E* saved, const S* cells) {
  using Array = std::vector<S>;
  const int64_t Hp = padded(c.hidden), width = saved_blocks(c.cell) * Hp, pairs = p.row0.back();
  const std::vector<int64_t> at = state_rows(c);
  const S nan = std::numeric_limits<S>::quiet_NaN();
  const Values wide_states = wide(y.data(), y.size());
  const Array known(wide_states.begin(), wide_states.end());
  Rooms rooms;
  Array h0 = place_rows<S>(p.h0, at, c.output, 0), c0 = place_rows<S>(p.c0, at, c.hidden);
  std::vector<ForwardRow<S, Saved<S, Word<E>>>> rows(c.plan.threads() * pairs);
  forward.rows = rows.data();
  forward.rows_stride = pairs;
  ForwardDirection<S, Word<E>>& f = forward.direction[0];
  f.known = known.data();
  f.turn = 0;
  f.h[0] = h0.data();
  f.y = f.h[1] = rooms.take<S>(c.plan.threads() * std::max(Hp, padded(c.output)));
  f.y_half = nullptr;
  f.c = c0.data();
  f.h_tilde = nullptr;
  const Array h0_before = h0, c0_before = c0;
  for (int64_t i = 0, steps = p.steps(); i < (steps + c.chunk - 1) / c.chunk; ++i) {
    f.chunk = chunk_at(c, steps, i, c.reverse);
    Array anew(pairs * Hp, nan);
    f.cells = anew.data();
    const int64_t before = c.reverse ? f.chunk.end : f.chunk.begin - 1;
    if (0 <= before && before < steps) {
      std::copy(cells + p.row0[before] * Hp, cells + p.row0[before + 1] * Hp,
                f.cells + p.row0[before] * Hp);
    }
    const int64_t first = p.row0[f.chunk.begin], count = p.row0[f.chunk.end] - first;
    E* const to = rooms.take<E>(count * width);
    if constexpr (std::is_same_v<S, E>) {
      f.gates = to;
    } else {
      f.saved_half = to;
    }
    run(c.plan, [&](const Slot& slot) {
      current_isa().table<S, E>().forward[static_cast<int>(c.cell)](forward, slot);
    });
    expect_close<E>("gates anew", c, wide(to, count * width),
                    wide(saved + first * width, count * width));
    if (c.cell != Cell::kLstm) continue;
    expect_close<E>("cells anew", c, wide(f.cells + first * Hp, count * Hp),
                    wide(cells + first * Hp, count * Hp));
  }
  const auto same = [](const Array& a, const Array& b) {  // NaN and all
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(S)) == 0;
  };
  if (!same(h0, h0_before) || !same(c0, c0_before)) fail("initial states changed", sizeof(E), c, 0);
  if (!rooms.untouched()) fail("scratch overrun, anew", sizeof(E), c, 0);
}

// The arithmetic is S; weights, x, y and what is kept for backward are E.
template <class S, class E = S>
void check(const Case& c, const Problem& p, const Expected& want) {
  using Array = std::vector<S>;
  using Kept = std::vector<E>;
  using W = Word<E>;
  constexpr bool narrow = !std::is_same_v<S, E>;
  const auto& table = current_isa().table<S, E>();
  const int64_t H = c.hidden, P = c.output, Hp = padded(H), Pp = padded(P), pairs = p.row0.back();
  const int64_t gates = gate_blocks(c.cell), width = saved_blocks(c.cell) * Hp;
  const int64_t steps = p.steps(), chunks = (steps + c.chunk - 1) / c.chunk;
  const std::vector<int64_t> at = state_rows(c);
  const Schedule schedule = {steps,   c.batch, p.rows.data(), p.row0.data(),
                             nullptr, nullptr, at.data()};
  const Kept x = as<E>(p.x), dy = as<E>(p.dy), b_ih = as<E>(p.b_ih), b_hh = as<E>(p.b_hh);
  const WeightRows<E> w_ih(p.w_ih, c.input), w_hh(p.w_hh, P), w_hr(p.w_hr, H);
  Weights<S, W> weights = {w_ih.words(), w_hh.words(), nullptr, nullptr,
                           p.sizes.projected ? w_hr.words() : nullptr};
  if constexpr (narrow) {
    weights.b_ih_half = b_ih.data();
    weights.b_hh_half = b_hh.data();
  } else {
    weights.b_ih = b_ih.data();
    weights.b_hh = b_hh.data();
  }
  const uint8_t* reset = p.reset.empty() ? nullptr : p.reset.data();
  const Array zeros(4 * Hp);

  Rooms rooms;
  Kept y(pairs * P);
  Array h_n = as<S>(p.h0);
  E* const saved = rooms.take<E>(pairs * width);
  S* const cells = rooms.take<S>(pairs * Hp);
  const int64_t joined = c.joined ? padded(c.input) : 0;
  Array h_a = place_rows<S>(p.h0, at, P, joined), h_b = h_a, cell = place_rows<S>(p.c0, at, H);
  ForwardArgs<S, W> forward{};
  forward.sizes = p.sizes;
  forward.schedule = schedule;
  forward.directions = 1;
  forward.save = true;
  forward.joined = joined;
  // Of one step, either order.
  forward.from_end = steps == 1 && c.reverse;
  forward.by_panel = forward.from_end && pairs < kLeastAcross;
  forward.zeros = zeros.data();
  ForwardDirection<S, W>& f = forward.direction[0];
  f.reverse = c.reverse;
  f.weights = weights;
  const int64_t inputs = words_of<E>(c.input), outputs = words_of<E>(P), units = words_of<E>(H);
  f.packed = {rooms.take<W>(gates * whole_panels(Hp) * inputs),
              rooms.take<W>(gates * whole_panels(Hp) * ((c.joined ? inputs : 0) + outputs)),
              rooms.take<W>(whole_panels(Pp) * units), rooms.take<S>(gates * whole_panels(Hp)),
              rooms.take<S>(Hp)};
  if (c.joined) {
    f.packed.input = nullptr;
  } else if (pairs < 12 || steps == 1) {
    f.packed.input = f.packed.recurrent = f.packed.projection = nullptr;
    if (!forward.by_panel) {
      forward.across_stride = whole_panels(pairs) * words_of<E>(std::max(c.input + P, H));
      forward.across = rooms.take<W>(c.plan.threads() * forward.across_stride);
    }
  }
  std::vector<ForwardRow<S, Saved<S, W>>> rows(c.plan.threads() * c.batch);
  forward.rows = rows.data();
  forward.rows_stride = c.batch;
  std::vector<int64_t> group_rows(c.plan.threads() * pairs);
  forward.group_rows = group_rows.data();
  forward.group_rows_stride = pairs;
  if constexpr (narrow) {
    f.x_half = x.data();
    f.y_half = y.data();
    f.gates_thread_stride = pairs * width;
    f.gates = rooms.take<S>(c.plan.threads() * f.gates_thread_stride);
    f.saved_stride = width;
    forward.words_stride = pairs * words_of<E>(padded(std::max({c.input, H, P})));
    forward.words = rooms.take<W>(c.plan.threads() * forward.words_stride);
    forward.factors_stride = padded(pairs);
    forward.factors = rooms.take<S>(c.plan.threads() * forward.factors_stride);
  } else {
    f.x = x.data();
    f.y = y.data();
  }
  f.y_stride = P;
  f.gates_stride = width;
  f.cells = cells;
  f.cells_stride = Hp;
  f.h[0] = h_a.data();
  f.h[1] = h_b.data();
  f.c = cell.data();
  f.h_tilde = rooms.take<S>((at.back() + 1) * Hp);
  f.h_n = h_n.data();
  f.reset = reset;
  for (int64_t i = 0; i < chunks; ++i) {
    f.chunk = chunk_at(c, steps, i, c.reverse);
    E* const kept = saved + p.row0[f.chunk.begin] * width;
    if constexpr (narrow) {
      f.saved_half = kept;
    } else {
      f.gates = kept;
    }
    run(c.plan, [&](const Slot& slot) { table.forward[static_cast<int>(c.cell)](forward, slot); });
    f.turn ^= (f.chunk.end - f.chunk.begin) & 1;
  }
  expect_close<E>("y", c, wide(y.data(), y.size()), want.result.y);
  expect_close<E>("h_n", c, wide(h_n.data(), h_n.size()), want.result.h_n);
  if (c.cell == Cell::kLstm) {
    for (int64_t b = 0; b < c.batch; ++b) {
      expect_close<E>("c_n", c, wide(&cell[at[b] * Hp], H), wide(&want.result.c_n[b * H], H));
    }
  }

  if (keeps_gates(c.cell) && joined == 0 && f.packed.recurrent != nullptr) {
    check_known<S, E>(c, p, forward, y, saved, cells);
  }

  const Kept h0 = pad_rows<E>(p.h0, c.batch, P);
  const Array c0 = pad_rows<S>(p.c0, c.batch, H), dh_n = pad_rows<S>(p.dh_n, c.batch, P);
  Array carry = place_rows<S>(c.cell == Cell::kLstm ? p.dc_n : Values(c.batch * H), at, H);
  // What is written must not depend on what was there; what is added to, holds zeros.
  const S nan = std::numeric_limits<S>::quiet_NaN();
  const bool add_dx = c.reverse;
  Array dx(p.x.size(), add_dx ? 0 : nan), dh0 = as<S>(p.dh_n), dc0 = as<S>(p.dc_n);
  Array dw_ih(p.w_ih.size(), nan), dw_hh(p.w_hh.size(), nan), dw_hr(p.w_hr.size(), nan);
  Array db_ih(p.b_ih.size(), nan), db_hh(p.b_hh.size(), nan);
  std::vector<const E*> previous(pairs);
  BackwardArgs<S, E> backward{};
  backward.sizes = p.sizes;
  backward.schedule = schedule;
  backward.directions = 1;
  backward.zeros = zeros.data();
  backward.dx = dx.data();
  backward.add_dx = add_dx;
  std::vector<BackwardRow<S, E>> rows_back(c.plan.threads() * c.batch);
  backward.rows = rows_back.data();
  backward.rows_stride = c.batch;
  backward.previous = previous.data();
  backward.apart_groups = c.reset != c.reverse ? c.plan.groups : 1;
  backward.group_gradients_stride = padded(GradientSizes(c.cell, p.sizes).all());
  backward.dgates_group_stride = pairs * width;
  std::vector<int64_t> summed_rows(pairs);
  std::vector<int> begun(c.plan.groups);
  backward.group_rows = summed_rows.data();
  const int64_t panel_words = backward.apart_groups > 1
                                  ? words_before<E>(pairs, backward.apart_groups)
                                  : words_of<E>(pairs);
  backward.panels[0] = rooms.take<W>(panel_words * whole_panels(c.input));
  backward.panels[1] = rooms.take<W>(panel_words * whole_panels(std::max(P, H)));
  backward.columns_stride = column_words(words_of<E>(pairs)) * kMostGradientRows;
  backward.columns = rooms.take<W>(c.plan.threads() * backward.columns_stride);
  BackwardDirection<S, E>& d = backward.direction[0];
  d.reverse = c.reverse;
  d.weights = weights;
  const int64_t gate_words = words_of<E>(gates * Hp);
  d.packed = {rooms.take<W>(gate_words * whole_panels(c.input)),
              rooms.take<W>(gate_words * whole_panels(P)),
              rooms.take<W>(outputs * whole_panels(Hp)), nullptr, nullptr};
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
  d.dgates = rooms.take<E>(backward.apart_groups * backward.dgates_group_stride);
  d.dgates_stride = width;
  d.dgates_next = rooms.take<E>(c.batch * width);
  d.carry = carry.data();
  if (p.sizes.projected) {
    d.dh = rooms.take<E>(pairs * Pp);
    d.h_tilde = rooms.take<E>(pairs * Hp);
    d.results.dw_hr = dw_hr.data();
  }
  d.dh0 = dh0.data();
  if (c.cell == Cell::kLstm) d.dc0 = dc0.data();
  const int64_t apart = (backward.apart_groups - 1) * backward.group_gradients_stride;
  d.group_gradients = rooms.take<S>(apart);
  std::fill(d.group_gradients, d.group_gradients + apart, nan);
  d.group_has_sum = begun.data();
  d.results.dw_ih = dw_ih.data();
  d.results.dw_hh = dw_hh.data();
  d.results.db_ih = db_ih.data();
  d.results.db_hh = db_hh.data();
  d.reset = reset;
  for (int64_t i = 0; i < chunks; ++i) {
    d.chunk = chunk_at(c, steps, i, !c.reverse);
    d.gates = saved + p.row0[d.chunk.begin] * width;
    run(c.plan,
        [&](const Slot& slot) { table.backward[static_cast<int>(c.cell)](backward, slot); });
  }
  const Array* const found[] = {&dx, &dh0, &dc0, &dw_ih, &dw_hh, &db_ih, &db_hh, &dw_hr};
  static_assert(std::size(found) == std::size(kGradients));
  for (size_t k = 0; k < std::size(found); ++k) {
    const Values& expected = want.gradients[k];
    Values some;
    for (size_t i = 0; some.size() < expected.size(); i += sample_stride(*found[k], want.samples)) {
      some.push_back((*found[k])[i]);
    }
    expect_close<E>(kGradients[k].name, c, some, expected, kDifference<E>);
  }
  if (!rooms.untouched()) fail("scratch overrun", sizeof(E), c, 0);
}

// Whether a plainer set has the same kernels of float and double, and those have been checked
// there.
bool only_narrow_is_new() {
  for (const Isa* isa : usable_isas()) {
    if (isa == &current_isa()) return false;
    if (isa->f32.forward[0] == current_isa().f32.forward[0]) return true;
  }
  return false;
}

}  // namespace
}  // namespace fusedrnn

int main(int argc, char** argv) {
  using namespace fusedrnn;
  if (argc > 1) set_isa(argv[1]);
  const bool exact = !only_narrow_is_new();
  int cases = 0;
  const auto check_types = [&](const Case& c) {
    // The library widens bfloat16 before a ReLU.
    const bool narrow = c.cell != Cell::kRnnRelu;
    if (!exact && !narrow) return;
    const Problem p = make_problem(c);
    if (narrow) {
      const Problem coarse = rounded(p);
      check<float, uint16_t>(c, coarse, expect(c, coarse, 4));
      ++cases;
    }
    if (!exact) return;
    const Expected want = expect(c, p, 12);
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
                                                std::vector<int64_t>(6, 1),
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
  std::printf("%s: %d cases, %d failures\n", current_isa().name, cases, failures);
  return failures == 0 ? 0 : 1;
}
