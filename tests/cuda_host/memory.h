// What a kernel may touch, and who touched it: registered buffers and __shared__ variables are divided into cells (an
// element of a buffer, a byte of shared memory), each with its last writer, its readers since, and how often it was read and
// written. An access outside, or one that order.h does not order after the conflicting ones before it, ends the launch.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <string>

#include "order.h"

namespace cuda_host {

enum class Access { read, write, atomic };

struct Cell {
  Stamp write, read;      // read: the last reader, or which of the lists of readers
  uint16_t reads, writes;  // stay at 65535
  uint16_t atomic;         // there is an entry among the atomics
};

// Rows of `row_bytes`, `stride` apart; what lies between them is out of bounds.
struct Extent {
  uintptr_t base;
  size_t rows, row_bytes, stride, cell_bytes;
};

void add_buffer(const char* name, const Extent& extent, bool constant);
const Cell* buffer_cells(const char* name);
void remove_buffers();

void start_launch_memory();
void start_block_memory();
void access_memory(uintptr_t address, size_t bytes, Access kind);
// For messages: "logits+24" or what else is there.
std::string describe(uintptr_t address);

}  // namespace cuda_host
