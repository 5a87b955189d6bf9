#include "order.h"

#include <algorithm>

#include "threads.h"

namespace cuda_host {
namespace {

void merge(Knowledge& into, const Knowledge& from) {
  for (const auto& [block, view] : from) {
    View& ours = into[block];
    ours.phase = std::max(ours.phase, view.phase);
    for (const auto& [thread, clock] : view.clocks) ours.clocks[thread] = std::max(ours.clocks[thread], clock);
  }
}

void join(Known& into, const Known& from) {
  if (!from || into == from) return;
  if (!into) {
    into = from;
    return;
  }
  if (into.use_count() > 1) into = std::make_shared<Knowledge>(*into);
  merge(*into, *from);
}

void advance(Clocks& thread, uint32_t phases) {
  const Stamp now = thread.now;
  const Stamp next(now.block(), now.thread(), now.phase() + phases, now.clock() + 1);
  if (next.clock() != now.clock() + 1 || next.phase() != now.phase() + phases || next.block() != now.block())
    fail("more barriers than the harness can count");
  thread.now = next;
}

}  // namespace

void order_warp(Clocks* const lanes[WARP], unsigned mask) {
  uint32_t all[WARP] = {};
  Known known;
  for (unsigned lane = 0; lane < WARP; ++lane) {
    if (!(mask >> lane & 1)) continue;
    for (unsigned other = 0; other < WARP; ++other) all[other] = std::max(all[other], lanes[lane]->warp[other]);
    join(known, lanes[lane]->known);
  }
  for (unsigned lane = 0; lane < WARP; ++lane)
    if (mask >> lane & 1) all[lane] = std::max(all[lane], lanes[lane]->now.clock());
  for (unsigned lane = 0; lane < WARP; ++lane) {
    if (!(mask >> lane & 1)) continue;
    std::copy(all, all + WARP, lanes[lane]->warp);
    lanes[lane]->known = known;
    advance(*lanes[lane], 0);
  }
}

void order_block(Clocks* const threads[], unsigned count) {
  Known known;
  for (unsigned i = 0; i < count; ++i) join(known, threads[i]->known);
  for (unsigned i = 0; i < count; ++i) {
    threads[i]->known = known;
    advance(*threads[i], 1);
  }
}

void order_fence(Clocks& thread) {
  join(thread.known, thread.seen);
  thread.offered = thread.known ? std::make_shared<Knowledge>(*thread.known) : std::make_shared<Knowledge>();
  const Stamp now = thread.now;
  View& own = (*thread.offered)[now.block()];
  own.phase = std::max(own.phase, now.phase());
  const uint32_t warp = now.thread() / WARP * WARP;
  for (uint32_t lane = 0; lane < WARP; ++lane)
    if (thread.warp[lane]) own.clocks[warp + lane] = std::max(own.clocks[warp + lane], thread.warp[lane]);
  own.clocks[now.thread()] = now.clock();
  advance(thread, 0);
}

void order_atomic(Clocks& thread, Known& location) {
  join(thread.seen, location);
  if (!thread.offered) return;
  if (!location) location = std::make_shared<Knowledge>();
  join(location, thread.offered);
}

bool known_before(Stamp stamp, const Clocks& thread) {
  if (!thread.known) return false;
  const auto view = thread.known->find(stamp.block());
  if (view == thread.known->end()) return false;
  if (stamp.phase() < view->second.phase) return true;
  const auto clock = view->second.clocks.find(stamp.thread());
  return clock != view->second.clocks.end() && stamp.clock() <= clock->second;
}

}  // namespace cuda_host
