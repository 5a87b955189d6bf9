#include "dispatch.h"

#include <string.h>

namespace r2d2 {
namespace {

std::vector<const Kernels*> find() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    found.push_back(&kAvx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    found.push_back(&kAvx2);
#endif
  found.push_back(&kPortable);
  return found;
}

const Kernels*& chosen() {
  static const Kernels* kernels = runnable_kernels().front();
  return kernels;
}

}  // namespace

const std::vector<const Kernels*>& runnable_kernels() {
  static const std::vector<const Kernels*> kernels = find();
  return kernels;
}

const Kernels& best_kernels() { return *chosen(); }

bool use_kernels(const char* name) {
  for (const Kernels* kernels : runnable_kernels())
    if (!strcmp(kernels->name, name)) {
      chosen() = kernels;
      return true;
    }
  return false;
}

}  // namespace r2d2
