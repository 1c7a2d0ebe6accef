// Scratch that calls of several kinds lay out alike: recurrence.h says what it is for.
#pragma once

#include <algorithm>

#include "cpu/plan.h"
#include "cpu/scratch.h"
#include "cpu/walk.h"

namespace fusedrnn {

// Room for the weights in the order in which forward's kernels read them, `each` values to a word.
template <class S, class W>
void want_packed(Scratch& scratch, Cell cell, const Sizes& sizes, int64_t each, bool joins,
                 PackedWeights<S, W>& packed) {
  const int64_t gates = gate_blocks(cell) * whole_panels(sizes.hidden_padded());
  const int64_t inputs = words_of(sizes.input, each), outputs = words_of(sizes.output, each);
  if (!joins) scratch.want(&packed.input, gates * inputs);
  scratch.want(&packed.recurrent, gates * (joins ? inputs + outputs : outputs));
  if (sizes.projected) {
    scratch.want(&packed.projection,
                 whole_panels(sizes.output_padded()) * words_of(sizes.hidden, each));
  }
}

template <class S, class W>
void want_biases(Scratch& scratch, Cell cell, const Sizes& sizes, PackedWeights<S, W>& packed) {
  const int64_t hidden = sizes.hidden_padded();
  scratch.want(&packed.bias, gate_blocks(cell) * whole_panels(hidden));
  scratch.want(&packed.bias_hn, hidden);
}

// For each of `threads` room for rows in words.
template <class S, class W>
void want_words(Scratch& scratch, int threads, int64_t rows, int64_t each,
                ForwardArgs<S, W>& args) {
  const Sizes& sizes = args.sizes;
  args.factors_stride = padded(rows);
  args.words_stride =
      padded(rows * words_of(padded(std::max({sizes.input, sizes.hidden, sizes.output})), each));
  scratch.want(&args.factors, threads * args.factors_stride);
  scratch.want(&args.words, threads * args.words_stride);
}

// For each of `threads` room to describe `rows` rows.
template <class Args>
void want_rows(Scratch& scratch, int threads, int64_t rows, Args& args) {
  args.rows_stride = rows_apart(rows);
  scratch.want(&args.rows, threads * args.rows_stride);
}

// For each of `threads`, if there are several, room to note which of a chunk's rows are its
// group's.
template <class S, class W>
void want_group_rows(Scratch& scratch, int threads, int64_t chunk_rows, ForwardArgs<S, W>& args) {
  if (threads == 1) return;
  args.group_rows_stride = padded(chunk_rows);
  scratch.want(&args.group_rows, threads * args.group_rows_stride);
}

// Whether a state's rows of (units) lie in the caller's tensor as the kernels read them.
inline bool lies_as_read(int64_t units, const Schedule& schedule) {
  return schedule.order == nullptr && schedule.state_row == nullptr && units == padded(units);
}

// Rows of (B, units) of one direction, in sorted order and where the schedule's states lie, padded
// with zeros, room for `in_front` before each row; zeros where `state` is null.
template <class S>
void fill_state(S* to, const S* state, int64_t units, const Schedule& schedule,
                int64_t in_front = 0) {
  const int64_t stride = in_front + padded(units);
  for (int64_t b = 0; b < schedule.batch; ++b) {
    S* row = to + state_row(schedule, b) * stride + in_front;
    S* end = row;
    if (state != nullptr) {
      const S* from = state + caller_row(schedule, b) * units;
      end = std::copy(from, from + units, row);
    }
    std::fill(end, row + padded(units), S(0));
  }
}

}  // namespace fusedrnn
