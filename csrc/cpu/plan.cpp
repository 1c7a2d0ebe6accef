#include "cpu/plan.h"

#include <unistd.h>

#include <algorithm>
#include <limits>

namespace fusedrnn {
namespace {

int64_t private_cache() {
  static const int64_t bytes = [] {
#ifdef _SC_LEVEL2_CACHE_SIZE
    const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (size > 0) return size;
#endif
    return int64_t{1} << 20;
  }();
  return bytes;
}

// Below so many multiplications, a second thread costs more than it saves.
struct Least {
  double call;  // in all
  double step;  // of one thread between two barriers
};

// Backward meets four times at least, forward once or twice.
Least least_of(Distance distance, bool training) {
  switch (distance) {
    case Distance::kNear:
      return {7e5, 4e3};
    case Distance::kFar:
      return {training ? 3e6 : 7e5, 2e4};
    default:
      return {7e5, 1.2e4};
  }
}

// The same of a call whose weights would leave one private cache, at any distance: what a second
// core saves there is a way to the shared cache for each line.
constexpr double kLeastOfTwoCaches = 2.5e5;

constexpr int64_t kRowsPerGroup = 4;
// From this many rows a group on, weights from the shared cache arrive as fast as they are used.
constexpr int64_t kRowsThatHideWeights = 64;
// Packing costs about as much as this many products of each weight with one row, as they lie; with
// three rows or more at a time, and long ones, those are nearly as fast as with packed weights.
constexpr int64_t kWorthPacking = 12, kWorthPackingLongRows = 128;
constexpr int64_t kLongRows = 128;
// A single step of many rows packs those instead (across_inl.h); only for more than so many the
// weights come cheaper.
constexpr int64_t kWorthPackingOneStep = 512;
// From so many (step, row) pairs on, weights may be worth widening.
constexpr int64_t kWorthWidening = 32;
// Of a chunk, for each group that sums apart.
constexpr int64_t kRowsToSumApart = 64;
// Up to so many rows of a single step, backward reads the weights as they lie.
constexpr int64_t kFewRows = 16;

double weights_of(Cell cell, const Sizes& s) {
  return static_cast<double>(gate_blocks(cell)) * s.hidden * (s.input + s.output);
}
double weights_of(const Workload& work) { return weights_of(work.cell, work.sizes); }

// No more rows in all than take part in one step: ragged ones may still have several steps.
bool is_one_step(const Workload& work) { return work.pairs <= work.batch; }

}  // namespace

double multiplications(const Workload& work) {
  return weights_of(work) * work.pairs * work.directions * work.products;
}

bool worth_packing(const Workload& work) {
  if (is_one_step(work)) return work.pairs >= kWorthPackingOneStep;
  const bool long_rows = std::min(work.sizes.input, work.sizes.output) >= kLongRows;
  return work.pairs >= (work.batch >= 3 && long_rows ? kWorthPackingLongRows : kWorthPacking);
}

bool worth_packing_backward(const Schedule& schedule, const Workload& work) {
  // Of a single step, W_hh meets the gradient of the initial state alone.
  return schedule.steps > 1 || work.pairs > kFewRows;
}

bool worth_widening(Cell cell, const Sizes& sizes, int64_t batch, int64_t pairs) {
  // What takes longest with one row a step is the weights' way from a cache, which is half as long
  // for bfloat16.
  const bool waits_for_weights =
      batch == 1 && weights_of(cell, sizes) * sizeof(float) > private_cache() / 4;
  return pairs >= kWorthWidening && !waits_for_weights;
}

bool goes_back_and_forth(const Schedule& schedule, const Workload& work) {
  return schedule.steps == 1 && weights_of(work) * work.weight_size > private_cache() * 3 / 4;
}

Plan plan_team(const Workload& work, int threads) {
  Plan plan;
  threads = std::min(threads, kMaxThreads);
  const Sizes& s = work.sizes;
  const double recurrent = static_cast<double>(gate_blocks(work.cell)) * s.hidden * s.output;
  // Half a cache is for all else; a training step's weights leave it with their gradients.
  const double footprint = weights_of(work) * work.weight_size * (work.products > 1 ? 8. / 3 : 2);
  const Least least = least_of(work.distance, work.products > 1);
  const bool leaves_cache = footprint >= private_cache();
  if (threads <= 1 || multiplications(work) < (leaves_cache ? kLeastOfTwoCaches : least.call)) {
    return plan;
  }
  if (work.directions == 2 && threads % 2 == 0) plan.directions = 2;
  const int each = threads / plan.directions;
  const int64_t bytes = static_cast<int64_t>(recurrent) * work.weight_size;
  // Parts of the hidden units until a part's weights stay in its core's own cache, or its rows are
  // many; the rest of the threads take groups of rows, which never wait for each other.
  int parts = 1;
  const auto too_few = [&] {
    const int64_t rows = work.batch * parts / each;
    const bool in_cache = bytes / parts <= private_cache() * 3 / 4;
    return rows < kRowsPerGroup || (!in_cache && rows < kRowsThatHideWeights);
  };
  // One step waits for nobody: as it lies, each weight is best read by one thread alone.
  const bool reads_once = is_one_step(work) && !worth_packing(work);
  while (parts < each && (reads_once || too_few())) {
    ++parts;
    while (each % parts != 0) ++parts;
  }
  const int blocks = is_rnn(work.cell) ? 2 : 1;  // of units to a panel
  const int64_t panels = (padded(s.hidden) / kUnitAlignment + blocks - 1) / blocks;
  while (parts > 1 && (each % parts != 0 || recurrent * work.batch / parts < least.step)) --parts;
  plan.parts = static_cast<int>(std::min<int64_t>(parts, panels));
  plan.groups =
      static_cast<int>(std::min<int64_t>(each / plan.parts, std::max<int64_t>(work.batch / 2, 1)));
  return plan;
}

bool joins_input(Workload work, int threads, int vector_bytes) {
  // Neither a GRU, whose n needs its two halves apart, nor narrow values, which are converted.
  if (keeps_n_apart(work.cell) || work.weight_size != work.value_size || is_one_step(work) ||
      work.sizes.input == 0) {
    return false;
  }
  // What is saved is that gates are not written and read again. What it costs is that W_ih is read
  // at every step, which takes rows enough to hide it, the more the further away it lies and the
  // quicker they are multiplied.
  const double bytes = weights_of(work) * work.weight_size, cache = private_cache();
  int64_t least_rows = bytes <= cache / 2       ? 2
                       : bytes <= cache * 3 / 4 ? 8
                       : bytes <= cache * 4     ? vector_bytes / 2
                                                : std::numeric_limits<int64_t>::max();
  // Measured with vectors of 64 bytes: an RNN, which has least to write, never gained.
  if (vector_bytes == 64) {
    if (is_rnn(work.cell)) return false;
    least_rows = std::max<int64_t>(least_rows, 32);
  }
  if (work.batch < least_rows) return false;
  // Threads that share units would have to tell each other of x at every step; ahead, each projects
  // just its own.
  for (const Distance distance : {Distance::kNear, Distance::kUnknown, Distance::kFar}) {
    work.distance = distance;
    if (plan_team(work, threads).parts > 1) return false;
  }
  return true;
}

bool depends_on_distance(Workload work, int threads) {
  if (threads == 1 || multiplications(work) < kLeastOfTwoCaches) {
    return false;
  }
  int fewest = threads, most = 1;
  for (const Distance distance : {Distance::kNear, Distance::kUnknown, Distance::kFar}) {
    work.distance = distance;
    const Plan plan = plan_team(work, threads);
    if (plan.groups > 1 || plan.directions > 1) return false;
    fewest = std::min(fewest, plan.parts);
    most = std::max(most, plan.parts);
  }
  return fewest < most;
}

std::vector<int64_t> state_rows(const Workload& work, int threads, int64_t row_bytes) {
  const int groups = plan_team(work, threads).groups;
  std::vector<int64_t> rows;
  if (groups <= 1) return rows;
  // Prefetchers run ahead into the next group's rows, which another core writes at every step, and
  // stop at a page's end.
  const int64_t gap = (kPage + row_bytes - 1) / row_bytes;
  rows.reserve(work.batch + 1);
  for (int group = 0; group < groups; ++group) {
    const Range own = share(work.batch, group, groups);
    for (int64_t b = own.begin; b < own.end; ++b) rows.push_back(b + group * gap);
  }
  rows.push_back(work.batch + groups * gap);
  return rows;
}

bool worth_summing_apart(const Workload& work, int groups, int64_t chunk_rows) {
  // Each thread reads and writes all gradients for each chunk: they stay in its own cache, and it
  // has rows enough to hide that.
  const double bytes = weights_of(work) * work.value_size;
  return groups > 1 && bytes <= private_cache() / 2. && chunk_rows / groups >= kRowsToSumApart;
}

int64_t chunk_target(Cell cell, const Sizes& sizes, int64_t value_size) {
  // Enough rows to make the products over a chunk efficient, few enough that its gates are still
  // in cache when the time loop reads them.
  const int64_t row_bytes = saved_blocks(cell) * sizes.hidden_padded() * value_size;
  return std::clamp<int64_t>((int64_t{2} << 20) / row_bytes, 256, 512);
}

std::vector<int64_t> chunk_bounds(const Schedule& schedule, const Workload& work) {
  const int64_t target = chunk_target(work.cell, work.sizes, work.value_size);
  std::vector<int64_t> bounds;
  bounds.reserve(4);
  bounds.push_back(0);
  int64_t rows = 0;
  for (int64_t t = 0; t < schedule.steps; ++t) {
    if (rows > 0 && rows + schedule.rows[t] > target) {
      bounds.push_back(t);
      rows = 0;
    }
    rows += schedule.rows[t];
  }
  if (schedule.steps > 0) bounds.push_back(schedule.steps);
  return bounds;
}

std::vector<int64_t> segment_bounds(const Schedule& schedule) {
  std::vector<int64_t> bounds;
  const int64_t each = segment_steps(schedule.batch);
  for (int64_t t = 0; t < schedule.steps; t += each) bounds.push_back(t);
  bounds.push_back(schedule.steps);
  return bounds;
}

}  // namespace fusedrnn
