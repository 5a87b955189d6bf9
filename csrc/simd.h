// Vectors of float for the instruction set this file is compiled for, written with the vector extensions that GCC and
// Clang share: 16 lanes with AVX-512, 8 with AVX2, else 4 (SSE2, NEON, or scalar code). Everything here has internal
// linkage: the translation units of the several instruction sets must not share one out-of-line copy.
#pragma once

#include <float.h>
#include <stdint.h>
#include <string.h>

#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace r2d2 {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UintVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));

inline Vec splat(float x) { return Vec{} + x; }

template <class T>
inline T read(const void* p) {
  T v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void write(void* p, T v) {
  memcpy(p, &v, sizeof v);
}

// How many lanes a load or store touches: all, or the first so many, of which there is one of each at the end of a row.
struct AllLanes {};
struct FirstLanes {
  int count;
};

inline Vec load_lanes(const float* p, AllLanes) { return read<Vec>(p); }
inline void store_lanes(float* p, Vec v, AllLanes) { write(p, v); }

#if defined(__AVX2__) && !defined(__AVX512F__)
inline __m256i mask_of(FirstLanes first) { return (__m256i)(IntVec{0, 1, 2, 3, 4, 5, 6, 7} < first.count); }
#endif

// The other lanes are 0, and their memory is not touched.
inline Vec load_lanes(const float* p, FirstLanes first) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(__mmask16((1u << first.count) - 1), p);
#elif defined(__AVX2__)
  return _mm256_maskload_ps(p, mask_of(first));
#else
  Vec v{};
  memcpy(&v, p, first.count * sizeof(float));
  return v;
#endif
}

inline void store_lanes(float* p, Vec v, FirstLanes first) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, __mmask16((1u << first.count) - 1), v);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(p, mask_of(first), v);
#else
  memcpy(p, &v, first.count * sizeof(float));
#endif
}

// Where a lane of a is NaN: b. The instruction's own semantics; `a > b ? a : b` becomes a compare and a blend in GCC 12.
inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// Lane i of the result is lane Lanes::at(i) of a, from kLanes on lane at(i) − kLanes of b. The lane numbers are template
// arguments because GCC 12 assembles a mask that it only could fold at run time, one lane after another.
template <class Lanes, int... i>
inline Vec shuffle(Vec a, Vec b, std::integer_sequence<int, i...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Lanes::at(i)...);
#else
  return __builtin_shuffle(a, b, IntVec{Lanes::at(i)...});
#endif
}

template <class Lanes>
inline Vec shuffle(Vec a, Vec b) {
  return shuffle<Lanes>(a, b, std::make_integer_sequence<int, kLanes>{});
}

template <int kDistance>
struct Swapped {
  static constexpr int at(int i) { return i ^ kDistance; }
};

// Blocks of kSize lanes, alternately from the first and the second vector: the even ones of both, or the odd ones.
template <int kSize>
struct Even {
  static constexpr int at(int i) { return i & kSize ? kLanes + i - kSize : i; }
};
template <int kSize>
struct Odd {
  static constexpr int at(int i) { return i & kSize ? kLanes + i : i + kSize; }
};

template <int kDistance = kLanes / 2>
inline float reduce_add(Vec v) {
  v += shuffle<Swapped<kDistance>>(v, v);
  if constexpr (kDistance > 1) return reduce_add<kDistance / 2>(v);
  return v[0];
}

template <int kDistance = kLanes / 2>
inline float reduce_max(Vec v) {
  v = max(v, shuffle<Swapped<kDistance>>(v, v));
  if constexpr (kDistance > 1) return reduce_max<kDistance / 2>(v);
  return v[0];
}

// rows[i] lane j ↔ rows[j] lane i, in log2 kLanes rounds that each swap off-diagonal blocks of one size.
template <int kSize = 1>
inline void transpose(Vec* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kSize) continue;
    const Vec a = rows[i], b = rows[i + kSize];
    rows[i] = shuffle<Even<kSize>>(a, b);
    rows[i + kSize] = shuffle<Odd<kSize>>(a, b);
  }
  if constexpr (2 * kSize < kLanes) transpose<2 * kSize>(rows);
}

// exp x for x ≤ 0: 2^n·2^f with n the nearest integer to x·log2 e. n is read off the low bits of x·log2 e + 1.5·2^23, and
// f = x·log2 e − n is exact but for the last rounding (FMA) and the 2e-8 by which the float constant misses log2 e. The
// polynomial's relative error is 1.6e-8, an eighth of an ulp. Below ln(FLT_MIN) the result is exactly 0, so that 0·x stays
// 0 for any finite x.
//
// Several at once, step by step, so that no chain waits for itself: a quarter off the step at 1024 x 1000 with the bank in
// cache (Zen 3).
template <int K>
inline void exp(const Vec (&x)[K], Vec (&y)[K]) {
  constexpr float kLog2E = 1.44269504f, kShift = 12582912.0f, kLowest = -87.33654f;
  Vec shifted[K], f[K];
#define R2D2_EACH _Pragma("GCC unroll 8") for (int k = 0; k < K; ++k)
  R2D2_EACH shifted[k] = x[k] * kLog2E + kShift;
  R2D2_EACH f[k] = x[k] * kLog2E - (shifted[k] - kShift);
  R2D2_EACH y[k] = f[k] * 0.00015353362f + 0.0013398875f;
  R2D2_EACH y[k] = y[k] * f[k] + 0.009618437f;
  R2D2_EACH y[k] = y[k] * f[k] + 0.055503324f;
  R2D2_EACH y[k] = y[k] * f[k] + 0.24022648f;
  R2D2_EACH y[k] = y[k] * f[k] + 0.6931472f;
  R2D2_EACH y[k] = y[k] * f[k] + 1.0f;
  // Unsigned: below kLowest the sum wraps.
  R2D2_EACH y[k] = (Vec)(((UintVec)y[k] + ((UintVec)shifted[k] << 23)) & (UintVec)(x[k] > splat(kLowest)));
#undef R2D2_EACH
}

// log x for finite x ≥ FLT_MIN: k·ln 2 + log(1 + r), 1 + r in [√½, √2); the polynomial's relative error is 6e-9.
inline Vec log(Vec x) {
  const IntVec bits = (IntVec)x - 0x3f3504f3;  // √½
  const IntVec exponent = bits >> 23;
  const Vec k = __builtin_convertvector(exponent, Vec);
  const Vec r = (Vec)((UintVec)x - ((UintVec)exponent << 23)) - 1.0f;
  Vec y = splat(-0.076345004f);
  y = y * r + 0.1276158f;
  y = y * r - 0.13160183f;
  y = y * r + 0.14201757f;
  y = y * r - 0.16623357f;
  y = y * r + 0.20001227f;
  y = y * r - 0.2500082f;
  y = y * r + 0.3333333f;
  const Vec r2 = r * r;
  y = y * r * r2 - 0.5f * r2;
  return k * 0.693359375f + (r + (y - k * 2.12194440e-4f));  // ln 2 in two parts: k times the first is exact
}

// ------------------------------------------------------------------------------------------- 16-bit floats

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "a cast between types of one size");
  return read<To>(&x);
}

inline float to_float(float x) { return x; }

inline float to_float(Bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

inline float to_float(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = uint32_t(x.bits & 0x7fffu) << 13;
  uint32_t bits = rest + 0x38000000u;                                                 // rebias the exponent by 112
  if (rest >= 0x0f800000u) bits = rest + 0x70000000u;                                 // infinity, NaN
  if (rest < 0x00800000u) bits = bit_cast<uint32_t>(float(rest >> 13) * 0x1p-24f);    // subnormal, zero
  return bit_cast<float>(sign | bits);
}

template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) { return x; }

template <>
inline Bfloat16 from_float<Bfloat16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return {uint16_t((bits >> 16) | 0x40u)};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
inline Float16 from_float<Float16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};   // NaN
  if (rest >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to infinity
  if (rest < 0x38800000u)  // subnormal, in units of 2^-24: the ulp of ½, so that the addition rounds
    return {uint16_t(sign | (bit_cast<uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3f000000u))};
  return {uint16_t(sign | ((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13))};
}

template <class T>
inline Vec load(const T* p);

template <>
inline Vec load<float>(const float* p) { return read<Vec>(p); }

template <>
inline Vec load<Bfloat16>(const Bfloat16* p) {
  return (Vec)(__builtin_convertvector(read<HalfVec>(p), UintVec) << 16);
}

template <>
inline Vec load<Float16>(const Float16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(read<__m256i>(p));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(read<__m128i>(p));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

template <class T>
inline void store(T* p, Vec v);

template <>
inline void store<float>(float* p, Vec v) { write(p, v); }

template <>
inline void store<Bfloat16>(Bfloat16* p, Vec v) {
  const UintVec bits = (UintVec)v;
  const UintVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  write(p, __builtin_convertvector((v == v) ? rounded : (bits >> 16) | 0x40, HalfVec));
}

template <>
inline void store<Float16>(Float16* p, Vec v) {
#if defined(__AVX512F__)
  write(p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  write(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<Float16>(v[i]);
#endif
}

template <class T>
constexpr float kLargest = FLT_MAX;
template <>
constexpr float kLargest<Bfloat16> = 0x1.fep127f;
template <>
constexpr float kLargest<Float16> = 65504.0f;

}  // namespace
}  // namespace r2d2
