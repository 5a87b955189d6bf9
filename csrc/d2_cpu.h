// The D2 step on a CPU.
#pragma once

#include "d2_step.h"

namespace r2d2 {

struct Step {
  ClassLoss class_loss;
  Weights weights;
  bool update;
  void* grad;          // [size, classes], contiguous, the logits' dtype
  double normalizer;   // D
  float* loss;         // scalar
  float* row_losses;   // [size], or null
  double* statistics;  // [kStatistics] to add to, or null
  int threads;
};

// What a row hands to the ordered sums.
struct RowResult {
  float loss, class_loss, entropy, prediction_confidence, pseudo_confidence;
  bool agreement, sound;
};

// Returns −1, or the position of the first index outside [0, samples): then nothing has been written.
int64_t d2_step(const Batch& batch, const Bank& bank, const Step& step);

// Rows of the unlabelled samples ← logits. As d2_step; *skipped counts the rows left alone because logits were not finite,
// and *first_skipped is the position of the first.
int64_t predict(const Batch& batch, const Bank& bank, int threads, int64_t* skipped, int64_t* first_skipped);

// One compiled copy of the row kernels for each instruction set.
struct Kernels {
  const char* name;
  // Rows order[begin … end) of a batch; `slots` and `results` are [batch.size], by position in the batch.
  void (*step_rows)(const Batch&, const Bank&, const Step&, bool update, const int32_t* slots, const int32_t* order,
                    int64_t begin, int64_t end, RowResult* results);
  // row ← logits; false, and nothing written, where logits are not finite.
  bool (*predict_row)(const Batch&, const Bank&, int64_t position, int32_t slot);
};

extern const Kernels kPortable, kAvx2, kAvx512;

}  // namespace r2d2
