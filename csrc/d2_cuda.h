// The D2 step on an NVIDIA GPU. Every call launches one kernel on a stream and returns its cudaError_t; none waits.
#pragma once

#include "d2_step.h"

namespace r2d2 {

// A number, or where it lies on the device, so that a captured graph replays with what is there by then.
struct Scalar {
  float value;
  const float* tensor;
};

struct CudaStep {
  ClassLoss class_loss;
  Scalar alpha, beta, label_lr, grad_scale;
  float normalizer, update_normalizer;  // D, D_u
  bool update;
  void* grad;          // [size, classes], contiguous, the logits' dtype
  float* loss;         // scalar
  double* statistics;  // [kStatistics] to add to, or null
  float* results;      // [size], the loss of each row; with statistics [kResults, size]
  unsigned launch;     // a number of this launch's own, not 0
  int32_t* status;     // [2]: the ticket of blocks finished (0 between launches), sticky problems
};

// What a row hands to the ordered sums.
enum Result { kRowLoss, kRowClassLoss, kRowEntropy, kRowPrediction, kRowPseudo, kRowKind, kResults };

// Bits of status[1]; r2d2fast/bank.py has their messages.
enum Problem { kIndexOutOfRange = 1, kPredictionNotFinite = 2 };

struct CudaTarget {
  int device;
  void* stream;
};

int d2_step_cuda(const Batch& batch, const Bank& bank, const CudaStep& step, const CudaTarget& target);

// Rows of the unlabelled samples ← logits.
int predict_cuda(const Batch& batch, const Bank& bank, int32_t* status, const CudaTarget& target);

// out ← in·grad_output/grad_scale, element by element; where they are one memory and the factor is 1, nothing is touched.
int scale_cuda(void* out, const void* in, int64_t size, DType dtype, const float* grad_output, Scalar grad_scale,
               const CudaTarget& target);

int cuda_version();         // of the runtime linked in: 1000·major + 10·minor
int cuda_driver_version();  // the latest that the driver serves, 0 if there is none

const char* cuda_error_name(int error);
const char* cuda_error_text(int error);

}  // namespace r2d2
