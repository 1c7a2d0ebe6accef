// How a call is cut: over threads, and over time.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/team.h"
#include "recurrence.h"

namespace fusedrnn {

// Between the cores of two threads. Linux places them, a virtual machine's host places those again:
// a line takes 50 ns from one to the other in one second and 400 in the next.
enum class Distance { kUnknown, kNear, kFar };

// What decides the cut.
struct Workload {
  Cell cell;
  Sizes sizes;
  int directions;
  int64_t batch;
  int64_t pairs;        // (step, row) pairs
  int64_t value_size;   // bytes of the arithmetic's type
  int64_t weight_size;  // bytes of a weight
  int products;         // per weight, step and row: 1 forward, 3 with backward
  Distance distance = Distance::kUnknown;
};

// At whose end a prefetcher stops, bytes.
inline constexpr int64_t kPage = 4096;

// Of the whole call.
double multiplications(const Workload& work);

// Whether a forward call is long enough to pay for packing its weights.
bool worth_packing(const Workload& work);

// The same of a backward call. It must be packed for more than one step, however few rows they
// have.
bool worth_packing_backward(const Schedule& schedule, const Workload& work);

// Whether a bfloat16 layer of so many rows a step, and (step, row) pairs in all, is quicker with
// its weights widened to float32, where products of bfloat16 take longer than float32's.
bool worth_widening(Cell cell, const Sizes& sizes, int64_t batch, int64_t pairs);

// Whether this is a single step, by the schedule and not by its rows alone, whose weights are more
// than a private cache holds: read from either end in turn with the step before, as much of them as
// it held then needs not come from further away.
bool goes_back_and_forth(const Schedule& schedule, const Workload& work);

Plan plan_team(const Workload& work, int threads);

// Whether a packed forward call takes the input and the state in one product at every step, instead
// of projecting the input ahead. The same for near threads as for far ones: it changes bits.
bool joins_input(Workload work, int threads, int vector_bytes);

// Whether that plan is another one for near threads than for far ones. Results are the same, bit by
// bit: such plans share hidden units, not rows.
bool depends_on_distance(Workload work, int threads);

// Where the rows of a state of `row_bytes` or more a row lie, so that no line of one group's is
// near one of another's: Schedule::state_row. Empty where there is one group.
std::vector<int64_t> state_rows(const Workload& work, int threads, int64_t row_bytes);

// From where one thread describes its rows of a step (ForwardRow, BackwardRow: more than a line
// each) to where the next one does: no line is both's.
constexpr int64_t rows_apart(int64_t rows) { return rows + 1; }

// Whether groups sum the weights' gradients over their own rows apart from each other, and add them
// up in the end, in place of all threads' sharing each sum: no row then crosses from one core to
// another.
bool worth_summing_apart(const Workload& work, int groups, int64_t chunk_rows);

// About how many (step, row) pairs a chunk of time should have.
int64_t chunk_target(Cell cell, const Sizes& sizes, int64_t value_size);

// Bounds b[0] = 0 < b[1] < ... = T of the chunks of time.
std::vector<int64_t> chunk_bounds(const Schedule& schedule, const Workload& work);

// The same of segments of so many steps (segment_steps), whatever the rows that have them.
std::vector<int64_t> segment_bounds(const Schedule& schedule);

}  // namespace fusedrnn
