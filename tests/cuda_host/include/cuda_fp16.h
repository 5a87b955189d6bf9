// __half as bits, and its conversions.
#pragma once

#include "cuda_runtime.h"

struct __half {
  unsigned short bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }

inline float __half2float(__half h) {
  const unsigned sign = (h.bits & 0x8000u) << 16, exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  if (exponent == 31) return __uint_as_float(sign | 0x7F800000u | fraction << 13 | (fraction ? 0x400000u : 0u));
  if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
  return copysignf(float(fraction) * 0x1p-24f, __uint_as_float(sign));
}

inline __half __float2half_rn(float value) {
  const unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, size = bits & 0x7FFFFFFFu;
  if (size > 0x7F800000u) return {0x7FFF};
  if (size >= 0x477FF000u) return {(unsigned short)(sign | 0x7C00u)};  // 65520: halfway from the largest to infinity
  unsigned half;
  if (size < 0x38800000u)  // subnormal: adding 0.5 leaves units of 2^-24 in the last place, rounded by the addition
    half = __float_as_uint(__uint_as_float(size) + 0.5f) - 0x3F000000u;
  else
    half = (size + 0xFFFu + (size >> 13 & 1) - (112u << 23)) >> 13;
  return {(unsigned short)(sign | half)};
}
