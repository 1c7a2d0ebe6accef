// sigmoid and tanh for float, double and vectors of them, on host and device.
//
// Both rest on one function, expm1 of a reduced argument (Cody & Waite 1980): x = n ln2 + r with
// |r| <= ln2/2, expm1(r) = r + r^2 p(r), where p is a minimax polynomial (Remez exchange) in the
// relative error of expm1 (2^-31.9 for float, 2^-61.7 for double). Error <= 2 ULP in float over
// every normal input. Results below the smallest normal number are zero where the kernels run, with
// denormals flushed. NaN stays NaN.
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
  static constexpr float sigmoid_limit = 88.37f;   // 2^127 < exp of it, and sigmoid is subnormal
  static constexpr float tanh_saturation = 10.0f;  // tanh rounds to 1 above 9.02
};
template <>
struct ExpConstants<double> {
  static constexpr double log2e = 1.4426950408889634074;
  static constexpr double ln2_hi = 6.93147180369123816490e-01;  // 33 bits
  static constexpr double ln2_lo = 1.90821492927058770002e-10;
  static constexpr double rounder = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int mantissa_bits = 52;
  static constexpr double sigmoid_limit = 709.4;
  static constexpr double tanh_saturation = 20.0;  // tanh rounds to 1 above 19.1
};

// expm1(r) = r + r^2 p(r). In float in Estrin's order: a shorter chain than Horner's.
template <class V>
FUSEDRNN_HD V reduced_expm1(V r) {
  if constexpr (std::is_same_v<ScalarOf<V>, float>) {
    const V square = r * r;
    const V low = 0.1666666637f * r + 0.5000000044f;
    const V middle = 0.008333389391f * r + 0.04166636079f;
    const V high = 0.0001984587904f * r + 0.001394063753f;
    const V p = (high * square + middle) * square + low;
    return p * square + r;
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
    return r + (r * r) * (p * r + 0.5);
  }
}

// scale + scale * expm1_r with scale = unit 2^n.
template <class V>
struct ReducedExp {
  V scale;
  V expm1_r;
};

// unit (a power of two) times exp(x), in parts. x must be NaN or lie where unit 2^n is a normal
// number.
template <class V>
FUSEDRNN_HD ReducedExp<V> reduced_exp(V x, ScalarOf<V> unit) {
  using C = ExpConstants<ScalarOf<V>>;
  const V shifted = x * C::log2e + C::rounder;
  const V n = shifted - C::rounder;
  const V r = (x - n * C::ln2_hi) - n * C::ln2_lo;
  const IntOf<V> start = bits_as<IntOf<V>>(V{} + unit);
  const V scale = bits_as<V>((bits_as<IntOf<V>>(shifted) << C::mantissa_bits) + start);
  return {scale, reduced_expm1(r)};
}

// The smaller or the larger one; a NaN in x stays. Of the plain form GCC 12 makes a compare and a
// blend, where one instruction does it, and with 64 bytes a compare takes a multiplication's place.
template <class V>
FUSEDRNN_HD V at_most(V limit, V x) {
#if defined(__x86_64__) && FUSEDRNN_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<ScalarOf<V>, float> && sizeof(V) == 64) {
    return __builtin_ia32_minps512_mask(limit, x, x, uint16_t(-1), 4);
  } else
#elif defined(__x86_64__) && FUSEDRNN_VECTOR_BYTES == 32
  if constexpr (std::is_same_v<ScalarOf<V>, float> && sizeof(V) == 32) {
    return __builtin_ia32_minps256(limit, x);
  } else
#endif
    return limit < x ? limit : x;
}
template <class V>
FUSEDRNN_HD V at_least(V limit, V x) {
#if defined(__x86_64__) && FUSEDRNN_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<ScalarOf<V>, float> && sizeof(V) == 64) {
    return __builtin_ia32_maxps512_mask(limit, x, x, uint16_t(-1), 4);
  } else
#elif defined(__x86_64__) && FUSEDRNN_VECTOR_BYTES == 32
  if constexpr (std::is_same_v<ScalarOf<V>, float> && sizeof(V) == 32) {
    return __builtin_ia32_maxps256(limit, x);
  } else
#endif
    return limit > x ? limit : x;
}

// 1 / (1 + exp(-x))
template <class V>
FUSEDRNN_HD V sigmoid(V x) {
  using C = ExpConstants<ScalarOf<V>>;
  using S = ScalarOf<V>;
  const V limit = V{} + C::sigmoid_limit;
  const ReducedExp<V> e = reduced_exp<V>(-at_least(-limit, at_most(limit, x)), S(1));
  // 1 + scale rounds the 1 away from 2^24 on (2^53 in double): `lost` brings it back.
  const V sum = S(1) + e.scale;
  const V lost = S(1) - (sum - e.scale);
  return S(1) / (sum + (e.scale * e.expm1_r + lost));
}

// sign(x) * t / (t + 1), t = (exp(2|x|) - 1) / 2
template <class V>
FUSEDRNN_HD V tanh(V x) {
  using C = ExpConstants<ScalarOf<V>>;
  using S = ScalarOf<V>;
  const IntOf<V> sign = bits_as<IntOf<V>>(x) & bits_as<IntOf<V>>(-V{});
  const V magnitude = at_most(V{} + C::tanh_saturation, bits_as<V>(bits_as<IntOf<V>>(x) ^ sign));
  const ReducedExp<V> e = reduced_exp<V>(magnitude + magnitude, S(0.5));
  const V t = e.scale * e.expm1_r + (e.scale - S(0.5));
  const V sum = t + S(1);
  const V quotient = t / sum;
  // Three roundings in a row would be more than 2 ULP near zero: what the sum has lost is put right
  // to first order. 1 / sum is 1 - quotient; its square is as good there, and vanishes where the
  // sum is so large that `lost` is itself rounded.
  const V lost = t - (sum - S(1));
  const V inverse = S(1) - quotient;
  const V result = quotient - (quotient * lost) * (inverse * inverse);
  return bits_as<V>(bits_as<IntOf<V>>(result) | sign);
}

FUSEDRNN_ISA_END
