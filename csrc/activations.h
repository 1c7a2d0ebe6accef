// sigmoid and tanh for float, double and vectors of them, on host and device.
//
// Both rest on one function, expm1 of a reduced argument (Cody & Waite 1980): x = n ln2 + r with
// |r| <= ln2/2, expm1(r) = r + r^2 p(r), where p is a minimax polynomial in the relative error of
// expm1 (Remez exchange; 2^-31.9 for float, 2^-61.7 for double). tanh(|x|) = t / (t + 2) with
// t = expm1(2|x|) loses nothing near zero; float has a minimax polynomial below 0.4. Error <= 2 ULP
// in float over every normal input; results below the smallest normal number may be flushed to
// zero. NaN stays NaN.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "isa_namespace.h"

FUSEDRNN_ISA_BEGIN

// The scalar inside V and the integer type of V's shape.
template <class V>
struct ValueTraits {
  using Scalar = std::remove_cv_t<std::remove_reference_t<decltype(std::declval<V&>()[0])>>;
  using Int = decltype(std::declval<V>() < std::declval<V>());
};
template <>
struct ValueTraits<float> {
  using Scalar = float;
  using Int = int32_t;
};
template <>
struct ValueTraits<double> {
  using Scalar = double;
  using Int = int64_t;
};
template <class V>
using ScalarOf = typename ValueTraits<V>::Scalar;
template <class V>
using IntOf = typename ValueTraits<V>::Int;

template <class To, class From>
FUSEDRNN_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// Constants of the reduction, per scalar type.
template <class S>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float log2e = 1.44269504088896341f;
  static constexpr float ln2_hi = 0.693359375f;  // 9 bits: n * ln2_hi is exact
  static constexpr float ln2_lo = -2.12194440054690583e-4f;
  static constexpr float rounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int mantissa_bits = 23;
  static constexpr float sigmoid_underflow = -87.3365447f;  // sigmoid is subnormal below
  static constexpr float tanh_saturation = 10.0f;           // tanh rounds to 1 above 9.02
};
template <>
struct ExpConstants<double> {
  static constexpr double log2e = 1.4426950408889634074;
  static constexpr double ln2_hi = 6.93147180369123816490e-01;  // 33 bits
  static constexpr double ln2_lo = 1.90821492927058770002e-10;
  static constexpr double rounder = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int mantissa_bits = 52;
  static constexpr double sigmoid_underflow = -708.39641853226408;
  static constexpr double tanh_saturation = 20.0;  // tanh rounds to 1 above 19.1
};

// p(r) of expm1(r) = r + r^2 p(r).
template <class V>
FUSEDRNN_HD V expm1_polynomial(V r) {
  if constexpr (std::is_same_v<ScalarOf<V>, float>) {
    V p = 0.0001984587904f * r + 0.001394063753f;
    p = p * r + 0.008333389391f;
    p = p * r + 0.04166636079f;
    p = p * r + 0.1666666637f;
    return p * r + 0.5000000044f;
  } else {
    V p = 2.0875335040737367235e-9 * r + 2.5108990040887386464e-8;
    p = p * r + 2.7557402659000692862e-7;
    p = p * r + 2.7557244344843735197e-6;
    p = p * r + 0.000024801587172480698781;
    p = p * r + 0.00019841269885992204684;
    p = p * r + 0.0013888888888962420254;
    p = p * r + 0.0083333333333216824035;
    p = p * r + 0.04166666666666650864;
    p = p * r + 0.16666666666666676517;
    return p * r + 0.5;
  }
}

// exp(x) = scale + scale * expm1_r with scale = 2^n.
template <class V>
struct ReducedExp {
  V scale;
  V expm1_r;
};

// x must be NaN or lie where 2^n is a normal number.
template <class V>
FUSEDRNN_HD ReducedExp<V> reduced_exp(V x) {
  using C = ExpConstants<ScalarOf<V>>;
  using S = ScalarOf<V>;
  const V shifted = x * C::log2e + C::rounder;
  const V n = shifted - C::rounder;
  const V r = (x - n * C::ln2_hi) - n * C::ln2_lo;
  const IntOf<V> one = bits_as<IntOf<V>>(V{} + S(1));
  const V scale = bits_as<V>((bits_as<IntOf<V>>(shifted) << C::mantissa_bits) + one);
  return {scale, r + (r * r) * expm1_polynomial(r)};
}

// 1 / (1 + exp(-x))
template <class V>
FUSEDRNN_HD V sigmoid(V x) {
  using C = ExpConstants<ScalarOf<V>>;
  using S = ScalarOf<V>;
  const V zero = V{};
  const V low = zero + C::sigmoid_underflow;
  const V high = zero - C::sigmoid_underflow;
  V clamped = x < low ? low : x;
  clamped = clamped > high ? high : clamped;
  const ReducedExp<V> e = reduced_exp<V>(-clamped);
  // 1 + scale rounds the 1 away from 2^24 on (2^53 in double): `lost` brings it back.
  const V sum = S(1) + e.scale;
  const V lost = S(1) - (sum - e.scale);
  const V result = S(1) / (sum + (e.scale * e.expm1_r + lost));
  return x < low ? zero : result;
}

// sign(x) * t / (t + 2), t = exp(2|x|) - 1
template <class V>
FUSEDRNN_HD V tanh(V x) {
  using C = ExpConstants<ScalarOf<V>>;
  using S = ScalarOf<V>;
  const IntOf<V> sign = bits_as<IntOf<V>>(x) & bits_as<IntOf<V>>(-V{});
  V magnitude = bits_as<V>(bits_as<IntOf<V>>(x) ^ sign);
  const V high = V{} + C::tanh_saturation;
  magnitude = magnitude > high ? high : magnitude;
  const ReducedExp<V> e = reduced_exp<V>(magnitude + magnitude);
  const V t = e.scale * e.expm1_r + (e.scale - S(1));
  V result = t / (t + S(2));
  if constexpr (std::is_same_v<S, float>) {
    // Three roundings in a row are more than 2 ULP near zero; the series' one is not.
    const V square = magnitude * magnitude;
    V p = 0.01875122824f * square - 0.05356414235f;
    p = p * square + 0.1333123466f;
    p = p * square - 0.3333329925f;
    const V series = magnitude + magnitude * square * p;
    result = square < V{} + 0.16f ? series : result;
  }
  return bits_as<V>(bits_as<IntOf<V>>(result) | sign);
}

FUSEDRNN_ISA_END
