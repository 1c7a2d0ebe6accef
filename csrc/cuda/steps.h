// What the CUDA kernels are given: plain structs, a shape on every pointer.
//
// Names as in recurrence.h: T steps, B rows of the batch, H hidden_size, P proj_size (H without a
// projection), G = gate_blocks. Rows are the caller's own: a dense input's step t has rows t*B to
// (t+1)*B - 1, some of them padding where there are lengths; a packed one's has the first of the
// batch. Nothing is sorted or compacted, as lengths stay on the GPU. "Before" and "after" are in
// the order in which the direction walks, also in back-propagation.
//
// E is what values are kept as, S = Arithmetic<E> what they are computed as. Pointers to a step's
// rows point to the row of batch row 0 and, of several directions, to this one's columns. Every
// pointer is device memory that lives until the stream has passed the kernel.
#pragma once

#include <cstdint>

#include "cuda/storage.h"
#include "recurrence.h"

namespace fusedrnn {

// One step of one direction.
//
// The boundary between steps t - 1 and t is t; where reset[t] is set, it cuts the state for either
// direction. It lies within a row if t is a valid step of it.
struct Step {
  int64_t time;            // t
  int64_t rows;            // batch rows [0, rows) have it, but for those that `lengths` ends
  const int64_t* lengths;  // (B) or null; any value, which stands for the nearest in 0..T
  int64_t time_before;     // of the step before
  int64_t rows_before;     // of the same, 0 where this is the first
  int64_t boundary_before, boundary_after;
  const bool* cut_before;  // (B): reset at boundary_before, or null: no row is cut
  const bool* cut_after;   // (B): reset at boundary_after, the same; null at the last step

  FUSEDRNN_HD bool within(int64_t row, int64_t t) const {
    return lengths == nullptr || t < lengths[row];
  }
  FUSEDRNN_HD bool has(int64_t row) const { return row < rows && within(row, time); }
  // Whether the state that enters comes from the step before, else it is the initial one.
  FUSEDRNN_HD bool continues(int64_t row) const {
    return row < rows_before && within(row, time_before);
  }
  FUSEDRNN_HD bool is_cut_before(int64_t row) const {
    return cut_before != nullptr && cut_before[row] && within(row, boundary_before);
  }
  FUSEDRNN_HD bool is_cut_after(int64_t row) const {
    return cut_after != nullptr && cut_after[row] && within(row, boundary_after);
  }
};

// The state that enters the first step: h0 or c0, zero where a reset stands before that step.
template <class E>
struct InitialState {
  Step first;
  int64_t width;      // P or H
  const E* from;      // (B, width), or null: zeros
  E* kept;            // (B, width), or null
  Arithmetic<E>* to;  // (B, width), or null
};

// One step of the recurrence.
template <class E>
struct ForwardStep {
  using S = Arithmetic<E>;
  Step step;
  int64_t hidden;         // H
  const S* input_gates;   // (rows, G*H): W_ih x
  const S* hidden_gates;  // (rows, G*H): W_hh h
  const E* b_ih;          // (G*H), or null; then b_hh is null too
  const E* b_hh;          // (G*H), or null
  // What enters the step, and then what enters the next one: zero where that one starts a segment.
  // A row without this step keeps its own, so that the final states are left here.
  S* state;    // (B, H): LSTM c, GRU h before it is rounded; null for an RNN
  E* h;        // (B, H): what W_hh multiplies; null with a projection
  E* h_tilde;  // (B, H): o tanh(c) before a projection, else null
  E* y;        // (rows, y_stride): zeros in padding; null with a projection
  E* gates;    // (rows, gates_stride): saved_blocks blocks of hidden_padded; or null
  S* cells;    // (rows, cells_stride), LSTM; or null
  int64_t y_stride, gates_stride, cells_stride, hidden_padded;
};

// The second half of a step with a projection.
template <class E>
struct ProjectedStep {
  Step step;
  int64_t output;                  // P
  const Arithmetic<E>* projected;  // (rows, P): W_hr h_tilde
  E* h;                            // (B, P): as in ForwardStep
  E* y;                            // (rows, y_stride)
  int64_t y_stride;
};

// The gradient of the state that leaves a step, without dy's share. A row without the step hands
// it on unchanged: it is dh_n at first.
template <class E>
struct CarriedGradient {
  using S = Arithmetic<E>;
  S* direct;         // (B, P): dh_n, then what does not pass through W_hh
  const S* product;  // (product_rows, P): the step after's dgates W_hh
  int64_t product_rows;
};

// One step of back-propagation.
template <class E>
struct BackwardStep {
  using S = Arithmetic<E>;
  Step step;
  int64_t hidden;  // H
  CarriedGradient<E> carry;
  S* dc;               // (B, H): dc_n, then the gradient of the c that leaves; LSTM
  const S* dh_hidden;  // (rows, H): with a projection the step's dh W_hr, in place of carry and dy
  const E* dy;         // (rows, y_stride), or null
  const E* gates;      // (rows, gates_stride)
  const S* cells;      // (rows, cells_stride)
  const S* cells_before;  // (rows_before, cells_stride)
  const E* y;             // (rows, y_stride)
  const E* y_before;      // (rows_before, y_stride)
  const E* h0;            // (B, H), or null: zeros
  const E* c0;            // (B, H), or null: zeros
  int64_t y_stride, gates_stride, cells_stride, hidden_padded;
  E* dgates;    // (rows, gradient_blocks * H): zeros in padding
  E* previous;  // (rows, H): the h that entered, zeros in padding; or null
  E* h_tilde;   // (rows, H): o tanh(c), zeros in padding; null without a projection
};

// The half of such a step that comes first where there is a projection.
template <class E>
struct ProjectedBackwardStep {
  Step step;
  int64_t output;  // P
  CarriedGradient<E> carry;
  const E* dy;        // (rows, y_stride), or null
  const E* y_before;  // (rows_before, y_stride)
  const E* h0;        // (B, P), or null: zeros
  int64_t y_stride;
  E* dh;        // (rows, P): the gradient of this step's h, zeros in padding
  E* previous;  // (rows, P), or null: as in BackwardStep
};

// What is left for the initial state: dh0 or dc0.
template <class E>
struct InitialGradient {
  Step first;
  int64_t width;             // P or H
  CarriedGradient<E> carry;  // of that width; product_rows is 0 for dc0
  E* to;                     // (B, width)
};

// Rows of a dense x with zeros for padding, which may hold anything.
template <class E>
struct ValidRows {
  int64_t width, batch;    // I, B
  int64_t begin;           // the time of the first row
  const int64_t* lengths;  // (B)
  const E* from;           // (rows, width)
  E* to;                   // (rows, width)
};

}  // namespace fusedrnn
