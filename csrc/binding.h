// Python hands over addresses as integers.
#pragma once

#include <stdint.h>

namespace r2d2 {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace r2d2
