// The elements of a row that a thread holds in registers, and how they get there and back. Dtypes matter in this file alone.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <float.h>
#include <math.h>

#include "d2_step.h"
#include "philox.h"

namespace r2d2 {

// A row in memory: `classes` elements, then padding up to `width` that may be overwritten.
struct RowAt {
  char* data;
  DType dtype;
  int classes, width;

  // Elements since the last address divisible by `bytes`.
  __device__ int misalignment(int elements) const {
    const int size = int(element_size(dtype));
    return int(uintptr_t(data) % uintptr_t(elements * size)) / size;
  }
};

// Vectors have eight elements or four, as many as are one access of 16 bytes in the wider of the two dtypes.
enum class Access { scalar = 1, four = 4, eight = 8 };

// Element k of thread `rank` of kThreads. All rows of one step share the mapping, so that a class is in one thread.
template <int kThreads, int kElements>
struct Slice {
  static constexpr int kSpan = kThreads * kElements;
  Access access;
  int head;  // elements of the first vector that lie before the row
  int rank, begin;

  template <int kVector>
  __device__ __forceinline__ int position(int k) const {
    return begin + ((k / kVector) * kThreads + rank) * kVector + k % kVector - head;
  }
};

// Where all rows are alike misaligned, that of the bank too, accesses are vectors but for the head and the tail. Elsewhere
// neighbouring threads take neighbouring elements, one by one. The team has room for `capacity` elements.
template <int kThreads, int kElements>
__device__ Slice<kThreads, kElements> choose_slice(int rank, int capacity, const RowAt& logits, const RowAt& grad,
                                                const RowAt* pseudo) {
  const bool narrow = logits.dtype != DType::float32 && (!pseudo || pseudo->dtype != DType::float32);
  const int vector = narrow ? 8 : 4;
  const int head = logits.misalignment(vector);
  const bool alike = grad.misalignment(vector) == head && (!pseudo || pseudo->misalignment(vector) == head);
  if (!alike || logits.classes + head > capacity) return {Access::scalar, 0, rank, 0};
  return {Access(vector), head, rank, 0};
}

// ------------------------------------------------------------------------------------------- memory ↔ raw elements

template <int kBytes>
struct Raw;
template <>
struct Raw<16> {
  using type = uint4;
};
template <>
struct Raw<8> {
  using type = uint2;
};

// raw[k] ← element k, 0 for those past the row. E: uint32_t or uint16_t.
template <class E, int kVector, int kThreads, int kElements>
__device__ __forceinline__ void read_raw(const RowAt& row, const Slice<kThreads, kElements>& slice, E (&raw)[kElements]) {
  using Vector = typename Raw<kVector * sizeof(E)>::type;
  const E* data = reinterpret_cast<const E*>(row.data);
  union Pack {
    Vector vector;
    E element[kVector];
  };
#pragma unroll
  for (int k = 0; k < kElements; k += kVector) {
    const int first = slice.template position<kVector>(k);
    Pack pack = {};
    if (first >= 0 && first + kVector <= row.width) pack.vector = *reinterpret_cast<const Vector*>(data + first);
#pragma unroll
    for (int e = 0; e < kVector; ++e) raw[k + e] = pack.element[e];
  }
  if (slice.head == 0 && row.width % kVector == 0) return;
#pragma unroll
  for (int k = 0; k < kElements; ++k) {
    const int first = slice.template position<kVector>(k / kVector * kVector), at = first + k % kVector;
    const bool whole = first >= 0 && first + kVector <= row.width;
    if (!whole && at >= 0 && at < row.classes) raw[k] = data[at];
  }
}

template <class E, int kThreads, int kElements>
__device__ __forceinline__ void read_raw_scalar(const RowAt& row, const Slice<kThreads, kElements>& slice, E (&raw)[kElements]) {
  const E* data = reinterpret_cast<const E*>(row.data);
#pragma unroll
  for (int k = 0; k < kElements; ++k) {
    const int at = slice.template position<1>(k);
    raw[k] = at < row.classes ? data[at] : E(0);
  }
}

template <class E, int kVector, int kThreads, int kElements>
__device__ __forceinline__ void write_raw(const RowAt& row, const Slice<kThreads, kElements>& slice, const E (&raw)[kElements]) {
  using Vector = typename Raw<kVector * sizeof(E)>::type;
  E* data = reinterpret_cast<E*>(row.data);
  union Pack {
    Vector vector;
    E element[kVector];
  };
#pragma unroll
  for (int k = 0; k < kElements; k += kVector) {
    const int first = slice.template position<kVector>(k);
    Pack pack;
#pragma unroll
    for (int e = 0; e < kVector; ++e) pack.element[e] = raw[k + e];
    if (first >= 0 && first + kVector <= row.width) *reinterpret_cast<Vector*>(data + first) = pack.vector;
  }
  if (slice.head == 0 && row.width % kVector == 0) return;
#pragma unroll
  for (int k = 0; k < kElements; ++k) {
    const int first = slice.template position<kVector>(k / kVector * kVector), at = first + k % kVector;
    const bool whole = first >= 0 && first + kVector <= row.width;
    if (!whole && at >= 0 && at < row.width) data[at] = raw[k];
  }
}

template <class E, int kThreads, int kElements>
__device__ __forceinline__ void write_raw_scalar(const RowAt& row, const Slice<kThreads, kElements>& slice,
                                                 const E (&raw)[kElements]) {
  E* data = reinterpret_cast<E*>(row.data);
#pragma unroll
  for (int k = 0; k < kElements; ++k) {
    const int at = slice.template position<1>(k);
    if (at < row.width) data[at] = raw[k];
  }
}

// f(k, position of element k) for every element; the mapping is chosen once, outside of the unrolled loop.
template <int kThreads, int kElements, class F>
__device__ __forceinline__ void for_each(const Slice<kThreads, kElements>& slice, F f) {
  if (slice.access == Access::scalar) {
#pragma unroll
    for (int k = 0; k < kElements; ++k) f(k, slice.template position<1>(k));
  } else if (slice.access == Access::four) {
#pragma unroll
    for (int k = 0; k < kElements; ++k) f(k, slice.template position<4>(k));
  } else {
#pragma unroll
    for (int k = 0; k < kElements; ++k) f(k, slice.template position<8>(k));
  }
}

// ------------------------------------------------------------------------------------------- raw elements ↔ float32

__device__ __forceinline__ float from_bfloat16(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
__device__ __forceinline__ float from_float16(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ uint16_t to_bfloat16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ __forceinline__ uint16_t to_float16(float x) { return __half_as_ushort(__float2half_rn(x)); }

// out ← the row's elements, −∞ for what lies past it.
template <int kThreads, int kElements>
__device__ __forceinline__ void load(const RowAt& row, const Slice<kThreads, kElements>& slice, float (&out)[kElements]) {
  if (row.dtype == DType::float32) {
    uint32_t raw[kElements];
    if (slice.access == Access::scalar)
      read_raw_scalar(row, slice, raw);
    else
      read_raw<uint32_t, 4>(row, slice, raw);
#pragma unroll
    for (int k = 0; k < kElements; ++k) out[k] = __uint_as_float(raw[k]);
  } else {
    uint16_t raw[kElements];
    if (slice.access == Access::scalar)
      read_raw_scalar(row, slice, raw);
    else if (slice.access == Access::four)
      read_raw<uint16_t, 4>(row, slice, raw);
    else
      read_raw<uint16_t, 8>(row, slice, raw);
    if (row.dtype == DType::bfloat16)
#pragma unroll
      for (int k = 0; k < kElements; ++k) out[k] = from_bfloat16(raw[k]);
    else
#pragma unroll
      for (int k = 0; k < kElements; ++k) out[k] = from_float16(raw[k]);
  }
  for_each(slice, [&](int k, int at) {
    if (at < 0 || at >= row.classes) out[k] = -INFINITY;
  });
}

template <int kThreads, int kElements>
__device__ __forceinline__ void store(const RowAt& row, const Slice<kThreads, kElements>& slice, const float (&in)[kElements]) {
  if (row.dtype == DType::float32) {
    uint32_t raw[kElements];
#pragma unroll
    for (int k = 0; k < kElements; ++k) raw[k] = __float_as_uint(in[k]);
    if (slice.access == Access::scalar)
      write_raw_scalar(row, slice, raw);
    else
      write_raw<uint32_t, 4>(row, slice, raw);
  } else {
    uint16_t raw[kElements];
    if (row.dtype == DType::bfloat16)
#pragma unroll
      for (int k = 0; k < kElements; ++k) raw[k] = to_bfloat16(in[k]);
    else
#pragma unroll
      for (int k = 0; k < kElements; ++k) raw[k] = to_float16(in[k]);
    if (slice.access == Access::scalar)
      write_raw_scalar(row, slice, raw);
    else if (slice.access == Access::four)
      write_raw<uint16_t, 4>(row, slice, raw);
    else
      write_raw<uint16_t, 8>(row, slice, raw);
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

// Rounds the elements of vectors that start at `row_start` + position. Two blocks of random words serve a whole vector.
template <int kVector, int kThreads, int kElements>
__device__ __forceinline__ void round_vectors(const Bank& bank, uint64_t row_start, const Slice<kThreads, kElements>& slice,
                                              float (&values)[kElements]) {
  const uint64_t step = uint64_t(*bank.updates);
#pragma unroll
  for (int k = 0; k < kElements; k += kVector) {
    const uint64_t first = row_start + uint64_t(int64_t(slice.template position<kVector>(k)));
#pragma unroll
    for (int block = 0; block < (kVector > 1 ? 2 : 1); ++block) {
      if (block == 1 && int(first & 7) + kVector <= 8) continue;
      const Philox random((first >> 3) + block, step, bank.seed);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const int piece = int(first & 7) + e - 8 * block;
        if (piece >= 0 && piece < 8) values[k + e] = round_up_or_down(values[k + e], random.bits(piece), bank.dtype);
      }
    }
  }
}

template <int kElements>
__device__ __forceinline__ void clamp(float (&values)[kElements], float largest) {
#pragma unroll
  for (int k = 0; k < kElements; ++k) values[k] = fminf(fmaxf(values[k], -largest), largest);
}

// Cuts values to the dtype's range, and rounds stochastically if the bank does; `row_start` is the number of the row's first
// element.
template <int kThreads, int kElements>
__device__ __forceinline__ void round_to_bank(const Bank& bank, uint64_t row_start, const Slice<kThreads, kElements>& slice,
                                              float (&values)[kElements]) {
  const float largest = bank.dtype == DType::float16 ? 65504.0f : bank.dtype == DType::bfloat16 ? 0x1.FEp127f : FLT_MAX;
  clamp(values, largest);
  if (!bank.stochastic) return;
  if (slice.access == Access::scalar)
    round_vectors<1>(bank, row_start, slice, values);
  else if (slice.access == Access::four)
    round_vectors<4>(bank, row_start, slice, values);
  else
    round_vectors<8>(bank, row_start, slice, values);
  clamp(values, largest);
}

}  // namespace r2d2
