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

// The maximum is subtracted before the multiplication. Folding it in as x·log2(e) − m·log2(e) would save an instruction and cost
// m·2^-24 of relative error, 6e-4 for logits near 1e4.
__device__ __forceinline__ float exponential(float u) { return exp2f(u * 1.44269504f); }

enum Sum { kP, kQ, kPU, kD, kFinite, kBoth, kSums };

// Adds a thread's elements: the four of Sums, how many are finite, how many classes attain both maxima.
template <int kThreads, int kElements>
__device__ __forceinline__ void add_up(ClassLoss loss, const Team<kThreads>& team, const float (&x)[kElements],
                                       const float (&y)[kElements], float max_x, float max_y, float (&total)[kSums]) {
  Sums<float> sums{total[kP], total[kQ], total[kPU], total[kD]};
#pragma unroll
  for (int k = 0; k < kElements; ++k) {
    const float u = below(x[k], max_x), v = below(y[k], max_y), eu = exponential(u), ev = exponential(v);
    if (loss == ClassLoss::kl)
      accumulate<ClassLoss::kl>(sums, u, v, eu, ev);
    else  // mse needs these sums, too
      accumulate<ClassLoss::kl_reverse>(sums, u, v, eu, ev);
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

// The branches of derive() are uses of their own.
__device__ constexpr Use use_in_gradient(ClassLoss loss) { return Use(int(Use::gradient_kl_reverse) + int(loss)); }

template <ClassLoss L, int kThreads, int kElements>
__device__ __forceinline__ void derive_for(const Team<kThreads>& team, const Row<float>& row, const float (&largest)[2],
                                           float (&x)[kElements], float (&y)[kElements]) {
  float max_x = largest[0], max_y = largest[1];
  if (kElements > 8) max_x = team.opaque(max_x, use_in_gradient(L)), max_y = team.opaque(max_y, use_in_gradient(L));
#pragma unroll
  for (int k = 0; k < kElements; ++k) {
    const float u = below(x[k], max_x), v = below(y[k], max_y), eu = exponential(u), ev = exponential(v);
    x[k] = gradient<L>(row, u, v, eu, ev);
    y[k] -= descent<L>(row, u, v, eu, ev);
    if (kElements > 8 && k % 8 == 7) team.scheduling_barrier();
  }
}

// x ← gradient, y ← moved pseudo-logits, which are the old ones where the weights' label rate is 0.
template <int kThreads, int kElements>
__device__ __forceinline__ void derive(ClassLoss loss, const Team<kThreads>& team, const Row<float>& row, const float (&largest)[2],
                                       float (&x)[kElements], float (&y)[kElements]) {
  if (loss == ClassLoss::kl_reverse)
    derive_for<ClassLoss::kl_reverse>(team, row, largest, x, y);
  else if (loss == ClassLoss::kl)
    derive_for<ClassLoss::kl>(team, row, largest, x, y);
  else
    derive_for<ClassLoss::mse>(team, row, largest, x, y);
}

template <int kElements>
__device__ __forceinline__ float largest_of(const float (&x)[kElements], float so_far) {
#pragma unroll
  for (int k = 0; k < kElements; ++k) so_far = fmaxf(so_far, x[k]);
  return so_far;
}

// ------------------------------------------------------------------------------------------- one sample, all occurrences

// What a team works on.
template <int kThreads>
struct Sample {
  Team<kThreads>& team;
  int32_t slot;
  Occurrences occurrences;
};

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

template <int kThreads, int kElements>
__device__ Slice<kThreads, kElements> slice_of(const StepArguments& a, const Sample<kThreads>& sample, int64_t i,
                                                    int capacity) {
  // Occurrences of a sample may be misaligned each in its own way, while their pseudo-logits stay in the same registers.
  if (sample.occurrences.first != sample.occurrences.last) return {Access::scalar, 0, sample.team.rank, 0};
  const RowAt logits = logits_row(a.batch, a.bank, i), grad = grad_row(a, i);
  if (sample.slot < 0) return choose_slice<kThreads, kElements>(sample.team.rank, capacity, logits, grad, nullptr);
  const RowAt pseudo = bank_row(a.bank, sample.slot);
  return choose_slice<kThreads, kElements>(sample.team.rank, capacity, logits, grad, &pseudo);
}

// ỹ of a row of the bank, or K·onehot(label) less K, so that the largest is 0. Labelled samples own no row.
template <int kThreads, int kElements>
__device__ __forceinline__ void load_pseudo(const Bank& bank, int32_t slot, const Slice<kThreads, kElements>& slice,
                                            float (&y)[kElements]) {
  if (slot >= 0) return load(bank_row(bank, slot), slice, y);
  for_each(slice, [&](int k, int at) {
    y[k] = at < 0 || at >= bank.classes ? -INFINITY : at == -1 - slot ? 0.0f : -bank.label_scale;
  });
}

__device__ inline RowResult result_of(const Row<float>& row, const Weights& weights, int32_t slot, bool agrees) {
  const float loss = weights.alpha * row.class_loss + weights.beta * row.entropy;
  const Kind kind = slot < 0 ? kLabelled : agrees ? kCountedAndAgrees : kCounted;
  return {loss, row.class_loss, row.entropy, row.prediction_confidence, row.pseudo_confidence, float(kind)};
}

__device__ inline Row<float> finish_row(ClassLoss loss, const float (&total)[kSums], const float (&deviations)[3],
                                        const Weights& weights) {
  const Sums<float> sums{total[kP], total[kQ], total[kPU], total[kD]};
  const Deviations<float> squares{deviations[0], deviations[1], deviations[2]};
  const float log_zp = logf(sums.p), log_ratio = logf(sums.p / sums.q);
  if (loss == ClassLoss::kl_reverse) return finish<ClassLoss::kl_reverse>(sums, squares, log_zp, log_ratio, weights);
  if (loss == ClassLoss::kl) return finish<ClassLoss::kl>(sums, squares, log_zp, log_ratio, weights);
  return finish<ClassLoss::mse>(sums, squares, log_zp, log_ratio, weights);
}

// For a row that is not finite: its gradient and what it reports are NaN, and its pseudo-logits stay as they were.
template <int kThreads>
__device__ void write_nan(const StepArguments& a, const Team<kThreads>& team, int64_t i) {
  const RowAt grad = grad_row(a, i);
  for (int at = team.rank; at < grad.classes; at += kThreads) {
    if (grad.dtype == DType::float32)
      reinterpret_cast<float*>(grad.data)[at] = NAN;
    else
      reinterpret_cast<uint16_t*>(grad.data)[at] = 0x7FFF;  // NaN in both 16-bit dtypes
  }
  if (team.rank == 0) report(a.step, a.batch.size, i, {NAN, NAN, NAN, NAN, NAN, float(kBad)});
}

// The step of a row that fits into the registers of its team.
template <int kThreads, int kElements>
__device__ __forceinline__ void step_rows(const StepArguments& a, const Sample<kThreads>& sample) {
  Team<kThreads>& team = sample.team;
  const ClassLoss loss = a.step.class_loss;
  const int last = sample.occurrences.last;
  auto slice = slice_of<kThreads, kElements>(a, sample, last, kThreads * kElements);
  float x[kElements], y[kElements];
  load(logits_row(a.batch, a.bank, sample.occurrences.first), slice, x);
  load_pseudo(a.bank, sample.slot, slice, y);
  for (int i = sample.occurrences.first;;) {
    float largest[2] = {largest_of(x, -INFINITY), largest_of(y, -INFINITY)};
    team.reduce(largest, Max());
    float total[kSums] = {}, deviations[3] = {};
    add_up(loss, team, x, y, largest[0], largest[1], total);
    team.reduce(total, Add());
    if (loss == ClassLoss::mse) {
      if (kElements > 8) {
        largest[0] = team.opaque(largest[0], Use::deviations);
        largest[1] = team.opaque(largest[1], Use::deviations);
      }
      add_deviations(x, y, largest[0], largest[1], 1 / total[kP], 1 / total[kQ], deviations);
      team.reduce(deviations, Add());
    }
    Weights weights = weights_of(a.step);
    if (total[kFinite] == float(a.bank.classes) && finite(weights)) {
      const bool moves = i == last && a.step.update && sample.slot >= 0;
      // This is no branch on every element, because ptxas would keep the values of both ways at once, and spill on sm_100.
      if (!moves) weights.label_rate = 0;
      const Row<float> row = finish_row(loss, total, deviations, weights);
      if (team.rank == 0) report(a.step, a.batch.size, i, result_of(row, weights, sample.slot, total[kBoth] > 0));
      derive(loss, team, row, largest, x, y);
      if (kElements > 8) slice.rank = team.opaque(slice.rank, Use::store);
      store(grad_row(a, i), slice, x);
      if (moves) {
        round_to_bank(a.bank, uint64_t(sample.slot) * a.bank.classes, slice, y);
        store(bank_row(a.bank, sample.slot), slice, y);
      }
    } else {
      write_nan(a, team, i);
    }
    if (i == last) return;
    i = next_occurrence(team, a.batch, i, last);
    load(logits_row(a.batch, a.bank, i), slice, x);
  }
}

// The sums as they would be had the maxima been the new ones.
__device__ inline void rebase(ClassLoss loss, float (&total)[kSums], float old_x, float old_y, float new_x, float new_y) {
  if (total[kP] == 0 && total[kQ] == 0) return;  // nothing has been summed, and the old maxima are −∞
  const float dx = below(old_x, new_x), dy = below(old_y, new_y), sx = exponential(dx), sy = exponential(dy);
  total[kD] = loss == ClassLoss::kl ? sy * (total[kD] + (dx - dy) * total[kQ]) : sx * (total[kD] + (dx - dy) * total[kP]);
  total[kPU] = sx * (total[kPU] + dx * total[kP]);
  total[kP] *= sx, total[kQ] *= sy;
  if (dx < 0 || dy < 0) total[kBoth] = 0;
}

// The step of a row of any length, in pieces: the first read gives maxima and sums, the second gradient and update; mse reads
// once more in between.
template <int kThreads, int kElements>
__device__ __forceinline__ void step_long_rows(const StepArguments& a, const Sample<kThreads>& sample) {
  Team<kThreads>& team = sample.team;
  const ClassLoss loss = a.step.class_loss;
  const int last = sample.occurrences.last;
  auto slice = slice_of<kThreads, kElements>(a, sample, last, INT_MAX);
  const int end = int(a.bank.stride) + slice.head;
  float x[kElements], y[kElements];
  for (int i = sample.occurrences.first;;) {
    const RowAt logits = logits_row(a.batch, a.bank, i);
    float largest[2] = {-INFINITY, -INFINITY}, total[kSums] = {}, deviations[3] = {};
    for (slice.begin = 0; slice.begin < end; slice.begin += slice.kSpan) {
      load(logits, slice, x);
      load_pseudo(a.bank, sample.slot, slice, y);
      const float max_x = largest_of(x, largest[0]), max_y = largest_of(y, largest[1]);
      rebase(loss, total, largest[0], largest[1], max_x, max_y);
      add_up(loss, team, x, y, max_x, max_y, total);
      largest[0] = max_x, largest[1] = max_y;
    }
    const float own[2] = {largest[0], largest[1]};
    team.reduce(largest, Max());
    rebase(loss, total, own[0], own[1], largest[0], largest[1]);
    team.reduce(total, Add());
    if (loss == ClassLoss::mse) {
      for (slice.begin = 0; slice.begin < end; slice.begin += slice.kSpan) {
        load(logits, slice, x);
        load_pseudo(a.bank, sample.slot, slice, y);
        add_deviations(x, y, largest[0], largest[1], 1 / total[kP], 1 / total[kQ], deviations);
      }
      team.reduce(deviations, Add());
    }
    Weights weights = weights_of(a.step);
    if (total[kFinite] == float(a.bank.classes) && finite(weights)) {
      const bool moves = i == last && a.step.update && sample.slot >= 0;
      if (!moves) weights.label_rate = 0;
      const Row<float> row = finish_row(loss, total, deviations, weights);
      if (team.rank == 0) report(a.step, a.batch.size, i, result_of(row, weights, sample.slot, total[kBoth] > 0));
      for (slice.begin = 0; slice.begin < end; slice.begin += slice.kSpan) {
        load(logits, slice, x);
        load_pseudo(a.bank, sample.slot, slice, y);
        derive(loss, team, row, largest, x, y);
        store(grad_row(a, i), slice, x);
        if (!moves) continue;
        round_to_bank(a.bank, uint64_t(sample.slot) * a.bank.classes, slice, y);
        store(bank_row(a.bank, sample.slot), slice, y);
      }
    } else {
      write_nan(a, team, i);
    }
    if (i == last) return;
    i = next_occurrence(team, a.batch, i, last);
  }
}

// The bound gives a thread 128 registers, or 168 where it has 32 elements, and so 16 or 12 warps to an SM. Each warp has up to
// 8 KiB of loads in flight, several times what DRAM latency asks for. With 128 registers, 32 elements spill 8 to 72 bytes.
template <int kThreads, int kElements, bool kLong>
__global__ void __launch_bounds__(Team<kThreads>::kBlock, (kElements > 16 ? 384 : 512) / Team<kThreads>::kBlock)
    step_kernel(const __grid_constant__ StepArguments a) {
  using TeamType = Team<kThreads>;
  TeamType team;
  const int64_t i = int64_t(blockIdx.x) * TeamType::kRows + threadIdx.x / kThreads;
  const bool inside = i < a.batch.size;
  const int64_t number = inside ? sample_at(a.batch, i) : -1;
  const int32_t slot = slot_of(a.bank, number);
  Occurrences occurrences{int(i), int(i)};
  if (a.step.update) occurrences = find_occurrences<TeamType>(a.batch, int(i), slot >= 0 ? number : -1);
  if (inside && slot == kOutside) {
    if (team.rank == 0) atomicOr(a.step.status + 1, kIndexOutOfRange);
    write_nan(a, team, i);
  } else if (inside && occurrences.last == i) {
    const Sample<kThreads> sample{team, slot, occurrences};
    if constexpr (kLong)
      step_long_rows<kThreads, kElements>(a, sample);
    else
      step_rows<kThreads, kElements>(a, sample);
  }
  sum_up<TeamType::kBlock>(a.batch, a.bank, a.step);
}

}  // namespace r2d2
