#include "threads.h"

#include <sys/mman.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "memory.h"

// threadIdx and the like, as cuda_runtime.h names them for the linker.
__attribute__((visibility("hidden"))) uint3 thread_index asm("cuda_host_thread_index");
__attribute__((visibility("hidden"))) uint3 block_index asm("cuda_host_block_index");
__attribute__((visibility("hidden"))) dim3 block_dim asm("cuda_host_block_dim"), grid_dim asm("cuda_host_grid_dim");

namespace cuda_host {

Thread* current = nullptr;
Launch running;

namespace {

Thread* threads;  // MOST_THREADS, made by the first launch
char* stacks;
Thread* by_rank[MOST_THREADS];
uint64_t runnable[MOST_THREADS / 64];  // bits by rank
unsigned finished, at_barrier;
jmp_buf host;
std::string failure;

void make_threads() {
  threads = new Thread[MOST_THREADS]();
  void* memory = mmap(nullptr, MOST_THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  stacks = static_cast<char*>(memory);
  for (unsigned i = 0; i < MOST_THREADS; ++i) {
    threads[i].index = i;
    threads[i].stack = stacks + i * STACK;
    mprotect(threads[i].stack, 4096, PROT_NONE);
  }
}

void set_runnable(const Thread& thread) { runnable[thread.rank / 64] |= uint64_t(1) << thread.rank % 64; }
void set_blocked(const Thread& thread) { runnable[thread.rank / 64] &= ~(uint64_t(1) << thread.rank % 64); }

Thread* first_runnable() {
  for (unsigned word = 0; word * 64 < running.block.x; ++word)
    if (runnable[word]) return by_rank[word * 64 + __builtin_ctzll(runnable[word])];
  return nullptr;
}

void run_blocks_for_ever();

[[noreturn]] void enter(Thread& thread) {
  current = &thread;
  thread_index.x = thread.index;
  if (thread.started) _longjmp(thread.state, 1);
  thread.started = true;
  getcontext(&thread.start);
  thread.start.uc_stack.ss_sp = thread.stack;
  thread.start.uc_stack.ss_size = STACK;
  makecontext(&thread.start, run_blocks_for_ever, 0);
  setcontext(&thread.start);
  abort();
}

[[noreturn]] void leave() {
  current = nullptr;
  _longjmp(host, 1);
}

std::string place(const Site& site) {
  std::string text = std::string(site.call) + " (line " + std::to_string(site.line);
  if (site.mask != ~0u) {
    char mask[24];
    snprintf(mask, sizeof mask, ", mask 0x%x", site.mask);
    text += mask;
  }
  return text + ")";
}

bool same(const Site& a, const Site& b) {
  return a.line == b.line && a.mask == b.mask && !strcmp(a.call, b.call) && !strcmp(a.file, b.file);
}

unsigned first_of_warp(const Thread& thread) { return thread.index / WARP * WARP; }

// Whom a thread waits for: the first that is not at the same place.
Thread& awaited(const Thread& thread) {
  const bool barrier = !strcmp(thread.site.call, "__syncthreads");
  for (unsigned i = barrier ? 0 : first_of_warp(thread); i < running.block.x; ++i)
    if ((barrier || thread.site.mask >> i % WARP & 1) && !(threads[i].waits && same(threads[i].site, thread.site)))
      return threads[i];
  fail("a full meeting let nobody go");  // not reached
}

// No thread can run and not all have finished: says who waits for whom, preferably for one that will never come.
[[noreturn]] void stuck() {
  current = std::find_if(threads, threads + running.block.x, [](const Thread& t) { return t.waits; });
  Thread* other = &awaited(*current);
  for (unsigned i = 0; i < running.block.x && !other->finished; ++i) {
    current = other;
    other = &awaited(*current);
  }
  fail("waits at " + place(current->site) + " for thread " + std::to_string(other->index) + ", which " +
       (other->finished ? "has returned" : "waits at " + place(other->site)));
}

// Runs the first thread that can; returns when that is the caller.
void go_on() {
  if (first_runnable() == current) return;
  if (_setjmp(current->state)) return;
  if (Thread* const next = first_runnable()) enter(*next);
  if (finished < running.block.x) stuck();
  leave();
}

void run_blocks_for_ever() {
  for (;;) {
    running.invoke(running.arguments);
    clock_end();
    current->finished = true;
    ++finished;
    set_blocked(*current);
    go_on();
  }
}

void wait(const Site& site) {
  current->site = site;
  current->waits = true;
  set_blocked(*current);
}

void let_go(Thread& thread) {
  thread.waits = false;
  set_runnable(thread);
}

// Brings a value to the lanes of `site.mask`; the last of them calls `deal` for all.
template <class Deal>
uint64_t meet(const Site& site, uint64_t value, unsigned source, Deal deal) {
  Thread* const warp = threads + first_of_warp(*current);
  const unsigned lanes = std::min(WARP, running.block.x - first_of_warp(*current));
  const unsigned mask = site.mask;
  if (!(mask >> current->index % WARP & 1)) fail(place(site) + " by a lane that its mask does not name");
  if (lanes < WARP && mask >> lanes) fail(place(site) + " names lanes that the block does not have");
  wait(site);
  current->value = value;
  current->source = source;
  bool all = true;
  for (unsigned lane = 0; lane < lanes && all; ++lane)
    if (mask >> lane & 1) all = warp[lane].waits && same(warp[lane].site, site);
  if (all) {
    deal(warp, mask);
    Watch* watches[WARP];
    unsigned count = 0;
    for (unsigned lane = 0; lane < lanes; ++lane)
      if (mask >> lane & 1) watches[count++] = &warp[lane].watch;
    if (!strcmp(site.call, "__syncwarp"))
      clock_barrier(watches, count, 0);
    else
      clock_shuffle(watches, count, uint64_t(site.line) << 32 | (source ^ current->index % WARP) << 1 | 1);
    for (unsigned lane = 0; lane < lanes; ++lane)
      if (mask >> lane & 1) let_go(warp[lane]);
  }
  go_on();
  return current->value;
}

void start_block(unsigned block) {
  const unsigned count = running.block.x;
  block_index.x = block;
  start_block_clock(block);
  finished = at_barrier = 0;
  std::vector<unsigned> ranks(count);
  std::iota(ranks.begin(), ranks.end(), 0);
  if (running.order == Order::reverse) std::reverse(ranks.begin(), ranks.end());
  if (running.order == Order::permuted)
    std::shuffle(ranks.begin(), ranks.end(), std::mt19937_64(running.seed * 0x9E3779B97F4A7C15u + block));
  std::fill(std::begin(runnable), std::end(runnable), 0);
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.rank = ranks[i];
    by_rank[ranks[i]] = &thread;
    thread.finished = thread.waits = false;
    thread.clocks = Clocks();
    thread.watch = Watch();
    thread.clocks.now = Stamp(block, i, 0, 1);
    set_runnable(thread);
  }
}

__attribute__((noinline)) void run_block() {
  if (!_setjmp(host)) enter(*first_runnable());
}

}  // namespace

void fail(const std::string& message) {
  if (!current) throw std::runtime_error(message);
  failure = "block " + std::to_string(block_index.x) + " thread " + std::to_string(current->index) + ": " + message;
  leave();
}

int stack_owner(uintptr_t address) {
  const uintptr_t offset = address - reinterpret_cast<uintptr_t>(stacks);
  return offset < MOST_THREADS * STACK ? int(offset / STACK) : -1;
}

void sync_threads(const Site& site) {
  wait(site);
  if (++at_barrier == running.block.x) {
    at_barrier = 0;
    static Clocks* clocks[MOST_THREADS];
    for (unsigned i = 0; i < running.block.x; ++i) {
      if (!same(threads[i].site, site)) stuck();
      clocks[i] = &threads[i].clocks;
    }
    if (running.checks) order_block(clocks, running.block.x);
    static Watch* watches[MOST_THREADS];
    for (unsigned i = 0; i < running.block.x; ++i) watches[i] = &threads[i].watch;
    clock_barrier(watches, running.block.x, SHARED_CYCLES);
    for (unsigned i = 0; i < running.block.x; ++i) let_go(threads[i]);
  }
  go_on();
}

void sync_warp(const Site& site) {
  meet(site, 0, 0, [](Thread* warp, unsigned mask) {
    if (!running.checks) return;
    Clocks* clocks[WARP];
    for (unsigned lane = 0; lane < WARP; ++lane) clocks[lane] = &warp[lane].clocks;
    order_warp(clocks, mask);
  });
}

uint64_t shuffle(const Site& site, uint64_t value, unsigned source) {
  if ((site.mask >> current->index % WARP & 1) && !(site.mask >> source & 1))
    fail(place(site) + " reads lane " + std::to_string(source) + ", which its mask does not name");
  return meet(site, value, source, [](Thread* warp, unsigned mask) {
    uint64_t brought[WARP];
    for (unsigned lane = 0; lane < WARP; ++lane) brought[lane] = warp[lane].value;
    for (unsigned lane = 0; lane < WARP; ++lane)
      if (mask >> lane & 1) warp[lane].value = brought[warp[lane].source];
  });
}

unsigned ballot(const Site& site, bool value) {
  return unsigned(meet(site, value, 0, [](Thread* warp, unsigned mask) {
    uint64_t votes = 0;
    for (unsigned lane = 0; lane < WARP; ++lane)
      if (mask >> lane & 1) votes |= warp[lane].value << lane;
    for (unsigned lane = 0; lane < WARP; ++lane)
      if (mask >> lane & 1) warp[lane].value = votes;
  }));
}

void fence() {
  clock_fence();
  if (running.checks) order_fence(current->clocks);
}

void run(const Launch& launch) {
  if (!threads) make_threads();
  running = launch;
  grid_dim = launch.grid;
  block_dim = launch.block;
  failure.clear();
  std::vector<unsigned> blocks(launch.grid.x);
  std::iota(blocks.begin(), blocks.end(), 0);
  if (launch.order == Order::reverse) std::reverse(blocks.begin(), blocks.end());
  if (launch.order == Order::permuted) std::shuffle(blocks.begin(), blocks.end(), std::mt19937_64(launch.seed));
  if (launch.checks) start_launch_memory();
  start_launch_clock();
  for (const unsigned block : blocks) {
    start_block(block);
    if (launch.checks) start_block_memory();
    run_block();
    if (failure.empty()) continue;
    for (unsigned i = 0; i < MOST_THREADS; ++i) threads[i].started = false;
    throw std::runtime_error(failure);
  }
}

}  // namespace cuda_host
