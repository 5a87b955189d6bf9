#include "memory.h"

#include <stdlib.h>

#include <algorithm>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "clock.h"
#include "threads.h"

// The linker's names for this library's own parts. Only the kernels' sources are instrumented, so what they touch in .bss is
// __shared__; before it lie constants.
extern "C" __attribute__((visibility("hidden"))) char __ehdr_start, __bss_start, _end;

namespace cuda_host {
namespace {

constexpr uint64_t MANY = uint64_t(1) << 63;  // a Cell's `read` holds the number of a list of readers

// The readers of one cell in one block: those of earlier phases are ordered before whatever a later phase does.
struct BlockReaders {
  uint32_t block, phase;
  std::vector<uint32_t> clocks;  // by thread, 0 where it did not read
};
using Readers = std::vector<BlockReaders>;

struct Atomic {
  Stamp last;
  Moment done;
  Known released;
};

struct Buffer {
  std::string name;
  Extent extent;
  size_t bytes;
  bool constant, shared;
  Cell* cells;  // from calloc(): pages that no access needs are never made
  std::unordered_map<size_t, Atomic> atomics;
  size_t first_used, last_used;

  Buffer(std::string name, const Extent& extent, bool constant, bool shared)
      : name(std::move(name)), extent(extent), bytes((extent.rows - 1) * extent.stride + extent.row_bytes),
        constant(constant), shared(shared), first_used(SIZE_MAX), last_used(0) {
    cells = static_cast<Cell*>(calloc(bytes / extent.cell_bytes + 1, sizeof(Cell)));
    if (!cells) throw std::bad_alloc();
  }
  Buffer(Buffer&& other) = delete;
  ~Buffer() { free(cells); }
};

std::vector<std::unique_ptr<Buffer>> buffers;
Buffer* shared_memory;
Buffer* recent;
std::vector<Readers> readers;
std::vector<uint32_t> spare_readers;

uintptr_t at(const char& symbol) { return reinterpret_cast<uintptr_t>(&symbol); }

Buffer* find(uintptr_t address) {
  if (recent && address - recent->extent.base < recent->bytes) return recent;
  for (auto& buffer : buffers)
    if (address - buffer->extent.base < buffer->bytes) return recent = buffer.get();
  return address - shared_memory->extent.base < shared_memory->bytes ? shared_memory : nullptr;
}

const char* verb(Access kind) { return kind == Access::read ? "reads" : kind == Access::write ? "writes" : "changes atomically"; }

struct Event {
  uintptr_t address;
  size_t bytes;
  Access kind;
};

[[noreturn]] void refuse(const Event& event, const std::string& why) {
  fail(std::string(verb(event.kind)) + " " + std::to_string(event.bytes) + " bytes at " + describe(event.address) + why);
}

[[noreturn]] void race(const Event& event, const char* other, Stamp stamp) {
  refuse(event, ", which block " + std::to_string(stamp.block()) + " thread " + std::to_string(stamp.thread()) + " " + other +
                  " with nothing to order the two");
}

void add_reader(Readers& list, Stamp stamp) {
  if (list.empty() || list.back().block != stamp.block()) list.push_back({stamp.block(), stamp.phase(), {}});
  BlockReaders& block = list.back();
  if (block.phase != stamp.phase()) block.clocks.clear();
  block.phase = stamp.phase();
  block.clocks.resize(running.block.x);
  block.clocks[stamp.thread()] = stamp.clock();
}

void note_read(Cell& cell) {
  const Clocks& me = current->clocks;
  if (cell.read.bits & MANY) {
    add_reader(readers[cell.read.bits & ~MANY], me.now);
  } else if (ordered(cell.read, me)) {
    cell.read = me.now;
  } else {
    if (spare_readers.empty()) {
      spare_readers.push_back(uint32_t(readers.size()));
      readers.emplace_back();
    }
    const uint32_t number = spare_readers.back();
    spare_readers.pop_back();
    readers[number].clear();
    add_reader(readers[number], cell.read);
    add_reader(readers[number], me.now);
    cell.read.bits = MANY | number;
  }
}

// The first reader that is not ordered before now, or 0.
Stamp unordered_reader(const Cell& cell) {
  const Clocks& me = current->clocks;
  if (!(cell.read.bits & MANY)) return ordered(cell.read, me) ? Stamp() : cell.read;
  for (const BlockReaders& block : readers[cell.read.bits & ~MANY])
    for (uint32_t thread = 0; thread < block.clocks.size(); ++thread) {
      const Stamp stamp(block.block, thread, block.phase, block.clocks[thread]);
      if (block.clocks[thread] && !ordered(stamp, me)) return stamp;
    }
  return {};
}

void forget_readers(Cell& cell) {
  if (cell.read.bits & MANY) spare_readers.push_back(uint32_t(cell.read.bits & ~MANY));
  cell.read = {};
}

void count(uint16_t& counter) { counter += counter != UINT16_MAX; }

void touch(Buffer& buffer, size_t index, const Event& event) {
  const Access kind = event.kind;
  Cell& cell = buffer.cells[index];
  const Clocks& me = current->clocks;
  if (kind != Access::write) count(cell.reads);
  if (kind != Access::read) count(cell.writes);
  if (buffer.constant) return;
  if (buffer.shared && kind != Access::write && !cell.write.bits && !cell.atomic)
    refuse(event, ", which nothing in this block has written");
  if (!ordered(cell.write, me)) race(event, "wrote", cell.write);
  if (kind != Access::atomic && cell.atomic) {
    const Stamp last = buffer.atomics[index].last;
    if (!ordered(last, me)) race(event, "changed atomically", last);
  }
  if (kind == Access::read) return note_read(cell);
  if (const Stamp reader = unordered_reader(cell); reader.bits) race(event, "read", reader);
  forget_readers(cell);
  if (kind == Access::write) {
    cell.write = me.now;
  } else {
    cell.atomic = 1;
    buffer.atomics[index].last = me.now;
  }
}

// Forgets who touched it; the counts stay.
void reset(Buffer& buffer) {
  for (size_t i = buffer.first_used; i <= buffer.last_used && buffer.first_used != SIZE_MAX; ++i) {
    forget_readers(buffer.cells[i]);
    buffer.cells[i].write = {};
    buffer.cells[i].atomic = 0;
  }
  buffer.atomics.clear();
  buffer.first_used = SIZE_MAX;
  buffer.last_used = 0;
}

}  // namespace

void add_buffer(const char* name, const Extent& extent, bool constant) {
  auto buffer = std::make_unique<Buffer>(name, extent, constant, false);
  for (const auto& other : buffers)
    if (extent.base < other->extent.base + other->bytes && other->extent.base < extent.base + buffer->bytes)
      throw std::invalid_argument(std::string(name) + " overlaps " + other->name);
  buffers.push_back(std::move(buffer));
}

const Cell* buffer_cells(const char* name) {
  for (const auto& buffer : buffers)
    if (buffer->name == name) return buffer->cells;
  return nullptr;
}

void remove_buffers() {
  recent = nullptr;
  buffers.clear();
}

void start_launch_memory() {
  if (!shared_memory) {
    const size_t bytes = at(_end) - at(__bss_start);
    shared_memory = new Buffer("shared memory", {at(__bss_start), 1, bytes, bytes, 1}, false, true);
  }
  for (auto& buffer : buffers) reset(*buffer);
  reset(*shared_memory);
  readers.clear();
  spare_readers.clear();
}

void start_block_memory() { reset(*shared_memory); }

std::string describe(uintptr_t address) {
  if (const Buffer* buffer = find(address)) return buffer->name + "+" + std::to_string(address - buffer->extent.base);
  const int owner = stack_owner(address);
  if (owner >= 0) return "a local variable of thread " + std::to_string(owner);
  size_t distance = 4096;
  std::string nearest;
  for (const auto& buffer : buffers) {
    const size_t past = address - buffer->extent.base - buffer->bytes, before = buffer->extent.base - address;
    if (std::min(past, before) >= distance) continue;
    distance = std::min(past, before);
    nearest = std::to_string(distance) + (past < before ? " bytes past the end of " : " bytes before ") + buffer->name;
  }
  if (distance < 4096) return nearest;
  char text[40];
  snprintf(text, sizeof text, "0x%zx, in no buffer", size_t(address));
  return text;
}

void access_memory(uintptr_t address, size_t bytes, Access kind) {
  if (address - reinterpret_cast<uintptr_t>(current->stack) < STACK || !bytes) return;
  const Event event{address, bytes, kind};
  Buffer* const buffer = find(address);
  if (!buffer) {
    const bool argument = address - reinterpret_cast<uintptr_t>(running.arguments) < running.arguments_bytes;
    const bool constant = at(__ehdr_start) <= address && address < at(__bss_start);
    if (kind == Access::read && (argument || constant)) return;
    refuse(event, "");
  }
  const Extent& extent = buffer->extent;
  const size_t offset = address - extent.base, in_row = extent.rows > 1 ? offset % extent.stride : offset;
  if (in_row + bytes > extent.row_bytes)
    refuse(event, offset + bytes > buffer->bytes ? ", past its end" : ", between two of its rows");
  if (buffer->constant && kind != Access::read) refuse(event, ", which is constant");
  const size_t first = offset / extent.cell_bytes, last = (offset + bytes - 1) / extent.cell_bytes;
  buffer->first_used = std::min(buffer->first_used, first);
  buffer->last_used = std::max(buffer->last_used, last);
  for (size_t i = first; i <= last; ++i) touch(*buffer, i, event);
  if (buffer->shared)
    clock_shared(kind == Access::write);
  else if (kind == Access::read)
    clock_read(address);
  else if (kind == Access::write)
    clock_write(address);
  else
    clock_atomic(address, buffer->atomics[first].done);
  if (kind == Access::atomic) order_atomic(current->clocks, buffer->atomics[first].released);
}

}  // namespace cuda_host
