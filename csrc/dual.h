// Dual numbers: a value and its derivative along one direction. Whatever is computed with them
// carries that derivative along (forward-mode differentiation; Griewank & Walther 2008, chapter 3),
// so the tangent of an equation of cell_math.h is that equation itself.
#pragma once

#include "activations.h"

FUSEDRNN_ISA_BEGIN

template <class V>
struct Dual {
  V value, tangent;
};

template <class V>
struct ValueTraits<Dual<V>> {
  using Scalar = ScalarOf<V>;
};

template <class V>
FUSEDRNN_HD Dual<V> operator+(Dual<V> a, Dual<V> b) {
  return {a.value + b.value, a.tangent + b.tangent};
}
template <class V>
FUSEDRNN_HD Dual<V> operator-(Dual<V> a, Dual<V> b) {
  return {a.value - b.value, a.tangent - b.tangent};
}
template <class V>
FUSEDRNN_HD Dual<V> operator-(ScalarOf<V> a, Dual<V> b) {
  return {a - b.value, -b.tangent};
}
template <class V>
FUSEDRNN_HD Dual<V> operator*(Dual<V> a, Dual<V> b) {
  return {a.value * b.value, a.tangent * b.value + a.value * b.tangent};
}

// sigmoid(a) and tanh(a) from their value y, which the forward pass has kept, and a's tangent.
template <class V>
FUSEDRNN_HD Dual<V> sigmoid_at(V y, V tangent) {
  return {y, tangent * (y * (ScalarOf<V>(1) - y))};
}
template <class V>
FUSEDRNN_HD Dual<V> tanh_at(V y, V tangent) {
  return {y, tangent * (ScalarOf<V>(1) - y * y)};
}

template <class V>
FUSEDRNN_HD Dual<V> tanh(Dual<V> a) {
  return tanh_at(tanh(a.value), a.tangent);
}

FUSEDRNN_ISA_END
