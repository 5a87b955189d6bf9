// What happens before what in a launch: the memory model that memory.cpp looks for races with.
//
// An access carries a Stamp: its thread, its block's phase (how many __syncthreads() had passed) and its thread's clock.
// Ordered before a thread's present are
//
//   - its own accesses;
//   - those of its block in an earlier phase;
//   - those that a lane of its warp made before a __syncwarp() that named both. Shuffles and votes order no memory;
//   - those that another thread *released* to it: it made them, or had them ordered before it, then did __threadfence(),
//     then an atomic on some location; later this thread did an atomic on that location, then __threadfence().
//
// The last is the only way between blocks, though here they run one after the other; the fence must be of the thread that
// does the atomic (PTX: release and acquire patterns). What a thread learnt so, __syncthreads() and __syncwarp() hand on.
// Atomics on one location are ordered among themselves and race with no other atomic.
#pragma once

#include <stdint.h>

#include <map>
#include <memory>

namespace cuda_host {

constexpr unsigned WARP = 32, MOST_THREADS = 1024;

struct Stamp {  // 0: never. The top bit is memory.cpp's
  static constexpr int CLOCK = 19, PHASE = 16, THREAD = 10, BLOCK = 18;
  uint64_t bits = 0;

  Stamp() = default;
  Stamp(uint64_t block, uint64_t thread, uint64_t phase, uint64_t clock)
      : bits(((block << THREAD | thread) << PHASE | phase) << CLOCK | clock) {}
  uint32_t clock() const { return field(0, CLOCK); }
  uint32_t phase() const { return field(CLOCK, PHASE); }
  uint32_t thread() const { return field(CLOCK + PHASE, THREAD); }
  uint32_t block() const { return field(CLOCK + PHASE + THREAD, BLOCK); }

 private:
  uint32_t field(int from, int width) const { return uint32_t(bits >> from & ((1u << width) - 1)); }
};

// Of one block: all that came before a phase, and of single threads all up to a clock.
struct View {
  uint32_t phase = 0;
  std::map<uint32_t, uint32_t> clocks;
};

using Knowledge = std::map<uint32_t, View>;  // by block
using Known = std::shared_ptr<Knowledge>;    // not changed where shared

struct Clocks {
  Stamp now;
  uint32_t warp[WARP] = {};  // up to which clock of each lane of the warp all is ordered before now
  Known known;               // what was released to this thread
  Known offered;             // what its atomics release: the state of its last fence
  Known seen;                // what its atomics found; known from the next fence on
};

// The lanes of a warp that `mask` names have met.
void order_warp(Clocks* const lanes[WARP], unsigned mask);
// All threads of the block have met.
void order_block(Clocks* const threads[], unsigned count);
void order_fence(Clocks& thread);
void order_atomic(Clocks& thread, Known& location);

bool known_before(Stamp stamp, const Clocks& thread);

inline bool ordered(Stamp stamp, const Clocks& thread) {
  const Stamp& now = thread.now;
  if (stamp.block() == now.block()) {
    if (stamp.phase() < now.phase() || stamp.thread() == now.thread()) return true;
    if (stamp.thread() / WARP == now.thread() / WARP && stamp.clock() <= thread.warp[stamp.thread() % WARP]) return true;
  }
  return stamp.bits == 0 || known_before(stamp, thread);
}

}  // namespace cuda_host
