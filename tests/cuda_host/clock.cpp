#include "clock.h"

#include <unordered_map>

#include "threads.h"

namespace cuda_host {

Elapsed elapsed;

namespace {

constexpr uint32_t WRITTEN = ~0u;
std::unordered_map<uintptr_t, uint32_t> lines;  // by number: the last block that asked DRAM for it, or WRITTEN
uint32_t block;

Watch& operation() {
  ++elapsed.operations;
  Watch& watch = current->watch;
  watch.shuffle = 0;
  if (watch.departs)
    ++watch.now.cycles;
  else
    watch.tick();
  return watch;
}

bool comes_from_dram(uintptr_t address) {
  const auto [line, is_new] = lines.try_emplace(address / 128, block);
  if (is_new) return true;
  if (line->second == block || line->second == WRITTEN) return false;
  line->second = block;
  return true;
}

void arrives(Watch& watch, uint32_t cycles, uint32_t trips) {
  const Moment arrival{watch.now.cycles + cycles, watch.now.trips + trips};
  Moment& of = watch.departs ? watch.departing : watch.plain;
  of = later(of, arrival);
}

}  // namespace

void start_launch_clock() {
  elapsed = {};
  lines.clear();
}

void start_block_clock(uint32_t number) { block = number; }

void clock_shared(bool write) {
  Watch& watch = operation();
  if (!write) arrives(watch, SHARED_CYCLES, 0);
}

void clock_read(uintptr_t address) { arrives(operation(), comes_from_dram(address) ? DRAM_CYCLES : L2_CYCLES, 1); }

void clock_write(uintptr_t address) {
  Watch& watch = operation();
  lines[address / 128] = WRITTEN;
  watch.stored = later(watch.stored, {watch.now.cycles + L2_CYCLES, watch.now.trips + 1});
}

void clock_atomic(uintptr_t address, Moment& location) {
  Watch& watch = operation();
  lines[address / 128] = WRITTEN;
  arrives(watch, L2_CYCLES, 1);
  watch.plain = location = later(watch.plain, location);
}

void clock_fence() {
  Watch& watch = operation();
  watch.now = later(watch.now, watch.stored);
}

void clock_barrier(Watch* const watches[], unsigned count, uint32_t cycles) {
  Moment all, stored;
  for (unsigned i = 0; i < count; ++i) {
    watches[i]->tick();
    all = later(all, watches[i]->now);
    stored = later(stored, watches[i]->stored);
  }
  elapsed.operations += count;
  for (unsigned i = 0; i < count; ++i) {
    watches[i]->now = {all.cycles + cycles, all.trips};
    watches[i]->stored = stored;
    watches[i]->shuffle = 0;
  }
}

void clock_shuffle(Watch* const watches[], unsigned count, uint64_t call_and_distance) {
  Moment all;
  for (unsigned i = 0; i < count; ++i) {
    if (watches[i]->shuffle == call_and_distance)
      ++watches[i]->now.cycles;
    else
      watches[i]->tick();
    all = later(all, watches[i]->now);
  }
  elapsed.operations += count;
  for (unsigned i = 0; i < count; ++i) {
    watches[i]->now = all;
    watches[i]->plain = later(watches[i]->plain, {all.cycles + SHARED_CYCLES, all.trips});
    watches[i]->shuffle = call_and_distance;
  }
}

void clock_end() {
  Watch& watch = current->watch;
  watch.tick(0);
  elapsed.longest = later(elapsed.longest, watch.now);
}

void Arrival::departs() {
  if (!current) return;
  current->watch.tick(0);
  current->watch.departs = true;
  current->watch.departing = {};
}

void Arrival::departed() {
  if (!current) return;
  current->watch.departs = false;
  cycles_ = current->watch.departing.cycles;
  trips_ = current->watch.departing.trips;
}

void Arrival::wait() const {
  if (current) current->watch.now = later(current->watch.now, {cycles_, trips_});
}

}  // namespace cuda_host
