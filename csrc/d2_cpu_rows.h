// The row kernels, compiled once for each instruction set (d2_cpu_portable.cpp, _avx2.cpp, _avx512.cpp).
//
// All arithmetic is float32. A dtype matters only where a row is read into scratch and written from it.
#pragma once

#include <math.h>
#include <stdlib.h>

#include "d2_cpu.h"
#include "philox.h"
#include "simd.h"

namespace r2d2 {
namespace {

// ------------------------------------------------------------------------------------------- rows in and out: one dtype a row

struct RowIO {
  float (*read_row)(const void* row, float* out, int64_t n);  // returns the largest element, NaN aside
  void (*write_row)(void* row, const float* in, int64_t n);
  void (*round_row)(void* row, const float* in, int64_t n, uint64_t element, uint64_t step, uint64_t seed);
  void (*read_tile)(const void* const* rows, float* tile, int64_t n);  // tile[j·kLanes + lane], one row a lane
  void (*write_tile)(void* const* rows, const float* tile, int64_t n);  // null rows are left out
  float largest;
};

template <class T>
float read_row(const void* row, float* out, int64_t n) {
  const T* in = static_cast<const T*>(row);
  Vec largest = splat(-INFINITY);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const Vec x = load(in + j);
    if (static_cast<const void*>(out) != row) store(out + j, x);
    largest = max(x, largest);
  }
  float m = reduce_max(largest);
  for (; j < n; ++j) {
    const float x = to_float(in[j]);
    if (static_cast<const void*>(out) != row) out[j] = x;
    m = x > m ? x : m;
  }
  return m;
}

template <class T>
void write_row(void* row, const float* in, int64_t n) {
  T* out = static_cast<T*>(row);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store(out + j, load(in + j));
  for (; j < n; ++j) out[j] = from_float<T>(in[j]);
}

// f(j) for blocks of kLanes classes that cover n; the last one overlaps the one before, so that no row is overrun.
template <class F>
inline void for_each_block(int64_t n, F f) {
  for (int64_t j = 0; j + kLanes < n; j += kLanes) f(j);
  f(n - kLanes);
}

template <class T>
void read_tile(const void* const* rows, float* tile, int64_t n) {
  if (n < kLanes) {
    for (int lane = 0; lane < kLanes; ++lane)
      for (int64_t j = 0; j < n; ++j) tile[j * kLanes + lane] = to_float(static_cast<const T*>(rows[lane])[j]);
    return;
  }
  for_each_block(n, [&](int64_t j) {
    Vec block[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) block[lane] = load(static_cast<const T*>(rows[lane]) + j);
    transpose(block);
    for (int i = 0; i < kLanes; ++i) store(tile + (j + i) * kLanes, block[i]);
  });
}

template <class T>
void write_tile(void* const* rows, const float* tile, int64_t n) {
  if (n < kLanes) {
    for (int lane = 0; lane < kLanes; ++lane)
      for (int64_t j = 0; rows[lane] && j < n; ++j) static_cast<T*>(rows[lane])[j] = from_float<T>(tile[j * kLanes + lane]);
    return;
  }
  for_each_block(n, [&](int64_t j) {
    Vec block[kLanes];
    for (int i = 0; i < kLanes; ++i) block[i] = load(tile + (j + i) * kLanes);
    transpose(block);
    for (int lane = 0; lane < kLanes; ++lane)
      if (rows[lane]) store(static_cast<T*>(rows[lane]) + j, block[lane]);
  });
}

// Up in magnitude with the probability that the dropped bits say; `in` is within the dtype's range (see rounding.py).
template <class T, int kDropped>
void round_row(void* row, const float* in, int64_t n, uint64_t element, uint64_t step, uint64_t seed) {
  constexpr uint32_t kMask = (1u << kDropped) - 1;
  T* out = static_cast<T*>(row);
  int64_t j = 0;
  while (j < n) {
    const Philox random(element >> 3, step, seed);
    for (int piece = element & 7; piece < 8 && j < n; ++piece, ++element, ++j) {
      const uint32_t bits = random.bits(piece);
      float x = in[j];
      if (kDropped == 13 && fabsf(x) < 0x1p-14f)  // a float16 subnormal: the spacing stays 2^-24
        x = copysignf(floorf(fabsf(x) * 0x1p24f + float(bits) * 0x1p-16f) * 0x1p-24f, x);
      else
        x = bit_cast<float>((bit_cast<uint32_t>(x) + (bits & kMask)) & ~kMask);
      out[j] = from_float<T>(x > kLargest<T> ? kLargest<T> : x < -kLargest<T> ? -kLargest<T> : x);
    }
  }
}

// A bank saturates at its largest number.
constexpr RowIO kRowIO[] = {
    {read_row<float>, write_row<float>, nullptr, read_tile<float>, write_tile<float>, FLT_MAX},
    {read_row<Bfloat16>, write_row<Bfloat16>, round_row<Bfloat16, 16>, read_tile<Bfloat16>, write_tile<Bfloat16>,
     kLargest<Bfloat16>},
    {read_row<Float16>, write_row<Float16>, round_row<Float16, 13>, read_tile<Float16>, write_tile<Float16>,
     kLargest<Float16>},
};

// ------------------------------------------------------------------------------------------- lanes are classes

// What the next row will touch.
struct Ahead {
  const char* data;
  int64_t bytes;

  R2D2_INLINE void prefetch(int64_t at) const {
    if (at < bytes) __builtin_prefetch(data + at);
  }
};

// A row in float32, `classes` long.
struct RowView {
  const float *x, *y;  // ŷ, ỹ
  float max_x, max_y;
  float *eu, *ev;  // to hold e^u, e^v, writable up to the next multiple of kLanes
  int64_t classes;
  Ahead pseudo, logits, grad;
};

// f(u, v, offset, lanes) for every vector of the row; lanes past its end get u = v = −200, whose exponential is 0.
template <class F>
inline void for_each_vector(const RowView& r, int64_t begin, int64_t end, F f) {
  const float *const x = r.x, *const y = r.y;
  const Vec max_x = splat(r.max_x), max_y = splat(r.max_y);
  int64_t j = begin;
  for (; j + kLanes <= end; j += kLanes) f(load(x + j) - max_x, load(y + j) - max_y, j, AllLanes{});
  if (j < end) {
    IntVec lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    const IntVec inside = lane < int32_t(end - j);
    const FirstLanes left{int(end - j)};
    f(inside ? load_lanes(x + j, left) - max_x : splat(-200), inside ? load_lanes(y + j, left) - max_y : splat(-200), j, left);
  }
}

// Blocks bound how far a float32 sum drifts (32 equal terms a lane: 2e-6 at worst); their totals are added in float64.
constexpr int64_t kBlock = 32 * kLanes;

template <ClassLoss L, bool kStats>
Sums<float> sum_row(const RowView& r, bool& agreement) {
  double p = 0, q = 0, pu = 0, d = 0;
  Vec both = splat(-INFINITY);
  float *const eu_row = r.eu, *const ev_row = r.ev;
  const Ahead pseudo = r.pseudo, logits = r.logits, grad = r.grad;
  for (int64_t begin = 0; begin < r.classes; begin += kBlock) {
    const int64_t end = begin + kBlock < r.classes ? begin + kBlock : r.classes;
    Sums<Vec> sums;
    for_each_vector(r, begin, end, [&](Vec u, Vec v, int64_t j, auto) {
      // Without this the first touch waits for DRAM: of a bank row always, of the others after a network has run.
      pseudo.prefetch(j * 4), logits.prefetch(j * 4), grad.prefetch(j * 4);
      Vec e[2];
      exp({u, v}, e);
      const Vec eu = e[0], ev = e[1];
      store(eu_row + j, eu);
      store(ev_row + j, ev);
      accumulate<L>(sums, u, v, eu, ev);
      if (kStats) both = max(u + v, both);
    });
    p += reduce_add(sums.p), q += reduce_add(sums.q), pu += reduce_add(sums.pu), d += reduce_add(sums.d);
  }
  agreement = kStats && reduce_max(both) == 0;  // some class attains both maxima
  return {float(p), float(q), float(pu), float(d)};
}

Deviations<float> sum_deviations(const RowView& r, const Sums<float>& sums) {
  double squared = 0, weighted_p = 0, weighted_q = 0;
  const Vec inv_zp = splat(1 / sums.p), inv_zq = splat(1 / sums.q);
  for (int64_t begin = 0; begin < r.classes; begin += kBlock) {
    const int64_t end = begin + kBlock < r.classes ? begin + kBlock : r.classes;
    Deviations<Vec> d;
    for (int64_t j = begin; j < end; j += kLanes)  // past the row's end the exponentials are 0
      accumulate(d, load(r.eu + j) * inv_zp, load(r.ev + j) * inv_zq);
    squared += reduce_add(d.squared), weighted_p += reduce_add(d.weighted_p), weighted_q += reduce_add(d.weighted_q);
  }
  return {float(squared), float(weighted_p), float(weighted_q)};
}

inline Row<Vec> broadcast(const Row<float>& r) {
  return {splat(r.class_loss), splat(r.entropy), splat(r.prediction_confidence), splat(r.pseudo_confidence),
          splat(r.inv_zp), splat(r.inv_zq), splat(r.mean_u), splat(r.mean_d), splat(r.mean_p), splat(r.mean_q),
          splat(r.class_grad), splat(r.entropy_grad), splat(r.pseudo_grad), splat(r.rate_p), splat(r.rate_q)};
}

// grad and moved may be r.eu and r.ev.
template <ClassLoss L, bool kUpdate>
void write_gradient(const RowView& r, const Row<float>& row, const float* y, float largest, float* grad, float* moved) {
  const Row<Vec> c = broadcast(row);
  const Vec limit = splat(largest);
  const float *const eu_row = r.eu, *const ev_row = r.ev;
  for_each_vector(r, 0, r.classes, [&](Vec u, Vec v, int64_t j, auto lanes) {
    const Vec eu = load(eu_row + j), ev = load(ev_row + j);
    const Vec g = gradient<L>(c, u, v, eu, ev), d = kUpdate ? descent<L>(c, u, v, eu, ev) : Vec{};
    store_lanes(grad + j, g, lanes);
    if (kUpdate) store_lanes(moved + j, min(max(load_lanes(y + j, lanes) - d, -limit), limit), lanes);
  });
}

}  // namespace
}  // namespace r2d2
