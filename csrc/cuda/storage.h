// What values are kept as in a GPU's memory, and what they are computed as.
//
// Half precision is converted where it is loaded and stored, and nowhere else: by the GPU's own
// instructions there, by plain arithmetic on bits on a host, which then gives the same values.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "isa_namespace.h"

#ifdef __CUDACC__
  #include <cuda_bf16.h>
  #include <cuda_fp16.h>
#endif

namespace fusedrnn {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The type of the arithmetic on values kept as E: float or double.
template <class E>
using Arithmetic = std::conditional_t<std::is_same_v<E, double>, double, float>;

// ---- a host's conversions; rounding is to nearest, ties to even ---------------------------------

namespace host {

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float widen(BFloat16 value) { return float_of_bits(uint32_t(value.bits) << 16); }

inline float widen(Half value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  const uint32_t rest = value.bits & 0x7fff;
  if (rest >= 0x7c00) return float_of_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // inf, NaN
  if (rest < 0x400) {  // zero and subnormals: a whole number of 2^-24
    const float magnitude = static_cast<float>(rest) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return float_of_bits(sign | ((rest << 13) + (uint32_t(127 - 15) << 23)));
}

inline BFloat16 round_to_bfloat16(float value) {
  const uint32_t bits = bits_of_float(value);
  if (value != value) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline Half round_to_half(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return {0x7fff};
  if (rest >= 0x47800000) return {static_cast<uint16_t>(sign | 0x7c00)};  // 2^16 and above
  if (rest < 0x38800000) {
    // Below 2^-14: adding 0.5 leaves the number of 2^-24 in the last bits, rounded by the addition.
    const uint32_t count = bits_of_float(float_of_bits(rest) + 0.5f) - bits_of_float(0.5f);
    return {static_cast<uint16_t>(sign | count)};
  }
  const uint32_t rounded = rest - (uint32_t(127 - 15) << 23) + 0xfff + (rest >> 13 & 1);
  return {static_cast<uint16_t>(sign | rounded >> 13)};  // may carry into infinity
}

}  // namespace host

FUSEDRNN_HD uint32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  return host::bits_of_float(value);
#endif
}
FUSEDRNN_HD float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  return host::float_of_bits(bits);
#endif
}

// A float rounded to the 11 of its 24 bits that tensor cores take, and what is left, of either
// sign, of which they take 11 of 12. The two add up to the float. A NaN stays one in what is left.
FUSEDRNN_HD uint32_t tf32_head(uint32_t bits) { return (bits + 0x1000u) & 0xFFFFE000u; }
FUSEDRNN_HD uint32_t tf32_tail(uint32_t bits) {
  return bits_of(float_of(bits) - float_of(tf32_head(bits)));
}

// ---- load and store -----------------------------------------------------------------------------

FUSEDRNN_HD float load(const float* from) { return *from; }
FUSEDRNN_HD double load(const double* from) { return *from; }
FUSEDRNN_HD void store(float* to, float value) { *to = value; }
FUSEDRNN_HD void store(double* to, double value) { *to = value; }

FUSEDRNN_HD float load(const BFloat16* from) {
#ifdef __CUDA_ARCH__
  return __bfloat162float(__ushort_as_bfloat16(from->bits));
#else
  return host::widen(*from);
#endif
}

FUSEDRNN_HD float load(const Half* from) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(from->bits));
#else
  return host::widen(*from);
#endif
}

FUSEDRNN_HD void store(BFloat16* to, float value) {
#ifdef __CUDA_ARCH__
  to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  *to = host::round_to_bfloat16(value);
#endif
}

FUSEDRNN_HD void store(Half* to, float value) {
#ifdef __CUDA_ARCH__
  to->bits = __half_as_ushort(__float2half_rn(value));
#else
  *to = host::round_to_half(value);
#endif
}

}  // namespace fusedrnn
