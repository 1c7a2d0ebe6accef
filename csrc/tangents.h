// What the kernels of the tangents are given: one step of the walk along the time axis, and of the
// one back. Products, states that enter and leave, and the order of steps are the caller's
// (cpu/tangents_cpu.cpp). Names and shapes as in recurrence.h; a row is one (step, row) pair.
//
// The tangent of the forward pass along a direction is its derivative in that direction. The
// tangent of the backward pass is a Hessian-vector product, and as Hessians are symmetric, it is
// also what double backward asks for (Pearlmutter 1994).
#pragma once

#include <cstdint>

#include "recurrence.h"

namespace fusedrnn {

// Rows of a tensor that lives longer than the call, `stride` values apart.
template <class S>
struct StridedRows {
  S* data;
  int64_t stride;
  S* operator[](int64_t row) const { return data + row * stride; }
};

// Values and their tangents, row by row.
template <class S>
struct DualRows {
  StridedRows<S> value, tangent;
};

template <class S>
struct TangentStep {
  int64_t rows;  // of this step
  int64_t hidden;

  // What the forward pass has kept, saved_blocks blocks `gates_block` apart; LSTM and GRU.
  StridedRows<const S> gates;
  int64_t gates_block;
  // Tangents of the pre-activations, blocks H apart: LSTM i, f, g, o; GRU r, z, W_hn h + b_hn,
  // W_in x + b_in; RNN one.
  StridedRows<const S> sums;
  DualRows<const S> entering;  // LSTM c, GRU h, before the step; resets are zeros already
  StridedRows<const S> c;      // (H), LSTM: after the step
  StridedRows<S> c_tangent;    // (H), LSTM: written forward, read backward
  StridedRows<const S> h;      // (H), RNN: after the step
  StridedRows<S> h_tangent;    // (H): written forward, read backward by the RNN; LSTM: before a
                               // projection
};

template <class S>
struct TangentStepBack {
  TangentStep<S> step;
  DualRows<const S> dh;  // (H): the gradient of this step's h, of an LSTM's before a projection
  DualRows<S> carry;     // (H): LSTM dc, read and written; GRU the share of dh that does not pass
                         // through W_hh, written
  DualRows<S> dgates;    // written; blocks as those of `sums`
};

// The columns of panels [panel_begin, panel_end) of out = a W, or of out += a W. W is (k, columns),
// in panels of kTangentVectors vectors of columns (cpu/gemm_inl.h).
inline constexpr int kTangentVectors = 2;
template <class S>
struct TangentProduct {
  int64_t rows, k, columns;
  int64_t panel_begin, panel_end;
  StridedRows<const S> a;  // (rows, k)
  const S* packed;         // all panels of W, as tangents_pack makes them
  StridedRows<S> out;      // (rows, columns)
  bool add;
};

}  // namespace fusedrnn
