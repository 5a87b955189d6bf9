// What every backend of the D2 step is given: plain pointers and sizes, no PyTorch.
#pragma once

#include <stdint.h>

#include "d2_math.h"

namespace r2d2 {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

R2D2_INLINE constexpr int64_t element_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

struct Bank {
  void* rows;  // [U, classes], `stride` elements apart
  DType dtype;
  int64_t stride;
  const int32_t* slots;  // [samples]: a row number, or −1−label
  int64_t samples, classes;
  float label_scale;
  bool stochastic;
  uint64_t seed;
  int64_t* updates;  // how many steps have updated it, the counter of stochastic rounding
};

struct Batch {
  const void* logits;  // [size, classes], rows `stride` elements apart
  DType dtype;
  int64_t size, stride;
  const void* index;  // [size], int64 or int32
  bool index_is_int64;
};

// Sums over the sound unlabelled rows, and the number of rows that were not sound.
enum Statistic { kRows, kClassLoss, kEntropy, kPredictionConfidence, kPseudoConfidence, kAgreement, kSkipped, kStatistics };

}  // namespace r2d2
