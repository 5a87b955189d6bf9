// Small kernels that are right, and each again with one bug: what the harness must let pass, and what it must find.
#include "toys.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <map>

namespace {

struct Args {
  const float* in;
  float* out;
  float* scratch;
  unsigned* counter;
  int n;
};

template <int WIDTH>
__device__ __forceinline__ float lanes_sum(unsigned mask, float v) {
#pragma unroll
  for (int offset = WIDTH / 2; offset; offset /= 2) v += __shfl_xor_sync(mask, v, offset);
  return v;
}

// out[block] = Σ in[block·n …], one row a block.
enum { RIGHT, NO_BARRIER, SECOND_BARRIER_DROPPED, WRONG_OFFSET, DIVERGENT_SHUFFLE, EARLY_RETURN, OTHER_BARRIER, STRANGER };

template <int BUG>
__global__ void __launch_bounds__(1024, 1) block_sum(const __grid_constant__ Args a) {
  __shared__ float partial[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  if (BUG == EARLY_RETURN && threadIdx.x == 40) return;
  float v = 0;
  for (int i = threadIdx.x; i < a.n; i += blockDim.x) v += a.in[size_t(blockIdx.x) * a.n + i];
  if (BUG == WRONG_OFFSET) v += __shfl_xor_sync(~0u, v, 3);
  if (BUG == DIVERGENT_SHUFFLE) {
    if (lane < 16)
      v += __shfl_xor_sync(~0u, v, 1);
    else
      v += __shfl_xor_sync(~0u, v, 1);
  }
  if (BUG == STRANGER) v += __shfl_xor_sync(0xFFFFu, v, 1);
  v = lanes_sum<32>(~0u, v);
  if (lane == 0) partial[warp] = v;
  if (BUG == OTHER_BARRIER && warp == 1)
    __syncthreads();
  else if (BUG != NO_BARRIER)
    __syncthreads();
  float total = 0;
  for (int i = 0; i < warps; ++i) total += partial[i];
  if (BUG != SECOND_BARRIER_DROPPED) __syncthreads();
  if (lane == 0) partial[warp] = total;  // used again: the readers above must be done
  __syncthreads();
  if (threadIdx.x == 0) a.out[blockIdx.x] = partial[warps - 1];
}

// out = in with the lanes of each group of eight reversed, through shared memory.
template <bool SYNC, unsigned NAMED>
__global__ void reverse_groups(const __grid_constant__ Args a) {
  __shared__ float held[256];
  const unsigned mask = NAMED << (threadIdx.x % 32 / 8 * 8), first = threadIdx.x / 8 * 8;
  held[threadIdx.x] = a.in[threadIdx.x];
  if (SYNC) __syncwarp(mask);
  a.out[threadIdx.x] = held[first + 7 - threadIdx.x % 8];
}

// Groups of eight lanes that meet differently often.
__global__ void group_votes(const __grid_constant__ Args a) {
  const unsigned group = threadIdx.x % 32 / 8, mask = 0xFFu << group * 8;
  float v = a.in[threadIdx.x];
  for (unsigned round = 0; round <= group; ++round) v = lanes_sum<8>(mask, v) / 8;
  const unsigned above = __ballot_sync(mask, threadIdx.x % 8 > 4);
  const bool all = __all_sync(mask, threadIdx.x % 8 < 8), any = __any_sync(mask, threadIdx.x % 8 > 7);
  v = __shfl_sync(mask, v, 0, 8);
  a.out[threadIdx.x] = v + (above == 0xE0u << group * 8 && all && !any ? 0 : 1000);
}

// Four floats a thread, `SHIFT` floats further than it should.
template <int SHIFT, bool WRITE>
__global__ void vectors(const __grid_constant__ Args a) {
  const int i = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
  if (i >= a.n) return;
  const float4 v = *reinterpret_cast<const float4*>(a.in + i + (WRITE ? 0 : SHIFT));
  *reinterpret_cast<float4*>(a.out + i + (WRITE ? SHIFT : 0)) = make_float4(v.x + 1, v.y + 1, v.z + 1, v.w + 1);
}

template <bool ATOMIC>
__global__ void one_flag(const __grid_constant__ Args a) {
  if (ATOMIC)
    atomicOr(a.counter, 1u);
  else
    *a.counter = 1;
}

__global__ void flag_and_read(const __grid_constant__ Args a) {
  if (threadIdx.x == 0) atomicExch(a.out, 1.0f);
  if (threadIdx.x == 33) a.scratch[0] = a.out[0];
}

// The last block adds what the blocks wrote.
enum { NO_RELEASE = 1, NO_ACQUIRE, NO_BARRIER_BEFORE, NO_BARRIER_AFTER, EVERY_BLOCK };

template <int BUG>
__global__ void last_block_sum(const __grid_constant__ Args a) {
  __shared__ bool last;
  // A warp writes its own: thread 0 must speak for the others' writes too.
  const unsigned warps = blockDim.x / 32, slot = blockIdx.x * warps + threadIdx.x / 32;
  const float v = lanes_sum<32>(~0u, a.in[blockIdx.x * blockDim.x + threadIdx.x]);
  if (threadIdx.x % 32 == 0) a.scratch[slot] = v;
  if (BUG != NO_BARRIER_BEFORE) __syncthreads();
  if (threadIdx.x == 0) {
    if (BUG != NO_RELEASE) __threadfence();
    last = atomicInc(a.counter, gridDim.x - 1) == gridDim.x - 1 || BUG == EVERY_BLOCK;
    if (BUG != NO_ACQUIRE) __threadfence();
  }
  if (BUG != NO_BARRIER_AFTER) __syncthreads();
  if (!last || threadIdx.x != 32) return;
  float total = 0;
  for (unsigned i = 0; i < gridDim.x * warps; ++i) total += __ldcg(a.scratch + i);
  a.out[0] = total;
}

// The same by blocks of one warp, where lane 0 speaks for the lanes that met it.
template <bool BEFORE, bool AFTER>
__global__ void last_warp_sum(const __grid_constant__ Args a) {
  const unsigned i = blockIdx.x * 32 + threadIdx.x;
  a.scratch[i] = a.in[i];
  if (BEFORE) __syncwarp();
  unsigned ticket = 0;
  if (threadIdx.x == 0) {
    __threadfence();
    ticket = atomicInc(a.counter, gridDim.x - 1);
    __threadfence();
  }
  ticket = __shfl_sync(~0u, ticket, 0);  // orders no memory
  if (AFTER) __syncwarp();
  if (ticket != gridDim.x - 1) return;
  float total = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) total += __ldcg(a.scratch + block * 32 + (31 - threadIdx.x));
  a.out[threadIdx.x] = total;
}

__global__ void uninitialised(const __grid_constant__ Args a) {
  __shared__ float held[2];
  if (threadIdx.x == 0 && blockIdx.x == 0) held[0] = 1;  // the second block reads what the first left behind
  __syncthreads();
  if (threadIdx.x == 1) a.out[blockIdx.x] = held[0];
}

__global__ void shared_overflow(const __grid_constant__ Args a) {
  __shared__ float held[32], other[32];
  held[threadIdx.x] = 0;
  other[threadIdx.x] = 0;
  a.out[threadIdx.x] = other[threadIdx.x];
}

__global__ void write_constant(const __grid_constant__ Args a) { const_cast<float*>(a.in)[threadIdx.x] = 0; }

const std::map<std::string, void (*)(Args)> kernels{
    {"block_sum", block_sum<RIGHT>},
    {"block_sum: barrier dropped", block_sum<NO_BARRIER>},
    {"block_sum: second barrier dropped", block_sum<SECOND_BARRIER_DROPPED>},
    {"block_sum: wrong offset", block_sum<WRONG_OFFSET>},
    {"block_sum: divergent shuffle", block_sum<DIVERGENT_SHUFFLE>},
    {"block_sum: early return", block_sum<EARLY_RETURN>},
    {"block_sum: another barrier", block_sum<OTHER_BARRIER>},
    {"block_sum: lane not named", block_sum<STRANGER>},
    {"reverse_groups", reverse_groups<true, 0xFF>},
    {"reverse_groups: no syncwarp", reverse_groups<false, 0xFF>},
    {"reverse_groups: half the mask", reverse_groups<true, 0x0F>},
    {"group_votes", group_votes},
    {"vectors", vectors<0, false>},
    {"vectors: reads one on", vectors<4, false>},
    {"vectors: writes one on", vectors<4, true>},
    {"vectors: reads unaligned", vectors<1, false>},
    {"vectors: writes unaligned", vectors<1, true>},
    {"one_flag", one_flag<true>},
    {"one_flag: plain write", one_flag<false>},
    {"flag_and_read: plain read", flag_and_read},
    {"last_block_sum", last_block_sum<RIGHT>},
    {"last_block_sum: no release", last_block_sum<NO_RELEASE>},
    {"last_block_sum: no acquire", last_block_sum<NO_ACQUIRE>},
    {"last_block_sum: no barrier before", last_block_sum<NO_BARRIER_BEFORE>},
    {"last_block_sum: no barrier after", last_block_sum<NO_BARRIER_AFTER>},
    {"last_block_sum: every block", last_block_sum<EVERY_BLOCK>},
    {"last_warp_sum", last_warp_sum<true, true>},
    {"last_warp_sum: no syncwarp before", last_warp_sum<false, true>},
    {"last_warp_sum: no syncwarp after", last_warp_sum<true, false>},
    {"uninitialised", uninitialised},
    {"shared_overflow", shared_overflow},
    {"write_constant", write_constant},
};

}  // namespace

const char* launch_toy(const std::string& kernel, const float* in, float* out, float* scratch, unsigned* counter, int n,
                       unsigned grid, unsigned block, void* stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernels.at(kernel), Args{in, out, scratch, counter, n});
  cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorName(error);
}

void convert(const std::string& how, const void* in, void* out, long n) {
  for (long i = 0; i < n; ++i) {
    const auto* bits = static_cast<const unsigned short*>(in) + i;
    const float value = how[0] == 't' ? static_cast<const float*>(in)[i] : 0;
    auto* floats = static_cast<float*>(out) + i;
    auto* shorts = static_cast<unsigned short*>(out) + i;
    if (how == "from float16") *floats = __half2float(__ushort_as_half(*bits));
    if (how == "from bfloat16") *floats = __bfloat162float(__ushort_as_bfloat16(*bits));
    if (how == "to float16") *shorts = __half_as_ushort(__float2half_rn(value));
    if (how == "to bfloat16") *shorts = __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
}
