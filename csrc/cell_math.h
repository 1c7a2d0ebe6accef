// The equations of every cell, forward and backward, once.
//
// V is float or double (CUDA, tests), a vector of them (CPU), or a dual number of either (dual.h),
// which gives the equations' own derivatives. W x and W h products, biases and the time loop live
// elsewhere; here stands only what happens to one hidden unit at one step. Gate order in memory is
// torch.nn's: LSTM i, f, g, o; GRU r, z, n. A forward step comes in two halves, the gates and what
// needs an activated gate first: a caller with several rows runs each half over all of them, so
// that independent work fills the wait for an activation's long chain.
#pragma once

#include <type_traits>

#include "activations.h"
#include "recurrence.h"

FUSEDRNN_ISA_BEGIN

// ---- LSTM (Hochreiter & Schmidhuber 1997; forget gate of Gers, Schmidhuber & Cummins 2000) ----

template <class V>
struct LstmGates {
  V i, f, g, o;
};

template <class V>
struct LstmState {
  LstmGates<V> gates;  // activated
  V c;
};

// c = f c_prev + i g, of activated gates
template <class V>
FUSEDRNN_HD V lstm_cell_state(const LstmGates<V>& y, V c_prev) {
  return y.f * c_prev + y.i * y.g;
}

// i = sigmoid(a.i), f = sigmoid(a.f), g = tanh(a.g), o = sigmoid(a.o), and c
template <class V>
FUSEDRNN_HD LstmState<V> lstm_state(const LstmGates<V>& a, V c_prev) {
  LstmState<V> s;
  s.gates = {sigmoid(a.i), sigmoid(a.f), tanh(a.g), sigmoid(a.o)};
  s.c = lstm_cell_state(s.gates, c_prev);
  return s;
}

// h = o tanh(c)
template <class V>
FUSEDRNN_HD V lstm_output(V o, V c) {
  return o * tanh(c);
}

template <class V>
struct LstmGradient {
  LstmGates<V> dgates;  // with respect to the pre-activations
  V dc_prev;
  V h_tilde;  // o tanh(c), recomputed: the input of a projection
};

// dh, dc: gradients of this step's h and c (dc without h's share).
template <class V>
FUSEDRNN_HD LstmGradient<V> lstm_backward(const LstmGates<V>& y, V c_prev, V c, V dh, V dc) {
  using S = ScalarOf<V>;
  LstmGradient<V> d;
  const V tanh_c = tanh(c);
  const V dct = dc + dh * y.o * (S(1) - tanh_c * tanh_c);
  d.dgates.i = dct * y.g * y.i * (S(1) - y.i);
  d.dgates.f = dct * c_prev * y.f * (S(1) - y.f);
  d.dgates.g = dct * y.i * (S(1) - y.g * y.g);
  d.dgates.o = dh * tanh_c * y.o * (S(1) - y.o);
  d.dc_prev = dct * y.f;
  d.h_tilde = y.o * tanh_c;
  return d;
}

// ---- GRU (Cho et al. 2014), in the form that applies the reset gate after the product, ---------
// ---- as torch.nn and cuDNN do -------------------------------------------------------------------

template <class V>
struct GruGates {
  V r, z;
  V a_n;  // n before its activation
};

// a_n = a_in + r a_hn, where a_in = W_in x + b_in and a_hn = W_hn h + b_hn, the two halves of n's
// pre-activation
template <class V>
FUSEDRNN_HD V gru_sum(V a_in, V r, V a_hn) {
  return a_in + r * a_hn;
}

// a_r, a_z: whole pre-activations. r = sigmoid(a_r), z = sigmoid(a_z), and a_n
template <class V>
FUSEDRNN_HD GruGates<V> gru_gates(V a_r, V a_z, V a_in, V a_hn) {
  GruGates<V> s;
  s.r = sigmoid(a_r);
  s.z = sigmoid(a_z);
  s.a_n = gru_sum(a_in, s.r, a_hn);
  return s;
}

template <class V>
struct GruState {
  V n, h;
};

// h = (1 - z) n + z h_prev
template <class V>
FUSEDRNN_HD V gru_output(V n, V z, V h_prev) {
  return n + z * (h_prev - n);
}

// n = tanh(a_n), and h
template <class V>
FUSEDRNN_HD GruState<V> gru_state(V a_n, V z, V h_prev) {
  GruState<V> s;
  s.n = tanh(a_n);
  s.h = gru_output(s.n, z, h_prev);
  return s;
}

template <class V>
struct GruGradient {
  V da_r, da_z, da_in, da_hn;
  V dh_prev;  // the share that does not pass through W_hh
};

template <class V>
FUSEDRNN_HD GruGradient<V> gru_backward(V r, V z, V n, V a_hn, V h_prev, V dh) {
  using S = ScalarOf<V>;
  GruGradient<V> d;
  d.da_in = dh * (S(1) - z) * (S(1) - n * n);
  d.da_hn = d.da_in * r;
  d.da_r = d.da_in * a_hn * r * (S(1) - r);
  d.da_z = dh * (h_prev - n) * z * (S(1) - z);
  d.dh_prev = dh * z;
  return d;
}

// ---- RNN (Elman 1990) ---------------------------------------------------------------------------

struct Tanh {
  template <class V>
  static FUSEDRNN_HD V forward(V a) {
    return tanh(a);
  }
  template <class V>
  static FUSEDRNN_HD V backward(V h, V dh) {
    return dh * (ScalarOf<V>(1) - h * h);
  }
};

struct Relu {
  template <class V>
  static FUSEDRNN_HD V forward(V a) {
    return a < V{} ? V{} : a;  // a NaN stays
  }
  template <class V>
  static FUSEDRNN_HD V backward(V h, V dh) {
    return h <= V{} ? V{} : dh;
  }
};

template <Cell kCell>
using RnnActivation = std::conditional_t<kCell == Cell::kRnnTanh, Tanh, Relu>;

FUSEDRNN_ISA_END
