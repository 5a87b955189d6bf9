// What the teams of a batch need of each other: which of them share a sample, and the sum of what they found.
#pragma once

#include "d2_cuda.h"
#include "d2_cuda_team.h"

namespace r2d2 {

// Not a slot: labels go down to −262 144.
constexpr int32_t kOutside = INT32_MIN;

__device__ __forceinline__ int64_t sample_at(const Batch& batch, int64_t i) {
  return batch.index_is_int64 ? static_cast<const int64_t*>(batch.index)[i] : static_cast<const int32_t*>(batch.index)[i];
}

__device__ __forceinline__ int32_t slot_of(const Bank& bank, int64_t sample) {
  return sample < 0 || sample >= bank.samples ? kOutside : bank.slots[sample];
}

// Positions in the batch of the first and the last occurrence of a team's sample.
struct Occurrences {
  int first, last;
};

// Rule 4 in one launch: the team of a sample's last occurrence does all of them, so that whoever writes a row is the only one
// to have read it, and no block waits for another. Each block looks through the whole index for the samples of its own teams:
// B·8 bytes from the L2 cache a block, less than its rows until B is near 4·N·(teams of a block).
// Every thread of the block must call; `sample` is that of the thread's team, −1 where it owns no row.
template <class TeamType>
__device__ Occurrences find_occurrences(const Batch& batch, int position, int64_t sample) {
  __shared__ unsigned filter[32];  // 1024 bits, one for each value of a hash: most samples are seen to be nobody's at once
  __shared__ int64_t samples[TeamType::kRows];
  __shared__ int first[TeamType::kRows], last[TeamType::kRows];
  const int team = threadIdx.x / (TeamType::kBlock / TeamType::kRows);
  const bool leads = threadIdx.x % (TeamType::kBlock / TeamType::kRows) == 0;
  const auto bit = [](int64_t s) { return unsigned(s) * 0x9E3779B1u >> 22; };
  if (threadIdx.x < 32) filter[threadIdx.x] = 0;
  if (leads) samples[team] = sample, first[team] = last[team] = position;
  __syncthreads();
  if (leads && sample >= 0) atomicOr(&filter[bit(sample) / 32], 1u << bit(sample) % 32);
  __syncthreads();
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < batch.size; i += TeamType::kBlock) {
    const int64_t other = sample_at(batch, i);
    if (!(filter[bit(other) / 32] >> bit(other) % 32 & 1)) continue;
    for (int t = 0; t < TeamType::kRows; ++t)
      if (samples[t] == other && other >= 0) {
        atomicMin(&first[t], int(i));
        atomicMax(&last[t], int(i));
      }
  }
  __syncthreads();
  return {first[team], last[team]};
}

// The next position after one that has the sample which is last at `last`.
template <int kThreads>
__device__ int next_occurrence(Team<kThreads>& team, const Batch& batch, int position, int last) {
  const int64_t sample = sample_at(batch, last);
  for (int begin = position + 1; begin < last; begin += kThreads) {
    const int i = begin + team.rank;
    const int found = team.reduce(i < last && sample_at(batch, i) == sample ? i : last, Min());
    if (found < last) return found;
  }
  return last;
}

struct RowResult {
  float loss, class_loss, entropy, prediction, pseudo, kind;
};

// What a row counts as in the statistics.
enum Kind { kLabelled, kCounted, kCountedAndAgrees, kBad };

__device__ inline void report(const CudaStep& step, int64_t size, int64_t i, const RowResult& result) {
  step.results[i] = result.loss;
  if (!step.statistics) return;
  step.results[kRowClassLoss * size + i] = result.class_loss;
  step.results[kRowEntropy * size + i] = result.entropy;
  step.results[kRowPrediction * size + i] = result.prediction;
  step.results[kRowPseudo * size + i] = result.pseudo;
  step.results[kRowKind * size + i] = result.kind;
}

// The block that is done last adds up what all have reported, always in the same order (rule 5).
template <int kBlock>
__device__ void sum_up(const Batch& batch, const Bank& bank, const CudaStep& step) {
  __shared__ bool is_last;
  __syncthreads();  // what this block's threads have reported comes before thread 0's fence
  if (threadIdx.x == 0) {
    __threadfence();
    // Wraps to 0 with the last block, so that nothing has to reset it before the next launch.
    is_last = atomicInc(reinterpret_cast<unsigned*>(step.status), gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  Team<kBlock> block;
  double loss[1] = {}, sums[kStatistics] = {};
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < batch.size; i += kBlock) loss[0] += __ldcg(step.results + i);
  block.reduce(loss, Add());
  if (step.statistics) {
    for (int64_t i = threadIdx.x; i < batch.size; i += kBlock) {
      const int kind = int(__ldcg(step.results + kRowKind * batch.size + i));
      sums[kSkipped] += kind == kBad;
      if (kind != kCounted && kind != kCountedAndAgrees) continue;
      sums[kRows] += 1;
      sums[kClassLoss] += __ldcg(step.results + kRowClassLoss * batch.size + i);
      sums[kEntropy] += __ldcg(step.results + kRowEntropy * batch.size + i);
      sums[kPredictionConfidence] += __ldcg(step.results + kRowPrediction * batch.size + i);
      sums[kPseudoConfidence] += __ldcg(step.results + kRowPseudo * batch.size + i);
      sums[kAgreement] += kind == kCountedAndAgrees;
    }
    block.reduce(sums, Add());
  }
  if (threadIdx.x != 0) return;
  *step.loss = float(loss[0] / double(step.normalizer));
  if (step.update) *bank.step += 1;
  if (step.statistics)
#pragma unroll
    for (int s = 0; s < kStatistics; ++s) step.statistics[s] += sums[s];
}

}  // namespace r2d2
