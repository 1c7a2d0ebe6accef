// The order in which a direction walks the steps, and the state that enters each of them.
#pragma once

#include <algorithm>

#include "cpu/team.h"
#include "isa_namespace.h"
#include "recurrence.h"

namespace fusedrnn {

// The rows that a group owns for a chunk: equal shares of its (step, row) pairs, since longer rows
// stand first. Rows that have no step in it belong to the last group.
inline Range own_rows(const Schedule& schedule, const Chunk& chunk, const Slot& slot) {
  const int64_t most = schedule.rows[chunk.begin], least = schedule.rows[chunk.end - 1];
  const auto first_row = [&](int group) -> int64_t {
    if (group == slot.groups) return schedule.batch;
    if (most == least) return share(most, group, slot.groups).begin;
    const int64_t pairs = schedule.row0[chunk.end] - schedule.row0[chunk.begin];
    const int64_t target = pairs * group / slot.groups;
    int64_t low = 0, high = most;  // the fewest rows with at least `target` pairs
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      int64_t before = 0;
      for (int64_t t = chunk.begin; t < chunk.end; ++t) {
        before += std::min(schedule.rows[t], middle);
      }
      if (before < target) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  return {first_row(slot.group), first_row(slot.group + 1)};
}

// Whether groups sum the gradients of the weights apart from each other in this team: not where a
// group has parts, or directions are walked side by side, which need what others made; nor where it
// is another team than was planned for and there is no room.
template <class S, class E>
bool sums_apart(const BackwardArgs<S, E>& args, const Slot& slot) {
  return slot.groups > 1 && slot.groups == slot.threads && slot.groups <= args.apart_groups;
}

// A chunk's dgates, those of the thread's group where groups sum apart: no prefetcher then runs
// from one's rows into another's.
template <class S, class E>
E* dgates_of_group(const BackwardArgs<S, E>& args, const BackwardDirection<S, E>& direction,
                   const Slot& slot) {
  return direction.dgates + (sums_apart(args, slot) ? slot.group * args.dgates_group_stride : 0);
}

// Notes which of a chunk's rows those of `own` are, step after step; returns how many.
inline int64_t find_chunk_rows(const Schedule& schedule, const Chunk& chunk, Range own,
                               int64_t* to) {
  int64_t count = 0;
  for (int64_t t = chunk.begin; t < chunk.end; ++t) {
    const int64_t first = schedule.row0[t] - schedule.row0[chunk.begin];
    const int64_t end = std::min(own.end, schedule.rows[t]);
    for (int64_t b = own.begin; b < end; ++b) to[count++] = first + b;
  }
  return count;
}

// Rows that have a step t; none outside the sequence.
inline int64_t rows_at(const Schedule& schedule, int64_t t) {
  return t >= 0 && t < schedule.steps ? schedule.rows[t] : 0;
}

// The same of a step of this chunk; none outside it.
inline int64_t rows_in_chunk(const Schedule& schedule, const Chunk& chunk, int64_t t) {
  return t >= chunk.begin && t < chunk.end ? schedule.rows[t] : 0;
}

inline int64_t io_row(const Schedule& schedule, int64_t packed_row) {
  return schedule.io_row == nullptr ? packed_row : schedule.io_row[packed_row];
}

inline int64_t caller_row(const Schedule& schedule, int64_t row) {
  return schedule.order == nullptr ? row : schedule.order[row];
}

inline int64_t state_row(const Schedule& schedule, int64_t row) {
  return schedule.state_row == nullptr ? row : schedule.state_row[row];
}

// True where the state entering step t of sorted row b is cut off from the past.
inline bool is_reset(const uint8_t* reset, const Schedule& schedule, int64_t t, int64_t b) {
  return reset != nullptr && reset[schedule.row0[t] + b] != 0;
}

// The packed row from which step t of sorted row b takes its state, or -1: the initial state.
inline int64_t previous_row(const Schedule& schedule, bool reverse, int64_t t, int64_t b) {
  const int64_t before = reverse ? t + 1 : t - 1;
  return b < rows_at(schedule, before) ? schedule.row0[before] + b : -1;
}

// The state h that entered step t of sorted row b: (Pp) of the initial ones, (P) of the layer's
// output; null after a reset, zeros.
template <class S, class E>
FUSEDRNN_HD const E* entering_h(const BackwardDirection<S, E>& direction, const Schedule& schedule,
                                int64_t t, int64_t b, int64_t output_padded) {
  if (is_reset(direction.reset, schedule, t, b)) return nullptr;
  const int64_t before = previous_row(schedule, direction.reverse, t, b);
  if (before < 0) return direction.h0 + b * output_padded;
  return direction.y + io_row(schedule, before) * direction.y_stride;
}

}  // namespace fusedrnn
