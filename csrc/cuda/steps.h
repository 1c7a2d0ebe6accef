// What the CUDA kernels are given: plain structs, a shape on every pointer.
//
// Names as in recurrence.h: T steps, B rows of the batch, H hidden_size, P proj_size (H without a
// projection), G = gate_blocks. Rows are the caller's own: a dense input's step t has rows t*B to
// (t+1)*B - 1, some of them padding where there are lengths; a packed one's has the first of the
// batch. Nothing is sorted or compacted, as lengths stay on the GPU. "Before" and "after" are in
// the order in which the direction walks, also in back-propagation.
//
// E is what values are kept as, S = Arithmetic<E> what they are computed as. N rows are all of the
// caller's; "step's rows" and "part's rows" are counted from the first of that step or part. Of
// several directions, a pointer points to this one's columns. Every pointer is device memory that
// lives until the stream has passed the kernel.
#pragma once

#include <cstdint>

#include "cuda/storage.h"
#include "recurrence.h"

namespace fusedrnn {

// Rows of the caller's tensors: those of one step, batch row 0's first.
struct Rows {
  int64_t first, count;
};

// One step of one direction.
//
// The boundary between steps t - 1 and t is t; where reset[t] is set, it cuts the state for either
// direction. It lies within a row if t is a valid step of it.
struct Step {
  int64_t time;            // t
  Rows now;                // batch rows [0, count) have it, but for those that `lengths` ends
  Rows before;             // of the step before; none where this is the first
  int64_t time_before;     // of the step before
  const int64_t* lengths;  // (B) or null; any value, which stands for the nearest in 0..T
  int64_t boundary_before, boundary_after;
  const bool* cut_before;  // (B): reset at boundary_before, or null: no row is cut
  const bool* cut_after;   // (B): reset at boundary_after, the same; null at the last step

  FUSEDRNN_HD bool within(int64_t row, int64_t t) const {
    return lengths == nullptr || t < lengths[row];
  }
  FUSEDRNN_HD bool has(int64_t row) const { return row < now.count && within(row, time); }
  // Whether the state that enters comes from the step before, else it is the initial one.
  FUSEDRNN_HD bool continues(int64_t row) const {
    return row < before.count && within(row, time_before);
  }
  FUSEDRNN_HD bool is_cut_before(int64_t row) const {
    return cut_before != nullptr && cut_before[row] && within(row, boundary_before);
  }
  FUSEDRNN_HD bool is_cut_after(int64_t row) const {
    return cut_after != nullptr && cut_after[row] && within(row, boundary_after);
  }
};

// The order in which a direction walks over a sequence, and what cuts and ends its rows.
struct Order {
  int64_t steps;  // T, without steps that no row has
  int64_t batch;  // B
  bool reverse;
  const int64_t* lengths;  // (B) or null, as in Step
  const bool* reset;       // (T, B) or null

  FUSEDRNN_HD int64_t before(int64_t t) const { return reverse ? t + 1 : t - 1; }
  FUSEDRNN_HD int64_t after(int64_t t) const { return reverse ? t - 1 : t + 1; }
  FUSEDRNN_HD bool has(int64_t t) const { return t >= 0 && t < steps; }

  FUSEDRNN_HD Step step(int64_t t, Rows now, Rows rows_before) const {
    Step s{
        t,       now,    rows_before, before(t), lengths, reverse ? t + 1 : t, reverse ? t : t + 1,
        nullptr, nullptr};
    if (reset != nullptr) {
      // Step 0 of the forward direction may start a segment; the last one of the reverse may not.
      if (has(before(t)) || !reverse) s.cut_before = reset + s.boundary_before * batch;
      if (has(after(t))) s.cut_after = reset + s.boundary_after * batch;
    }
    return s;
  }
};

// The most steps of a PartOfWalk, which must fit among a kernel's parameters. Tests set fewer.
#ifndef FUSEDRNN_MOST_STEPS
  #define FUSEDRNN_MOST_STEPS 256
#endif
inline constexpr int64_t kMostSteps = FUSEDRNN_MOST_STEPS;

// Steps [begin, end) in time of a walk, for a kernel that takes them all.
struct PartOfWalk {
  Order order;
  int64_t begin, end;
  Rows earlier;                     // of step begin - 1; none where there is none
  int64_t rows_later;               // of step end; 0 where there is none
  int64_t first;                    // the first row of step begin
  uint32_t offset[kMostSteps + 1];  // of each step's first row from that, and of step end's

  FUSEDRNN_HD int64_t first_row(int64_t i) const { return first + offset[i]; }
  FUSEDRNN_HD Rows rows(int64_t t) const {
    if (t < begin) return earlier;
    const int64_t row = first_row(t - begin);
    return {row, t < end ? first_row(t - begin + 1) - row : rows_later};
  }
  FUSEDRNN_HD Step step(int64_t t) const { return order.step(t, rows(t), rows(order.before(t))); }
  // The i-th that the direction walks, or that back-propagation does.
  FUSEDRNN_HD int64_t walked(int64_t i) const { return order.reverse ? end - 1 - i : begin + i; }
  FUSEDRNN_HD int64_t walked_back(int64_t i) const {
    return order.reverse ? begin + i : end - 1 - i;
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

// Where a forward call's results go, and what is kept for back-propagation. Rows are counted from
// the tensors' first.
template <class E>
struct ForwardResults {
  using S = Arithmetic<E>;
  E* y;      // (N, y_stride): zeros in padding; null with a projection
  E* gates;  // (N, gates_stride): saved_blocks blocks of hidden_padded; or null
  S* cells;  // (N, cells_stride), LSTM; or null
  int64_t y_stride, gates_stride, cells_stride, hidden_padded;
};

// One step of the recurrence.
template <class E>
struct ForwardStep {
  using S = Arithmetic<E>;
  Step step;
  int64_t hidden;         // H
  const S* input_gates;   // (step's rows, G*H): W_ih x
  const S* hidden_gates;  // (step's rows, G*H): W_hh h
  const E* b_ih;          // (G*H), or null; then b_hh is null too
  const E* b_hh;          // (G*H), or null
  // What enters the step, and then what enters the next one: zero where that one starts a segment.
  // A row without this step keeps its own, so that the final states are left here.
  S* state;    // (B, H): LSTM c, GRU h before it is rounded; null for an RNN
  E* h;        // (B, H): what W_hh multiplies; null with a projection
  E* h_tilde;  // (B, H): o tanh(c) before a projection, else null
  ForwardResults<E> results;
};

// Many steps of the recurrence, without a projection, for a kernel that keeps W_hh.
template <class E>
struct PartForward {
  using S = Arithmetic<E>;
  PartOfWalk part;
  int64_t hidden;        // H
  const S* input_gates;  // (part's rows, G*H): W_ih x
  const E* w_hh;         // (G, U, V), aligned to 16 bytes: zeros beyond (G, H, H)
  const E* b_ih;         // as in ForwardStep, all
  const E* b_hh;
  S* state;
  E* h;
  ForwardResults<E> results;
};

// The second half of a step with a projection.
template <class E>
struct ProjectedStep {
  Step step;
  int64_t output;                  // P
  const Arithmetic<E>* projected;  // (step's rows, P): W_hr h_tilde
  E* h;                            // (B, P): as in ForwardStep
  E* y;                            // (N, y_stride)
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

// What a forward call was given and left, and the gradient of y. Rows are counted from the tensors'
// first.
template <class E>
struct ForwardSaved {
  using S = Arithmetic<E>;
  int64_t hidden;  // H
  const E* dy;     // (N, y_stride), or null; null with a projection, as y and h0 are
  const E* y;      // (N, y_stride)
  const E* gates;  // (N, gates_stride)
  const S* cells;  // (N, cells_stride)
  const E* h0;     // (B, H), or null: zeros
  const E* c0;     // (B, H), or null: zeros
  int64_t y_stride, gates_stride, cells_stride, hidden_padded;
};

// One step of back-propagation.
template <class E>
struct BackwardStep {
  using S = Arithmetic<E>;
  Step step;
  int64_t hidden;  // H
  CarriedGradient<E> carry;
  S* dc;               // (B, H): dc_n, then the gradient of the c that leaves; LSTM
  const S* dh_hidden;  // (step's rows, H): with a projection dh W_hr, in place of carry and dy
  ForwardSaved<E> saved;
  E* dgates;    // (step's rows, gradient_blocks * H): zeros in padding
  E* previous;  // (step's rows, H): the h that entered, zeros in padding; or null
  E* h_tilde;   // (step's rows, H): o tanh(c), zeros in padding; null without a projection
};

// Many steps of back-propagation, as PartForward.
template <class E>
struct PartBackward {
  using S = Arithmetic<E>;
  PartOfWalk part;
  int64_t hidden;  // H
  const E* w_hh;   // (U, G, V): the transpose, its columns in the order of the hidden side
  S* direct;       // (B, H): CarriedGradient of the state that leaves the part, then of the one
                   // that enters it; nothing is left in a product
  S* dc;           // (B, H), as in BackwardStep
  ForwardSaved<E> saved;
  E* dgates;    // (part's rows, gradient_blocks * H): zeros in padding
  E* previous;  // (part's rows, H), or null: as in BackwardStep
};

// Directions of a layer that a kernel for many steps takes side by side: as many CTAs for each, the
// first one's first.
template <class Part>
struct SideBySide {
  Part part[2];
  int count;  // 1 or 2
};

// Which of them a CTA has, and its number among that one's.
struct Side {
  int which;
  int64_t index;

  FUSEDRNN_HD Side(int64_t block, int64_t blocks_each)
      : which(block < blocks_each ? 0 : 1), index(block - which * blocks_each) {}
};

// The units U = V that one_cta has for H hidden ones: with fewer, a step would take hardly less
// time.
inline constexpr int64_t one_cta_units(int64_t hidden) { return hidden <= 64 ? 64 : 128; }

// The units U = V of the persistent kernels: whole tiles of k.
FUSEDRNN_HD constexpr int64_t persistent_units(int64_t hidden) { return (hidden + 31) / 32 * 32; }

// How float32 values are multiplied on tensor cores, which take the first 11 bits of each.
enum class Precision {
  kExact,  // a value's first bits and its next ones in turns: heads with heads, heads with tails.
           // What is left out is 2^-22 of a product; infinity times a tail of zero is NaN
  kTf32,   // values rounded to 11 bits, as cuDNN does where it may
};

// How the persistent kernels share a layer out: a CTA has `units` of the hidden units, with all
// their gates, and `rows` rows of the batch. CTAs with the same rows exchange what W_hh multiplies.
// A warp of the CTA has `depths` times kDepthBytes of a row of W_hh.
inline constexpr int kPersistentThreads = 256, kDepthBytes = 64;
struct PersistentForm {
  int units, depths, rows;
  Precision precision;  // of float32
};

// The forms that there are. Sums of more rows would not fit shared memory, and weights of more
// units not a CTA; exact sums of float32 take more registers. The last is there for all.
inline constexpr struct ThereIs {
  int units, depths, rows;
  bool of_float, of_exact_float;
  constexpr bool of(size_t bytes, Precision precision) const {
    return bytes == 2 || (precision == Precision::kExact ? of_exact_float : of_float);
  }
} kPersistentForms[] = {{32, 2, 8, false, false}, {32, 2, 16, false, false},
                        {16, 4, 8, true, true},   {16, 4, 16, true, true},
                        {16, 4, 32, true, true},  {16, 8, 16, true, false},
                        {16, 8, 8, true, true}};

// What the CTAs of a persistent kernel have beside the part.
struct Exchange {
  PersistentForm form;
  int64_t first_row;   // of the batch, that the kernel's CTAs have
  int rows;            // of the batch, that they have
  uint32_t* words[2];  // a side's (steps, B, blocks of W_hh's columns, V) values of E, kUnwritten
                       // everywhere; step by step what W_hh multiplies
};

// The half of such a step that comes first where there is a projection.
template <class E>
struct ProjectedBackwardStep {
  Step step;
  int64_t output;  // P
  CarriedGradient<E> carry;
  const E* dy;  // (N, y_stride), or null
  const E* y;   // (N, y_stride)
  const E* h0;  // (B, P), or null: zeros
  int64_t y_stride;
  E* dh;        // (step's rows, P): the gradient of this step's h, zeros in padding
  E* previous;  // (step's rows, P), or null: as in BackwardStep
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
