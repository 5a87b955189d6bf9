// What the compiler makes of -fsanitize=thread,alignment,bounds, without the sanitizers' libraries: every access to memory,
// and every misaligned pointer or index out of range, calls one of these.
#include <stdint.h>

#include <string>

#include "memory.h"
#include "threads.h"

using namespace cuda_host;

#define EXPORT extern "C" __attribute__((visibility("hidden")))

static inline void access(const void* p, size_t bytes, Access kind) {
  if (current && running.checks) access_memory(reinterpret_cast<uintptr_t>(p), bytes, kind);
}

#define ACCESS(n)                                                                    \
  EXPORT void __tsan_read##n(void* p) { access(p, n, Access::read); }                \
  EXPORT void __tsan_write##n(void* p) { access(p, n, Access::write); }              \
  EXPORT void __tsan_unaligned_read##n(void* p) { access(p, n, Access::read); }      \
  EXPORT void __tsan_unaligned_write##n(void* p) { access(p, n, Access::write); }    \
  EXPORT void __tsan_volatile_read##n(void* p) { access(p, n, Access::read); }       \
  EXPORT void __tsan_volatile_write##n(void* p) { access(p, n, Access::write); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
EXPORT void __tsan_read_range(void* p, size_t bytes) { access(p, bytes, Access::read); }
EXPORT void __tsan_write_range(void* p, size_t bytes) { access(p, bytes, Access::write); }
EXPORT void __tsan_init() {}
EXPORT void __tsan_func_entry(void*) {}
EXPORT void __tsan_func_exit() {}
EXPORT void __tsan_vptr_update(void**, void*) {}
EXPORT void __tsan_vptr_read(void**) {}

namespace cuda_host {

void atomic(const volatile void* address, size_t bytes) { access(const_cast<const void*>(address), bytes, Access::atomic); }

}  // namespace cuda_host

// The compiler's descriptions, as libubsan's ABI has them.
struct Source {
  const char* file;
  uint32_t line, column;
};
struct Type {
  uint16_t kind, info;
  char name[1];
};
struct Mismatch {
  Source source;
  const Type* type;
  uint8_t log_alignment, kind;
};
struct OutOfBounds {
  Source source;
  const Type* array;
  const Type* index;
};

// The compiler also checks host code and code outside a kernel; those are for other tests.
EXPORT void __ubsan_handle_type_mismatch_v1(const Mismatch* at, uintptr_t address) {
  if (current)
    fail("line " + std::to_string(at->source.line) + " takes " + describe(address) + " for a " + at->type->name +
         ", aligned to " + std::to_string(1 << at->log_alignment) + " bytes, which it is not");
}
EXPORT void __ubsan_handle_out_of_bounds(const OutOfBounds* at, uintptr_t index) {
  if (current)
    fail("line " + std::to_string(at->source.line) + " has index " + std::to_string(intptr_t(index)) + " into " +
         at->array->name);
}
