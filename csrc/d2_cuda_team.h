// The threads that share a row: a part of a warp, a warp, or a block.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "d2_cuda_in_flight.h"

namespace r2d2 {

struct Add {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }  // ignores NaN
};

struct Min {
  __device__ __forceinline__ int operator()(int a, int b) const { return a < b ? a : b; }
};

template <int kThreadsOfTeam>
class Team {
 public:
  static constexpr int kThreads = kThreadsOfTeam;
  static constexpr int kBlock = kThreads > 128 ? kThreads : 128;  // threads of a block
  static constexpr int kRows = kBlock / kThreads;                 // teams of a block

  __device__ Team() : rank(threadIdx.x % kThreads), number(threadIdx.x / kThreads) {
    if constexpr (kThreads < 32) mask_ = ((1u << kThreads) - 1) << (threadIdx.x % 32 / kThreads * kThreads);
  }

  const int rank;    // of this thread in its team
  const int number;  // of the team in its block

  // Combines each of the values over the team, in one fixed order, and gives every thread the result. All threads must call it.
  template <class T, int kCount, class Op>
  __device__ __forceinline__ void reduce(T (&values)[kCount], Op op) {
#pragma unroll
    for (int offset = (kThreads < 32 ? kThreads : 32) / 2; offset > 0; offset /= 2)
#pragma unroll
      for (int c = 0; c < kCount; ++c) values[c] = op(values[c], __shfl_xor_sync(mask_, values[c], offset));
    if constexpr (kThreads > 32) {
      constexpr int kWarps = kThreads / 32;
      // There are two copies, used in turn: the barrier of the reduction in between keeps a fast warp from overwriting what a
      // slow one still reads.
      __shared__ T partial[2][kCount][kWarps];
      if (threadIdx.x % 32 == 0)
#pragma unroll
        for (int c = 0; c < kCount; ++c) partial[turn_][c][threadIdx.x / 32] = values[c];
      __syncthreads();
      InFlight<T> of_warps[kCount];
#pragma unroll
      for (int c = 0; c < kCount; ++c) of_warps[c] = InFlight<T>(&partial[turn_][c][threadIdx.x % kWarps]);
#pragma unroll
      for (int c = 0; c < kCount; ++c) values[c] = of_warps[c].get();
#pragma unroll
      for (int offset = kWarps / 2; offset > 0; offset /= 2)
#pragma unroll
        for (int c = 0; c < kCount; ++c) values[c] = op(values[c], __shfl_xor_sync(mask_, values[c], offset));
      turn_ ^= 1;
    }
  }

  template <class T, class Op>
  __device__ __forceinline__ T reduce(T value, Op op) {
    T values[1] = {value};
    reduce(values, op);
    return values[0];
  }

  // Orders what the threads of a part of a warp read and write. After a reduction a block's are ordered already.
  __device__ __forceinline__ void order() const {
    if constexpr (kThreads <= 32) __syncwarp(mask_);
  }

  // Two means to make the compiler need fewer registers, for teams of whole warps. Without them a thread with 16 or 32 elements
  // spills (sm_90, 32 elements: 5 KB).

  // Returns the same value, in a way that the compiler cannot see through. Otherwise it would keep what it has computed from
  // that value for every element until the next time it is wanted, where computing it again is cheaper.
  __device__ __forceinline__ int opaque(int value) const {
    asm volatile("" : "+r"(value));  // a statement that may have changed it, as far as the compiler knows
    return value;
  }
  __device__ __forceinline__ float opaque(float value) const { return __int_as_float(opaque(__float_as_int(value))); }
  // No instruction moves across this, so that only the elements before it or those after it are worked on at a time.
  __device__ __forceinline__ void scheduling_barrier() const { __syncwarp(); }

 private:
  unsigned mask_ = 0xFFFFFFFFu;
  int turn_ = 0;
};

}  // namespace r2d2
