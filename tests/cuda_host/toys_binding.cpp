#include <pybind11/pybind11.h>

#include <stdexcept>

#include "toys.h"

template <class T>
static T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

PYBIND11_MODULE(_cuda, m) {
  m.def("launch", [](const std::string& kernel, uintptr_t in, uintptr_t out, uintptr_t scratch, uintptr_t counter, int n,
                     unsigned grid, unsigned block, uintptr_t stream) {
    if (const char* error = launch_toy(kernel, pointer<const float>(in), pointer<float>(out), pointer<float>(scratch),
                                       pointer<unsigned>(counter), n, grid, block, pointer<void>(stream)))
      throw std::runtime_error(error);
  });
  m.def("convert", [](const std::string& how, uintptr_t in, uintptr_t out, long n) {
    convert(how, pointer<const void>(in), pointer<void>(out), n);
  });
}
