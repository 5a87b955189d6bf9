// Which kernel a row length takes, and the launches.
#include "d2_cuda.h"

#include "d2_cuda_step.h"

namespace r2d2 {
namespace {

// ------------------------------------------------------------------------------------------- the small kernels

struct PredictArguments {
  Batch batch;
  Bank bank;
  int32_t* status;
};

// A warp has a row, which it reads twice, so that nothing is written before all of it is known to be finite.
template <int kVector>
__global__ void __launch_bounds__(128) predict_kernel(const __grid_constant__ PredictArguments a) {
  using TeamType = Team<32>;
  __shared__ Search<TeamType> search;
  TeamType team;
  const int64_t i = int64_t(blockIdx.x) * TeamType::kRows + team.number;
  const bool inside = i < a.batch.size;
  const InFlight<int64_t> own = inside ? sample_at(a.batch, i) : InFlight<int64_t>();
  const auto ahead = search.start(a.batch);
  const int64_t number = inside ? own.get() : -1;
  const InFlight<int32_t> row_number = known(a.bank, number) ? InFlight<int32_t>(a.bank.slots + number) : InFlight<int32_t>();
  const Occurrences occurrences = search.find(a.batch, team, int(i), number, ahead);
  const int32_t slot = known(a.bank, number) ? row_number.get() : kOutside;
  if (inside && slot == kOutside && team.rank == 0) atomicOr(a.status + 1, kIndexOutOfRange);
  if (slot < 0 || occurrences.last != i) return;
  const RowAt logits = logits_row(a.batch, a.bank, i), row = bank_row(a.bank, slot);
  Slice<32, 8, kVector> slice{team.rank, 0};
  float x[8], count = 0;
  for (slice.begin = 0; slice.begin < row.width; slice.begin += slice.kSpan) {
    load(logits, slice, x);
    for (const float value : x) count += finite(value) ? 1.0f : 0.0f;
  }
  if (team.reduce(count, Add()) != float(logits.classes)) {
    if (team.rank == 0) atomicOr(a.status + 1, kPredictionNotFinite);
    return;
  }
  for (slice.begin = 0; slice.begin < row.width; slice.begin += slice.kSpan) {
    load(logits, slice, x);
    if (a.bank.dtype != DType::float32) clamp(x, a.bank.dtype == DType::float16 ? 65504.0f : 0x1.FEp127f);
    store(row, slice, x);
  }
}

struct ScaleArguments {
  void* out;
  const void* in;
  int64_t size;
  DType dtype;
  const float* grad_output;
  Scalar grad_scale;
};

constexpr int kScaleSpan = 32 * 8;
constexpr int64_t kScaleBlocks = 2048;  // a block for each kilobyte would cost more where there is nothing to do

// The elements that are left where vectors do not come out even belong to the last block.
template <int kVector>
__global__ void __launch_bounds__(128) scale_kernel(const __grid_constant__ ScaleArguments a) {
  const float factor = *a.grad_output / value_of(a.grad_scale);
  if (factor == 1 && a.out == a.in) return;
  const int64_t size = element_size(a.dtype), stride = int64_t(gridDim.x) * 4 * kScaleSpan;
  const int64_t whole = a.size / kVector * kVector;
  const auto scale = [&](auto slice, int64_t first, int count) {
    const RowAt in{const_cast<char*>(static_cast<const char*>(a.in)) + first * size, a.dtype, count, count};
    const RowAt out{static_cast<char*>(a.out) + first * size, a.dtype, count, count};
    float x[8];
    load(in, slice, x);
    for (float& value : x) value *= factor;
    store(out, slice, x);
  };
  for (int64_t first = (int64_t(blockIdx.x) * 4 + threadIdx.x / 32) * kScaleSpan; first < whole; first += stride)
    scale(Slice<32, 8, kVector>{int(threadIdx.x % 32), 0}, first, int(whole - first < kScaleSpan ? whole - first : kScaleSpan));
  if (kVector > 1 && whole < a.size && blockIdx.x == gridDim.x - 1 && threadIdx.x < 32)
    scale(Slice<32, 8, 1>{int(threadIdx.x), 0}, whole, int(a.size - whole));
}

// ------------------------------------------------------------------------------------------- launches

// Makes a device current for as long as the guard lives, since a launch on a stream needs its device to be current.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

template <class Arguments>
int launch(void (*kernel)(Arguments), int64_t blocks, int threads, const CudaTarget& target, const Arguments& arguments) {
  const DeviceGuard guard(target.device);
  cudaError_t error = guard.error();
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.stream = static_cast<cudaStream_t>(target.stream);
    error = cudaLaunchKernelEx(&config, kernel, arguments);
  }
  cudaGetLastError();  // so that PyTorch's next check does not find again what is returned here
  return error;
}

template <ClassLoss L, int kVector, int kThreads, int kElements, bool kLong = false>
int launch_step(const StepArguments& arguments, const CudaTarget& target) {
  using TeamType = Team<kThreads>;
  // An empty batch has a block, too, because its loss is 0 and its step counts.
  const int64_t blocks = arguments.batch.size ? (arguments.batch.size + TeamType::kRows - 1) / TeamType::kRows : 1;
  return launch(step_kernel<L, kThreads, kElements, kVector, kLong>, blocks, TeamType::kBlock, target, arguments);
}

// A row of up to 8192 classes stays in registers; a longer one is read twice (three times for mse). Twice as many classes, 32
// elements a thread, do not fit: 512 threads have 128 registers each, and ptxas spills.
template <ClassLoss L, int kVector>
int launch_step(const StepArguments& arguments, const CudaTarget& target) {
  const int64_t width = arguments.bank.stride;
  if (width <= 16) return launch_step<L, kVector, 4, 4>(arguments, target);
  if (width <= 64) return launch_step<L, kVector, 8, 8>(arguments, target);
  if (width <= 128) return launch_step<L, kVector, 16, 8>(arguments, target);
  if (width <= 256) return launch_step<L, kVector, 32, 8>(arguments, target);
  if (width <= 512) return launch_step<L, kVector, 32, 16>(arguments, target);
  if (width <= 1024) return launch_step<L, kVector, 32, 32>(arguments, target);
  if (width <= 2048) return launch_step<L, kVector, 128, 16>(arguments, target);
  if (width <= 4096) return launch_step<L, kVector, 256, 16>(arguments, target);
  if (width <= 8192) return launch_step<L, kVector, 512, 16>(arguments, target);
  return launch_step<L, kVector, 512, 16, true>(arguments, target);
}

template <ClassLoss L>
int launch_step(const StepArguments& arguments, bool vectors, const CudaTarget& target) {
  return vectors ? launch_step<L, 4>(arguments, target) : launch_step<L, 1>(arguments, target);
}

// Whether every row begins at a multiple of four elements and is one long.
bool in_vectors_of_four(const void* rows, DType dtype, int64_t stride, int64_t classes) {
  return uintptr_t(rows) % (4 * element_size(dtype)) == 0 && stride % 4 == 0 && classes % 4 == 0;
}

bool in_vectors_of_four(const Batch& batch, const Bank& bank) {
  return in_vectors_of_four(batch.logits, batch.dtype, batch.stride, bank.classes) &&
         in_vectors_of_four(bank.rows, bank.dtype, bank.stride, bank.classes);
}

}  // namespace

int d2_step_cuda(const Batch& batch, const Bank& bank, const CudaStep& step, const CudaTarget& target) {
  const StepArguments arguments{batch, bank, step};
  const bool vectors =
      in_vectors_of_four(batch, bank) && in_vectors_of_four(step.grad, batch.dtype, bank.classes, bank.classes);
  if (step.class_loss == ClassLoss::kl_reverse) return launch_step<ClassLoss::kl_reverse>(arguments, vectors, target);
  if (step.class_loss == ClassLoss::kl) return launch_step<ClassLoss::kl>(arguments, vectors, target);
  return launch_step<ClassLoss::mse>(arguments, vectors, target);
}

int predict_cuda(const Batch& batch, const Bank& bank, int32_t* status, const CudaTarget& target) {
  if (batch.size == 0) return cudaSuccess;
  const auto kernel = in_vectors_of_four(batch, bank) ? predict_kernel<4> : predict_kernel<1>;
  return launch(kernel, (batch.size + 3) / 4, 128, target, PredictArguments{batch, bank, status});
}

int scale_cuda(void* out, const void* in, int64_t size, DType dtype, const float* grad_output, Scalar grad_scale,
               const CudaTarget& target) {
  if (size == 0) return cudaSuccess;
  const int64_t blocks = (size + 4 * kScaleSpan - 1) / (4 * kScaleSpan);
  const ScaleArguments arguments{out, in, size, dtype, grad_output, grad_scale};
  const bool vectors = in_vectors_of_four(in, dtype, 0, 0) && in_vectors_of_four(out, dtype, 0, 0);
  const auto kernel = vectors ? scale_kernel<4> : scale_kernel<1>;
  return launch(kernel, blocks < kScaleBlocks ? blocks : kScaleBlocks, 128, target, arguments);
}

int cuda_version() { return CUDART_VERSION; }

int cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

const char* cuda_error_name(int error) { return cudaGetErrorName(cudaError_t(error)); }
const char* cuda_error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace r2d2
