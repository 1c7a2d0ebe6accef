// What a call of a layer on the CPU decides once, and how its chunks of time are run by a team.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "cpu/distance.h"
#include "cpu/isa.h"
#include "cpu/plan.h"
#include "cpu/run_team.h"
#include "layer.h"

namespace fusedrnn {

// Whether products read bfloat16 as it is, the state rounded to it at every step, as torch.nn does;
// else a layer is one of float32 but for what it reads and writes. Not before a ReLU: a sum near
// zero, rounded to the other side, changes a gradient altogether.
inline bool multiplies_bf16(const Layer& layer, const Isa& isa) {
  return layer.dtype == at::kBFloat16 && layer.cell != Cell::kRnnRelu &&
         (isa.quick_bf16 || !worth_widening(layer.cell, layer.sizes, layer.batch, layer.rows));
}

// A layer, which outlives it, and the instruction set of all its kernels: set_isa() may change the
// one in use meanwhile.
struct CpuCall {
  explicit CpuCall(const Layer& layer)
      : layer(layer), isa(current_isa()), narrow(multiplies_bf16(layer, isa)) {}
  const Layer& layer;
  const Isa& isa;
  const bool narrow;  // multiplies_bf16
};

// Calls f<S, E>() for the arithmetic of the layer and what its values are kept in (recurrence.h).
template <class F>
void with_types(const CpuCall& call, F f) {
  if (call.layer.accumulate == at::kDouble) {
    f.template operator()<double, double>();
  } else if (call.narrow) {
    f.template operator()<float, uint16_t>();
  } else {
    f.template operator()<float, float>();
  }
}

// The chunk that direction `reverse` walks as its index-th, of those between `bounds`; `backwards`
// where the walk is backpropagation's.
inline Chunk chunk_of(const std::vector<int64_t>& bounds, int64_t index, bool reverse,
                      bool backwards) {
  const int64_t count = static_cast<int64_t>(bounds.size()) - 1;
  const int64_t at = reverse != backwards ? count - 1 - index : index;
  return {bounds[at], bounds[at + 1], index == 0, index == count - 1};
}

inline Workload workload_of(const CpuCall& call, const Schedule& schedule, int products) {
  const Layer& layer = call.layer;
  const int64_t value_size = layer.accumulate == at::kDouble ? 8 : 4;
  Workload work = {layer.cell,
                   layer.sizes,
                   layer.directions,
                   schedule.batch,
                   schedule.steps == 0 ? 0 : schedule.row0[schedule.steps],
                   value_size,
                   call.narrow ? 2 : value_size,
                   products};
  find_distance(work, at::get_num_threads());
  return work;
}

// The same while a chunk is walked that begins with so many rows. A plan for these may share rows
// where one for all would not, and must then be the same at any distance.
inline Workload with_rows(Workload work, int64_t rows) {
  if (rows == work.batch) return work;
  work.batch = rows;
  if (work.distance != Distance::kUnknown && !depends_on_distance(work, at::get_num_threads())) {
    work.distance = Distance::kUnknown;
  }
  return work;
}

template <class Direction>
Workload workload_in_chunk(const Workload& work, const Schedule& schedule,
                           const Direction* directions) {
  int64_t rows = 0;
  for (int d = 0; d < work.directions; ++d) {
    rows = std::max(rows, schedule.rows[directions[d].chunk.begin]);
  }
  return with_rows(work, rows);
}

// Runs a kernel on the chunks that the directions have come to.
template <class Args>
void run_chunk(const Workload& work, const Args& args, void (*kernel)(const Args&, const Slot&)) {
  const Workload now = workload_in_chunk(work, args.schedule, args.direction);
  run_team(
      at::get_num_threads(), args.directions, [&](int threads) { return plan_team(now, threads); },
      [&](const Slot& slot) { kernel(args, slot); });
}

// The most threads, and groups, that any chunk is walked by.
struct Most {
  int threads = 1, groups = 1;
};
inline Most most_of_plans(const Workload& work, const Schedule& schedule,
                          const std::vector<int64_t>& bounds) {
  Most most;
  for (size_t i = 0; i + 1 < bounds.size(); ++i) {
    const Workload now = with_rows(work, schedule.rows[bounds[i]]);
    const Plan plan = plan_team(now, at::get_num_threads());
    most = {std::max(most.threads, plan.threads()), std::max(most.groups, plan.groups)};
  }
  return most;
}

// Most rows of a chunk.
inline int64_t chunk_rows(const Schedule& schedule, const std::vector<int64_t>& bounds) {
  int64_t most = 0;
  for (size_t i = 0; i + 1 < bounds.size(); ++i) {
    most = std::max(most, schedule.row0[bounds[i + 1]] - schedule.row0[bounds[i]]);
  }
  return most;
}

}  // namespace fusedrnn
