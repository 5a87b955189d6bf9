// The part of the CUDA runtime and language that csrc/*.cu uses, for g++ on the host. A thread is a fiber (threads.h);
// every memory access of an instrumented source calls hooks.cpp. What this header calls is declared in namespace cuda_host
// and never inline, so that its own state is not mistaken for the kernel's.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__  // libstdc++ writes __attribute__((__noinline__)), so it must expand to what may stand there
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // blocks run one after the other
#define __align__(n) __attribute__((aligned(n)))

struct int2 { int x, y; } __align__(8);
struct uint2 { unsigned x, y; } __align__(8);
struct float2 { float x, y; } __align__(8);
struct uint3 { unsigned x, y, z; };
struct int4 { int x, y, z, w; } __align__(16);
struct uint4 { unsigned x, y, z, w; } __align__(16);
struct float4 { float x, y, z, w; } __align__(16);
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

typedef struct CUstream_st* cudaStream_t;
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorLaunchFailure = 719,
  cudaErrorUnknown = 999,
};
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDriverGetVersion(int* version);
#define CUDART_VERSION 13000

namespace cuda_host {

// The file and line of a call in the source: `const char* file = __builtin_FILE(), int line = __builtin_LINE()` as default
// arguments. An address would not do: the compiler may copy one call into both arms of a branch.
struct Site {
  const char* call;
  const char* file;
  int line;
  unsigned mask;
};

void sync_threads(const Site& site);
void sync_warp(const Site& site);
uint64_t shuffle(const Site& site, uint64_t value, unsigned source);
unsigned ballot(const Site& site, bool value);
void fence();
void atomic(const volatile void* address, size_t bytes);
// When a load arrives by the clock (clock.h): made between departs() and departed(), waited for at wait().
class Arrival {
 public:
  void departs();
  void departed();
  void wait() const;

 private:
  uint32_t cycles_ = 0, trips_ = 0;
};

cudaError_t launch(const cudaLaunchConfig_t& config, void (*invoke)(const void*), const void* arguments, size_t bytes);

template <class T>
struct Same {
  using type = T;
};

template <class T, class F>
__attribute__((no_sanitize("thread"))) T update(T* p, F change) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "no such atomic on a GPU");
  atomic(p, sizeof(T));
  const T old = *p;
  *p = change(old);
  return old;
}

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "no such shuffle on a GPU");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_host

// Constant while a thread runs, and so not instrumented; threads.cpp sets them between threads, hence the second names.
extern const uint3 threadIdx asm("cuda_host_thread_index"), blockIdx asm("cuda_host_block_index");
extern const dim3 blockDim asm("cuda_host_block_dim"), gridDim asm("cuda_host_grid_dim");
constexpr int warpSize = 32;

#define CUDA_HOST_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_HOST_SITE) { cuda_host::sync_threads({"__syncthreads", file, line, ~0u}); }
inline void __syncwarp(unsigned mask = ~0u, CUDA_HOST_SITE) { cuda_host::sync_warp({"__syncwarp", file, line, mask}); }
inline void __threadfence() { cuda_host::fence(); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_HOST_SITE) {
  const unsigned lane = threadIdx.x % 32, group = lane & ~(width - 1u);
  return cuda_host::from_bits<T>(cuda_host::shuffle({"__shfl_sync", file, line, mask}, cuda_host::to_bits(value),
                                                    group | (source & (width - 1u))));
}

// A lane of a later group is out of reach, one of an earlier group is not: so PTX defines shfl.bfly.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, CUDA_HOST_SITE) {
  const unsigned lane = threadIdx.x % 32, last = lane | (width - 1u), other = lane ^ lane_mask;
  return cuda_host::from_bits<T>(cuda_host::shuffle({"__shfl_xor_sync", file, line, mask}, cuda_host::to_bits(value),
                                                    other <= last ? other : lane));
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_HOST_SITE) {
  return cuda_host::ballot({"__ballot_sync", file, line, mask}, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate, CUDA_HOST_SITE) {
  return cuda_host::ballot({"__any_sync", file, line, mask}, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_HOST_SITE) {
  return cuda_host::ballot({"__all_sync", file, line, mask}, predicate != 0) == mask;
}

template <class T>
T atomicAdd(T* p, typename cuda_host::Same<T>::type v) {
  return cuda_host::update(p, [v](T old) { return old + v; });
}
template <class T>
T atomicMin(T* p, typename cuda_host::Same<T>::type v) {
  return cuda_host::update(p, [v](T old) { return v < old ? v : old; });
}
template <class T>
T atomicMax(T* p, typename cuda_host::Same<T>::type v) {
  return cuda_host::update(p, [v](T old) { return v > old ? v : old; });
}
template <class T>
T atomicOr(T* p, typename cuda_host::Same<T>::type v) {
  return cuda_host::update(p, [v](T old) { return old | v; });
}
template <class T>
T atomicAnd(T* p, typename cuda_host::Same<T>::type v) {
  return cuda_host::update(p, [v](T old) { return old & v; });
}
template <class T>
T atomicExch(T* p, typename cuda_host::Same<T>::type v) {
  return cuda_host::update(p, [v](T) { return v; });
}
template <class T>
T atomicCAS(T* p, typename cuda_host::Same<T>::type expected, typename cuda_host::Same<T>::type v) {
  return cuda_host::update(p, [expected, v](T old) { return old == expected ? v : old; });
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  return cuda_host::update(p, [limit](unsigned old) { return old >= limit ? 0 : old + 1; });
}

template <class T> T __ldcg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldg(const T* p) { return *p; }
template <class T> void __stcg(T* p, T v) { *p = v; }
template <class T> void __stcs(T* p, T v) { *p = v; }

inline unsigned __float_as_uint(float v) { return cuda_host::from_bits<unsigned>(cuda_host::to_bits(v)); }
inline int __float_as_int(float v) { return cuda_host::from_bits<int>(cuda_host::to_bits(v)); }
inline float __uint_as_float(unsigned v) { return cuda_host::from_bits<float>(v); }
inline float __int_as_float(int v) { return cuda_host::from_bits<float>(unsigned(v)); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... given) {
  using Call = std::pair<void (*)(Parameters...), std::tuple<Parameters...>>;
  const Call call{kernel, std::tuple<Parameters...>(static_cast<Arguments&&>(given)...)};
  // Every thread gets its own copy of the arguments, on its own stack.
  return cuda_host::launch(
      *config, [](const void* p) { std::apply(static_cast<const Call*>(p)->first, static_cast<const Call*>(p)->second); },
      &call, sizeof(call));
}
