// What a launch waits for, in cycles of an H100, and how many round trips to memory follow one another in its longest chain.
//
// Published latencies: 29 cycles from shared memory, 263 from the L2 cache, 479 from DRAM (Luo et al., "Benchmarking and
// Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking", 2024). Shuffles and barriers are charged as shared
// memory, whose path they take; atomics on global memory as the L2 cache, where they are done; every operation a cycle for its
// issue. All blocks start at 0, as blocks of one wave do. A line of 128 bytes comes from DRAM the first time that a block asks
// for it, and from L2 after that or where this launch has written it.
//
// Shuffles of one line of the source over one distance, with nothing between them, are of different values and overlap. A load
// through an InFlight (csrc/d2_cuda_in_flight.h) is waited for where it is first asked for its value, any other load
// and a vote before whatever its thread does next that is seen here. A fence waits for what the block has stored.
//
// Not seen: arithmetic, the lanes of a warp that diverge and so take turns, bandwidth and queues of any kind, instructions that
// must be fetched, the order in which the compiler really issues loads. The last is read from the machine code
// (tests/test_cuda_compile.py).
#pragma once

#include <stdint.h>

#include <algorithm>

namespace cuda_host {

struct Moment {
  uint32_t cycles = 0, trips = 0;

  friend Moment later(const Moment& a, const Moment& b) {
    return a.cycles != b.cycles ? (a.cycles > b.cycles ? a : b) : Moment{a.cycles, std::max(a.trips, b.trips)};
  }
};

constexpr uint32_t SHARED_CYCLES = 29, L2_CYCLES = 263, DRAM_CYCLES = 479;

// Of one thread.
struct Watch {
  Moment now;
  Moment plain;      // when loads arrive that are in no InFlight
  Moment departing;  // the same for the InFlight that is being made
  Moment stored;     // when L2 has what was stored
  bool departs = false;
  uint64_t shuffle = 0;  // the call and the distance of the last operation, if it was a shuffle

  void tick(uint32_t cycles = 1) {
    now = later(now, plain);
    now.cycles += cycles;
  }
};

// Of one launch.
struct Elapsed {
  Moment longest;
  uint64_t operations = 0;  // of all threads
};
extern Elapsed elapsed;

void start_launch_clock();
void start_block_clock(uint32_t block);
void clock_shared(bool write);
void clock_read(uintptr_t address);
void clock_write(uintptr_t address);
// `location`: when the last atomic there was done.
void clock_atomic(uintptr_t address, Moment& location);
void clock_fence();
void clock_barrier(Watch* const watches[], unsigned count, uint32_t cycles);
void clock_shuffle(Watch* const watches[], unsigned count, uint64_t call_and_distance);
void clock_end();

}  // namespace cuda_host
