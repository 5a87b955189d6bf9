// The elements of a row that a thread holds in registers, and how they get there and back. Dtypes matter in this file alone.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <float.h>
#include <math.h>

#include <type_traits>

#include "d2_cuda_in_flight.h"
#include "d2_step.h"
#include "philox.h"

namespace r2d2 {

// A row in memory: `classes` elements, then padding up to `width` that may be overwritten.
struct RowAt {
  char* data;
  DType dtype;
  int classes, width;
};

// Which elements thread `rank` of kThreads has: vectors of kVector elements, those of neighbouring threads side by side. All rows of
// one step share the mapping, so that a class is in one thread. kVector is 4 where every row begins at a multiple of 4 elements (16
// bytes of float32, 8 of the other dtypes) and all are a multiple of 4 long; elsewhere it is 1.
template <int kThreads, int kElements, int kVector>
struct Slice {
  static_assert(kVector == 1 || kVector == 4, "vectors of one element or four");
  static constexpr int kSpan = kThreads * kElements;
  int rank, begin;

  __device__ __forceinline__ int position(int k) const {
    return begin + ((k / kVector) * kThreads + rank) * kVector + k % kVector;
  }
};

// ------------------------------------------------------------------------------------------- memory → registers

// A thread's elements of a row as they lie in memory, on their way. A vector has the same registers for every dtype, so that no
// branch on a dtype has to wait for them.
template <int kElements, int kVector>
struct Fetched {
  using Words = std::conditional_t<kVector == 4, uint4, uint32_t>;
  InFlight<Words> vectors[kElements / kVector];
};

template <int kThreads, int kElements, int kVector>
__device__ __forceinline__ Fetched<kElements, kVector> fetch(const RowAt& row, const Slice<kThreads, kElements, kVector>& slice) {
  using Words = typename Fetched<kElements, kVector>::Words;
  using Halves = std::conditional_t<kVector == 4, uint2, uint16_t>;
  Fetched<kElements, kVector> fetched;
  if (row.dtype == DType::float32) {
#pragma unroll
    for (int k = 0; k < kElements; k += kVector)
      if (const int at = slice.position(k); at < row.classes)
        fetched.vectors[k / kVector] = InFlight<Words>(reinterpret_cast<const Words*>(row.data + int64_t(at) * 4));
  } else {
#pragma unroll
    for (int k = 0; k < kElements; k += kVector)
      if (const int at = slice.position(k); at < row.classes)
        fetched.vectors[k / kVector] = InFlight<Words>(reinterpret_cast<const Halves*>(row.data + int64_t(at) * 2));
  }
  return fetched;
}

__device__ __forceinline__ float from_bfloat16(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
__device__ __forceinline__ float from_float16(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ uint16_t to_bfloat16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ __forceinline__ uint16_t to_float16(float x) { return __half_as_ushort(__float2half_rn(x)); }

// Floats from vectors that have arrived, where `convert` makes one of element e.
template <int kElements, int kVector, class F>
__device__ __forceinline__ void convert_each(const Fetched<kElements, kVector>& fetched, float (&out)[kElements], F convert) {
#pragma unroll
  for (int k = 0; k < kElements; k += kVector) {
    const auto words = fetched.vectors[k / kVector].get();
    if constexpr (kVector == 4) {
      const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) out[k + e] = convert(word, e);
    } else {
      out[k] = convert(&words, 0);
    }
  }
}

// out ← a thread's elements, −∞ for those past the row.
template <int kThreads, int kElements, int kVector>
__device__ __forceinline__ void arrive(const Fetched<kElements, kVector>& fetched, const RowAt& row,
                                       const Slice<kThreads, kElements, kVector>& slice, float (&out)[kElements]) {
  const auto half = [](const uint32_t* word, int e) { return uint16_t(word[e / 2] >> (16 * (e % 2))); };
  if (row.dtype == DType::float32)
    convert_each(fetched, out, [](const uint32_t* word, int e) { return __uint_as_float(word[e]); });
  else if (row.dtype == DType::bfloat16)
    convert_each(fetched, out, [=](const uint32_t* word, int e) { return from_bfloat16(half(word, e)); });
  else
    convert_each(fetched, out, [=](const uint32_t* word, int e) { return from_float16(half(word, e)); });
#pragma unroll
  for (int k = 0; k < kElements; ++k)
    if (slice.position(k / kVector * kVector) >= row.classes) out[k] = -INFINITY;
}

template <int kThreads, int kElements, int kVector>
__device__ __forceinline__ void load(const RowAt& row, const Slice<kThreads, kElements, kVector>& slice, float (&out)[kElements]) {
  arrive(fetch(row, slice), row, slice, out);
}

// ------------------------------------------------------------------------------------------- registers → memory

template <int kThreads, int kElements, int kVector, class F>
__device__ __forceinline__ void store_halves(const RowAt& row, const Slice<kThreads, kElements, kVector>& slice,
                                             const float (&in)[kElements], F convert) {
#pragma unroll
  for (int k = 0; k < kElements; k += kVector) {
    const int at = slice.position(k);
    if (at >= row.width) continue;
    uint16_t* data = reinterpret_cast<uint16_t*>(row.data) + at;
    if constexpr (kVector == 4)
      *reinterpret_cast<uint2*>(data) = {convert(in[k]) | uint32_t(convert(in[k + 1])) << 16,
                                         convert(in[k + 2]) | uint32_t(convert(in[k + 3])) << 16};
    else
      *data = convert(in[k]);
  }
}

template <int kThreads, int kElements, int kVector>
__device__ __forceinline__ void store(const RowAt& row, const Slice<kThreads, kElements, kVector>& slice,
                                      const float (&in)[kElements]) {
  if (row.dtype == DType::bfloat16) return store_halves(row, slice, in, to_bfloat16);
  if (row.dtype == DType::float16) return store_halves(row, slice, in, to_float16);
#pragma unroll
  for (int k = 0; k < kElements; k += kVector) {
    const int at = slice.position(k);
    if (at >= row.width) continue;
    float* data = reinterpret_cast<float*>(row.data) + at;
    if constexpr (kVector == 4)
      *reinterpret_cast<float4*>(data) = {in[k], in[k + 1], in[k + 2], in[k + 3]};
    else
      *data = in[k];
  }
}

// ------------------------------------------------------------------------------------------- rounding of a 16-bit bank

// Up in magnitude with the probability that the dropped bits say (r2d2fast/rounding.py).
__device__ __forceinline__ float round_up_or_down(float x, uint32_t bits, DType dtype) {
  if (dtype == DType::float16 && fabsf(x) < 0x1p-14f)  // a subnormal: the spacing stays 2^-24
    return copysignf(floorf(fabsf(x) * 0x1p24f + float(bits) * 0x1p-16f) * 0x1p-24f, x);
  const uint32_t mask = dtype == DType::float16 ? 0x1FFFu : 0xFFFFu;
  return __uint_as_float((__float_as_uint(x) + (bits & mask)) & ~mask);
}

template <int kElements>
__device__ __forceinline__ void clamp(float (&values)[kElements], float largest) {
#pragma unroll
  for (int k = 0; k < kElements; ++k) values[k] = fminf(fmaxf(values[k], -largest), largest);
}

// Cuts values to the dtype's range, and rounds stochastically if the bank does, by the counter `updates`; `row_start` is the number of
// the row's first element.
template <int kThreads, int kElements, int kVector>
__device__ __forceinline__ void round_to_bank(const Bank& bank, int64_t updates, uint64_t row_start,
                                              const Slice<kThreads, kElements, kVector>& slice, float (&values)[kElements]) {
  const float largest = bank.dtype == DType::float16 ? 65504.0f : bank.dtype == DType::bfloat16 ? 0x1.FEp127f : FLT_MAX;
  clamp(values, largest);
  if (!bank.stochastic) return;
#pragma unroll
  for (int k = 0; k < kElements; k += kVector) {
    // Eight elements share a block of random words: a vector of four is a half of them, because its rows are a multiple of four long.
    const uint64_t first = row_start + slice.position(k);
    const Philox random(first >> 3, updates, bank.seed);
#pragma unroll
    for (int e = 0; e < kVector; ++e)
      values[k + e] = round_up_or_down(values[k + e], random.bits(int(first & 7) + e), bank.dtype);
  }
  clamp(values, largest);
}

}  // namespace r2d2
