// The kernels of the D2 step: each team of threads has a row, which stays in registers from its one read to its one write.
#pragma once

#include <float.h>
#include <limits.h>

#include "d2_cuda_batch.h"
#include "d2_cuda_slice.h"

namespace r2d2 {

struct StepArguments {
  Batch batch;
  Bank bank;
  CudaStep step;
};

__device__ __forceinline__ float value_of(const Scalar& scalar) { return scalar.tensor ? *scalar.tensor : scalar.value; }

__device__ __forceinline__ bool finite(float x) { return fabsf(x) <= FLT_MAX; }

__device__ inline Weights weights_of(const CudaStep& step) {
  return {value_of(step.alpha), value_of(step.beta), value_of(step.grad_scale) / step.normalizer,
          value_of(step.label_lr) / step.update_normalizer};
}

// If this were not checked, one NaN would overwrite every row of the batch in the bank.
__device__ inline bool finite(const Weights& w) {
  return finite(w.alpha) && finite(w.beta) && finite(w.grad_weight) && finite(w.label_rate);
}

// ------------------------------------------------------------------------------------------- arithmetic on registers

// The distance to the largest element. It is cut at 1e31, so that the sums of 262 144 of them stay finite, also where a long row
// climbs by as much from piece to piece. Padding is −∞.
__device__ __forceinline__ float below(float x, float largest) { return fmaxf(x - largest, -1e31f); }

// 2^x in one instruction, which takes subnormal results for 0. exp2f() spends three more on them; no sum or weight can tell the
// difference, as one e^u of each row is 1.
__device__ __forceinline__ float exp2_or_zero(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126 ? 0 : exp2f(x);
#endif
}

// The maximum is subtracted before the multiplication. Folding it in as x·log2(e) − m·log2(e) would save an instruction and cost
// m·2^-24 of relative error, 6e-4 for logits near 1e4.
__device__ __forceinline__ float exponential(float u) { return exp2_or_zero(u * 1.44269504f); }

enum Sum { kP, kQ, kPU, kD, kFinite, kBoth, kSums };

// mse needs the sums of the default loss, too.
template <ClassLoss L>
constexpr ClassLoss kSummed = L == ClassLoss::kl ? ClassLoss::kl : ClassLoss::kl_reverse;

// Adds a thread's elements: the four of Sums, how many are finite, how many classes attain both maxima.
template <ClassLoss L, int kThreads, int kElements>
__device__ __forceinline__ void add_up(const Team<kThreads>& team, const float (&x)[kElements], const float (&y)[kElements],
                                       float max_x, float max_y, float (&total)[kSums]) {
  Sums<float> sums{total[kP], total[kQ], total[kPU], total[kD]};
#pragma unroll
  for (int k = 0; k < kElements; ++k) {
    const float u = below(x[k], max_x), v = below(y[k], max_y);
    accumulate<kSummed<L>>(sums, u, v, exponential(u), exponential(v));
    total[kFinite] += finite(x[k]) && finite(y[k]) ? 1.0f : 0.0f;
    total[kBoth] += u + v == 0 ? 1.0f : 0.0f;
    if (kElements > 8 && k % 8 == 7) team.scheduling_barrier();
  }
  total[kP] = sums.p, total[kQ] = sums.q, total[kPU] = sums.pu, total[kD] = sums.d;
}

template <int kElements>
__device__ __forceinline__ void add_deviations(const float (&x)[kElements], const float (&y)[kElements], float max_x, float max_y,
                                               float inv_zp, float inv_zq, float (&total)[3]) {
  Deviations<float> sums{total[0], total[1], total[2]};
#pragma unroll
  for (int k = 0; k < kElements; ++k)
    accumulate(sums, exponential(below(x[k], max_x)) * inv_zp, exponential(below(y[k], max_y)) * inv_zq);
  total[0] = sums.squared, total[1] = sums.weighted_p, total[2] = sums.weighted_q;
}

// x ← gradient, y ← moved pseudo-logits, which are the old ones where the weights' label rate is 0.
template <ClassLoss L, int kThreads, int kElements>
__device__ __forceinline__ void derive(const Team<kThreads>& team, const Row<float>& row, const float (&largest)[2],
                                       float (&x)[kElements], float (&y)[kElements]) {
  float max_x = largest[0], max_y = largest[1];
  if (kElements > 8) max_x = team.opaque(max_x), max_y = team.opaque(max_y);
#pragma unroll
  for (int k = 0; k < kElements; ++k) {
    const float u = below(x[k], max_x), v = below(y[k], max_y), eu = exponential(u), ev = exponential(v);
    x[k] = gradient<L>(row, u, v, eu, ev);
    y[k] -= descent<L>(row, u, v, eu, ev);
    if (kElements > 8 && k % 8 == 7) team.scheduling_barrier();
  }
}

template <int kElements>
__device__ __forceinline__ float largest_of(const float (&x)[kElements], float so_far) {
#pragma unroll
  for (int k = 0; k < kElements; ++k) so_far = fmaxf(so_far, x[k]);
  return so_far;
}

// ------------------------------------------------------------------------------------------- one sample, all occurrences

__device__ inline RowAt logits_row(const Batch& batch, const Bank& bank, int64_t i) {
  char* data = const_cast<char*>(static_cast<const char*>(batch.logits)) + i * batch.stride * element_size(batch.dtype);
  return {data, batch.dtype, int(bank.classes), int(bank.classes)};
}

__device__ inline RowAt grad_row(const StepArguments& a, int64_t i) {
  char* data = static_cast<char*>(a.step.grad) + i * a.bank.classes * element_size(a.batch.dtype);
  return {data, a.batch.dtype, int(a.bank.classes), int(a.bank.classes)};
}

// The padding of a strided bank is the bank's own. It is written along, so that whole lines cross the bus to pinned memory.
__device__ inline RowAt bank_row(const Bank& bank, int32_t slot) {
  char* data = static_cast<char*>(bank.rows) + slot * bank.stride * element_size(bank.dtype);
  return {data, bank.dtype, int(bank.classes), int(bank.stride)};
}

// ŷ of a row and, if `with_pseudo`, ỹ. Both are requested before either is waited for.
template <int kThreads, int kElements, int kVector>
__device__ __forceinline__ void load_both(const StepArguments& a, int64_t i, int32_t slot, bool with_pseudo,
                                          const Slice<kThreads, kElements, kVector>& slice, float (&x)[kElements],
                                          float (&y)[kElements]) {
  const RowAt logits = logits_row(a.batch, a.bank, i), pseudo = bank_row(a.bank, slot);
  const auto x_coming = fetch(logits, slice);
  if (with_pseudo && slot >= 0) arrive(fetch(pseudo, slice), pseudo, slice, y);
  arrive(x_coming, logits, slice, x);
  if (!with_pseudo || slot >= 0) return;
  // K·onehot(label) less K, so that the largest is 0: labelled samples own no row.
#pragma unroll
  for (int k = 0; k < kElements; ++k) {
    const int at = slice.position(k);
    y[k] = at >= a.bank.classes ? -INFINITY : at == -1 - slot ? 0.0f : -a.bank.label_scale;
  }
}

__device__ inline RowResult result_of(const Row<float>& row, const Weights& weights, int32_t slot, bool agrees) {
  const float loss = weights.alpha * row.class_loss + weights.beta * row.entropy;
  const Kind kind = slot < 0 ? kLabelled : agrees ? kCountedAndAgrees : kCounted;
  return {loss, row.class_loss, row.entropy, row.prediction_confidence, row.pseudo_confidence, float(kind)};
}

template <ClassLoss L>
__device__ inline Row<float> finish_row(const float (&total)[kSums], const float (&deviations)[3], const Weights& weights) {
  const Sums<float> sums{total[kP], total[kQ], total[kPU], total[kD]};
  const Deviations<float> squares{deviations[0], deviations[1], deviations[2]};
  return finish<L>(sums, squares, logf(sums.p), logf(sums.p / sums.q), weights);
}

// For a row that is not finite: its gradient and what it reports are NaN, and its pseudo-logits stay as they were.
template <int kThreads>
__device__ void write_nan(const StepArguments& a, const Team<kThreads>& team, int64_t i) {
  const RowAt grad = grad_row(a, i);
  team.order();  // the gradient may overwrite the logits, and here a thread writes what others have read
#pragma unroll 1
  for (int at = team.rank; at < grad.classes; at += kThreads) {
    if (grad.dtype == DType::float32)
      reinterpret_cast<float*>(grad.data)[at] = NAN;
    else
      reinterpret_cast<uint16_t*>(grad.data)[at] = 0x7FFF;  // NaN in both 16-bit dtypes
  }
  if (team.rank == 0) report(a.step, a.batch.size, i, {NAN, NAN, NAN, NAN, NAN, float(kBad)});
}

// One sample and all that its team must know of it.
template <class Finder, class TeamType>
struct Sample {
  const Finder& search;
  TeamType& team;
  int32_t slot;
  Occurrences occurrences;
  Weights weights;
  int64_t updates;  // the counter of stochastic rounding

  __device__ int next(const Batch& batch, int position) { return search.next(batch, team, occurrences, position); }
};

// Where a row's sums are finite, reports what follows from them and returns true, and in `row` what its derivatives need. This is
// no branch on every element, because ptxas would keep the values of both ways at once, and spill on sm_100: of a row that stays
// where it is the label rate is 0.
template <ClassLoss L, class SampleType>
__device__ __forceinline__ bool conclude(const StepArguments& a, const SampleType& sample, int i, bool moves,
                                         const float (&total)[kSums], const float (&deviations)[3], Row<float>& row) {
  Weights weights = sample.weights;
  if (total[kFinite] != float(a.bank.classes) || !finite(weights)) return false;
  if (!moves) weights.label_rate = 0;
  row = finish_row<L>(total, deviations, weights);
  if (sample.team.rank == 0) report(a.step, a.batch.size, i, result_of(row, weights, sample.slot, total[kBoth] > 0));
  return true;
}

// The step of a row that fits into the registers of its team.
template <ClassLoss L, int kThreads, int kElements, int kVector, class SampleType>
__device__ __forceinline__ void step_rows(const StepArguments& a, SampleType& sample) {
  Team<kThreads>& team = sample.team;
  Slice<kThreads, kElements, kVector> slice{team.rank, 0};
  float x[kElements], y[kElements];
#pragma unroll 1
  for (int i = -1; i != sample.occurrences.last;) {
    const bool is_first = i < 0;
    i = sample.next(a.batch, i);
    load_both(a, i, sample.slot, is_first, slice, x, y);
    float largest[2] = {largest_of(x, -INFINITY), largest_of(y, -INFINITY)};
    team.reduce(largest, Max());
    float total[kSums] = {}, deviations[3] = {};
    add_up<L>(team, x, y, largest[0], largest[1], total);
    team.reduce(total, Add());
    if (L == ClassLoss::mse) {
      if (kElements > 8) largest[0] = team.opaque(largest[0]), largest[1] = team.opaque(largest[1]);
      add_deviations(x, y, largest[0], largest[1], 1 / total[kP], 1 / total[kQ], deviations);
      team.reduce(deviations, Add());
    }
    const bool moves = i == sample.occurrences.last && a.step.update && sample.slot >= 0;
    Row<float> row;
    if (!conclude<L>(a, sample, i, moves, total, deviations, row)) {
      write_nan(a, team, i);
      continue;
    }
    derive<L>(team, row, largest, x, y);
    if (kElements > 8) slice.rank = team.opaque(slice.rank);
    store(grad_row(a, i), slice, x);
    if (!moves) continue;
    round_to_bank(a.bank, sample.updates, uint64_t(sample.slot) * a.bank.classes, slice, y);
    store(bank_row(a.bank, sample.slot), slice, y);
  }
}

// The sums as they would be had the maxima been the new ones.
template <ClassLoss L>
__device__ __forceinline__ void rebase(float (&total)[kSums], float old_x, float old_y, float new_x, float new_y) {
  if (total[kP] == 0 && total[kQ] == 0) return;  // nothing has been summed, and the old maxima are −∞
  const float dx = below(old_x, new_x), dy = below(old_y, new_y), sx = exponential(dx), sy = exponential(dy);
  total[kD] = L == ClassLoss::kl ? sy * (total[kD] + (dx - dy) * total[kQ]) : sx * (total[kD] + (dx - dy) * total[kP]);
  total[kPU] = sx * (total[kPU] + dx * total[kP]);
  total[kP] *= sx, total[kQ] *= sy;
  if (dx < 0 || dy < 0) total[kBoth] = 0;
}

// The step of a row of any length, in pieces: the first read gives maxima and sums, the second gradient and update; mse reads
// once more in between.
template <ClassLoss L, int kThreads, int kElements, int kVector, class SampleType>
__device__ __forceinline__ void step_long_rows(const StepArguments& a, SampleType& sample) {
  Team<kThreads>& team = sample.team;
  Slice<kThreads, kElements, kVector> slice{team.rank, 0};
  const int end = int(a.bank.stride);
  float x[kElements], y[kElements];
#pragma unroll 1
  for (int i = -1; i != sample.occurrences.last;) {
    i = sample.next(a.batch, i);
    float largest[2] = {-INFINITY, -INFINITY}, total[kSums] = {}, deviations[3] = {};
#pragma unroll 1
    for (slice.begin = 0; slice.begin < end; slice.begin += slice.kSpan) {
      load_both(a, i, sample.slot, true, slice, x, y);
      const float max_x = largest_of(x, largest[0]), max_y = largest_of(y, largest[1]);
      rebase<L>(total, largest[0], largest[1], max_x, max_y);
      add_up<L>(team, x, y, max_x, max_y, total);
      largest[0] = max_x, largest[1] = max_y;
    }
    const float own[2] = {largest[0], largest[1]};
    team.reduce(largest, Max());
    rebase<L>(total, own[0], own[1], largest[0], largest[1]);
    team.reduce(total, Add());
    if (L == ClassLoss::mse) {
  #pragma unroll 1
    for (slice.begin = 0; slice.begin < end; slice.begin += slice.kSpan) {
        load_both(a, i, sample.slot, true, slice, x, y);
        add_deviations(x, y, largest[0], largest[1], 1 / total[kP], 1 / total[kQ], deviations);
      }
      team.reduce(deviations, Add());
    }
    const bool moves = i == sample.occurrences.last && a.step.update && sample.slot >= 0;
    Row<float> row;
    if (!conclude<L>(a, sample, i, moves, total, deviations, row)) {
      write_nan(a, team, i);
      continue;
    }
#pragma unroll 1
    for (slice.begin = 0; slice.begin < end; slice.begin += slice.kSpan) {
      load_both(a, i, sample.slot, true, slice, x, y);
      derive<L>(team, row, largest, x, y);
      store(grad_row(a, i), slice, x);
      if (!moves) continue;
      round_to_bank(a.bank, sample.updates, uint64_t(sample.slot) * a.bank.classes, slice, y);
      store(bank_row(a.bank, sample.slot), slice, y);
    }
  }
}

// Threads of an SM at a time, by which ptxas bounds registers: 128 a thread, 168 with 32 elements. Other losses than the default
// would spill some with so few. Each warp has up to 8 KiB of loads in flight, several times what DRAM latency asks for.
template <ClassLoss L, int kThreads, int kElements>
constexpr int blocks_of_sm() {
  const int threads = (kElements <= 16 ? 512 : 384) - (L == ClassLoss::kl_reverse ? 0 : 128);
  return threads < kThreads ? 1 : threads / Team<kThreads>::kBlock;
}

template <ClassLoss L, int kThreads, int kElements, int kVector, bool kLong>
__global__ void __launch_bounds__(Team<kThreads>::kBlock, blocks_of_sm<L, kThreads, kElements>())
    step_kernel(const __grid_constant__ StepArguments a) {
  using TeamType = Team<kThreads>;
  __shared__ Search<TeamType> search;
  TeamType team;
  const int64_t i = int64_t(blockIdx.x) * TeamType::kRows + team.number;
  const bool inside = i < a.batch.size;
  // In the order in which each waits for the one before: the sample, its slot, its row. The search takes place while the slot is
  // on its way.
  const InFlight<int64_t> own = inside ? sample_at(a.batch, i) : InFlight<int64_t>();
  const auto ahead = a.step.update ? search.start(a.batch) : typename Search<TeamType>::Ahead();
  if (i == 0 && team.rank == 0) *a.step.loss = NAN;
  const int64_t number = inside ? own.get() : -1;
  const InFlight<int32_t> row = known(a.bank, number) ? InFlight<int32_t>(a.bank.slots + number) : InFlight<int32_t>();
  Occurrences occurrences{int(i), -1};
  if (a.step.update) occurrences = search.find(a.batch, team, int(i), number, ahead);
  const int32_t slot = known(a.bank, number) ? row.get() : kOutside;
  if (slot < 0) occurrences = {int(i), -1};  // no row, so that nobody has to take turns
  if (inside && slot == kOutside) {
    if (team.rank == 0) atomicOr(a.step.status + 1, kIndexOutOfRange);
    write_nan(a, team, i);
  } else if (inside && occurrences.last == i) {
    Sample<Search<TeamType>, TeamType> sample{search, team, slot, occurrences, weights_of(a.step),
                                              a.bank.stochastic ? *a.bank.updates : 0};
    if constexpr (kLong)
      step_long_rows<L, kThreads, kElements, kVector>(a, sample);
    else
      step_rows<L, kThreads, kElements, kVector>(a, sample);
  }
  if (!reports_last(a.step)) return;
  if (a.step.statistics)
    sum_up<TeamType::kBlock, true>(a.batch, a.bank, a.step);
  else
    sum_up<TeamType::kBlock, false>(a.batch, a.bank, a.step);
}

}  // namespace r2d2
