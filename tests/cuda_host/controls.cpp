// The host half of the CUDA runtime, and what host.py controls through ctypes.
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "memory.h"
#include "threads.h"

using namespace cuda_host;

namespace {

struct Record {  // of the last launch; host.py has the same
  uint64_t stream, operations;
  uint32_t launches, device, grid, block, cycles, trips;
};

Record record;
cudaError_t next_launch = cudaSuccess, last_error = cudaSuccess;
int device;
Order order;
uint64_t seed;
bool checks;
std::string message;

cudaError_t failed(cudaError_t error) { return last_error = error; }

}  // namespace

cudaError_t cuda_host::launch(const cudaLaunchConfig_t& config, void (*invoke)(const void*), const void* arguments, size_t bytes) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  if (next_launch != cudaSuccess) return failed(std::exchange(next_launch, cudaSuccess));
  if (!grid.x || !block.x || block.x > MOST_THREADS) return failed(cudaErrorInvalidConfiguration);
  if (grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1 || config.dynamicSmemBytes || grid.x >> Stamp::BLOCK)
    throw std::invalid_argument("cuda_host launches one dimension, 262143 blocks at most, without dynamic shared memory");
  record = {reinterpret_cast<uint64_t>(config.stream), 0, record.launches + 1, uint32_t(device), grid.x, block.x, 0, 0};
  run({grid, block, order, seed, checks, invoke, arguments, bytes});
  record.operations = elapsed.operations;
  record.cycles = elapsed.longest.cycles;
  record.trips = elapsed.longest.trips;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaGetDevice(int* out) {
  *out = device;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int wanted) {
  if (wanted < 0 || wanted >= 8) return failed(cudaErrorInvalidDevice);
  device = wanted;
  return cudaSuccess;
}

const char* cudaGetErrorName(cudaError_t error) {
  static const std::map<cudaError_t, const char*> names{
      {cudaSuccess, "cudaSuccess"},
      {cudaErrorInvalidValue, "cudaErrorInvalidValue"},
      {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation"},
      {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration"},
      {cudaErrorInvalidDevice, "cudaErrorInvalidDevice"},
      {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice"},
      {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources"},
      {cudaErrorLaunchFailure, "cudaErrorLaunchFailure"},
  };
  const auto name = names.find(error);
  return name == names.end() ? "cudaErrorUnknown" : name->second;
}

const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "as the harness was told"; }

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void cuda_host_set(int order_, uint64_t seed_, int checks_) {
  order = Order(order_);
  seed = seed_;
  checks = checks_;
}

// 0, or -1 and a message.
EXPORT int cuda_host_add_buffer(const char* name, uint64_t base, uint64_t rows, uint64_t row_bytes, uint64_t stride,
                                uint64_t cell_bytes, int constant) try {
  add_buffer(name, {base, rows, row_bytes, stride, cell_bytes}, constant);
  return 0;
} catch (const std::exception& error) {
  message = error.what();
  return -1;
}

EXPORT void cuda_host_read_counts(const char* name, uint64_t cells, int32_t* reads, int32_t* writes) {
  const Cell* cell = buffer_cells(name);
  for (uint64_t i = 0; i < cells; ++i) reads[i] = cell[i].reads, writes[i] = cell[i].writes;
}

EXPORT void cuda_host_remove_buffers() { remove_buffers(); }
EXPORT const char* cuda_host_message() { return message.c_str(); }
EXPORT void cuda_host_fail_next_launch(int error) { next_launch = cudaError_t(error); }
EXPORT void cuda_host_record(Record* out) { *out = record; }
EXPORT int cuda_host_current_device() { return device; }
EXPORT int cuda_host_last_error() { return cudaGetLastError(); }
