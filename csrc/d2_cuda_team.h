// The threads that share a row: a part of a warp, a warp, or a block.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace r2d2 {

struct Add {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }  // NaN aside
};

struct Min {
  __device__ __forceinline__ int operator()(int a, int b) const { return a < b ? a : b; }
};

template <int kThreads>
class Team {
 public:
  static constexpr int kBlock = kThreads > 128 ? kThreads : 128;  // threads of a block
  static constexpr int kRows = kBlock / kThreads;                 // teams of a block

  __device__ Team() : rank(threadIdx.x % kThreads) {
    if constexpr (kThreads < 32) mask_ = ((1u << kThreads) - 1) << (threadIdx.x % 32 / kThreads * kThreads);
  }

  const int rank;

  // Combines each of the values over the team, in one fixed order; every thread gets the result. All threads must call.
  template <class T, int kCount, class Op>
  __device__ __forceinline__ void reduce(T (&values)[kCount], Op op) {
#pragma unroll
    for (int offset = (kThreads < 32 ? kThreads : 32) / 2; offset > 0; offset /= 2)
#pragma unroll
      for (int c = 0; c < kCount; ++c) values[c] = op(values[c], __shfl_xor_sync(mask_, values[c], offset));
    if constexpr (kThreads > 32) {
      // Two copies in turn: the barrier of the reduction in between keeps a fast warp from overwriting what a slow one reads.
      __shared__ T partial[2][kCount][kThreads / 32];
      if (threadIdx.x % 32 == 0)
#pragma unroll
        for (int c = 0; c < kCount; ++c) partial[turn_][c][threadIdx.x / 32] = values[c];
      __syncthreads();
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        values[c] = partial[turn_][c][0];
#pragma unroll
        for (int warp = 1; warp < kThreads / 32; ++warp) values[c] = op(values[c], partial[turn_][c][warp]);
      }
      turn_ ^= 1;
    }
  }

  template <class T, class Op>
  __device__ __forceinline__ T reduce(T value, Op op) {
    T values[1] = {value};
    reduce(values, op);
    return values[0];
  }

  // Two means to make the compiler need fewer registers, for teams of whole warps; without them a thread with 16 or 32 elements
  // spills (sm_90, 32 elements: 5 KB).

  // The same value, in a way that the compiler cannot know: it would keep what it has computed from it for every element, for
  // the next time that is wanted, where computing it again is cheaper. Each `use` has its own number (lanes count modulo 32),
  // or the uses in two branches would be merged before them.
  template <class T>
  __device__ __forceinline__ T again(T value, int use) const {
    return __shfl_sync(0xFFFFFFFFu, value, int(threadIdx.x % 32) + 32 * use);
  }

  // No instruction moves across: so many elements and no more are worked on at a time.
  __device__ __forceinline__ void settle() const { __syncwarp(); }

 private:
  unsigned mask_ = 0xFFFFFFFFu;
  int turn_ = 0;
};

}  // namespace r2d2
