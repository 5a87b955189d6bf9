// The threads of a block as fibers, one block after the other. A thread runs until a barrier, shuffle or vote at which it
// must wait; then the first thread in the chosen order that can run does, so the first thread is as far ahead of the last as
// the barriers let it be. A meeting (barrier, shuffle, vote) counts only where all the threads it names come to the same
// line of the source; where no thread can run and some wait, that is an error.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <ucontext.h>

#include <string>

#include "clock.h"
#include "cuda_runtime.h"
#include "order.h"

namespace cuda_host {

enum class Order : int { forward, reverse, permuted };

struct Thread {
  unsigned index, rank;  // rank: place in the order
  bool finished, waits;
  Site site;             // where it waits
  uint64_t value;        // what it brings to a shuffle or vote, and after it what it takes away
  unsigned source;
  Clocks clocks;
  Watch watch;

  bool started;
  char* stack;
  jmp_buf state;  // swapcontext() would cost two system calls a switch
  ucontext_t start;
};

constexpr size_t STACK = 1 << 16;

struct Launch {
  dim3 grid, block;
  Order order;
  uint64_t seed;
  bool checks;
  void (*invoke)(const void*);
  const void* arguments;
  size_t arguments_bytes;
};

extern Thread* current;  // null outside a kernel
extern Launch running;

// Ends the launch: control goes back to run(), which throws std::runtime_error with block and thread before the message.
// The fibers' frames are left as they are, destructors and all.
[[noreturn]] void fail(const std::string& message);

void run(const Launch& launch);

// Whose stack an address lies in, or -1.
int stack_owner(uintptr_t address);

}  // namespace cuda_host
