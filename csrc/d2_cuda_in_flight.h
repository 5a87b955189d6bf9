// Loads that nothing waits for until their value is wanted.
#pragma once

#include <cuda_runtime.h>

namespace r2d2 {

#if defined(__CUDACC__)
struct Arrival {
  __device__ void departs() {}
  __device__ void departed() {}
  __device__ void wait() const {}
};
#else
using cuda_host::Arrival;  // the clock of the tests' harness
#endif

template <class T>
__device__ __forceinline__ T widened(T value) {
  return value;
}
__device__ __forceinline__ uint4 widened(uint2 value) { return {value.x, value.y, 0, 0}; }

// A value on its way from memory. On a GPU it is the value and nothing else: a thread waits at the first instruction that uses a
// register which a load has yet to fill. So whatever stands between the construction and get() is done while the load is under way.
template <class T>
class InFlight {
 public:
  InFlight() = default;

  // From may be narrower than T, as long as the load itself fills the rest.
  template <class From>
  __device__ __forceinline__ explicit InFlight(const From* from) {
    arrival_.departs();
    value_ = widened(*from);
    arrival_.departed();
  }

  __device__ __forceinline__ T get() const {
    arrival_.wait();
    return value_;
  }

 private:
  T value_{};
  Arrival arrival_;
};

}  // namespace r2d2
