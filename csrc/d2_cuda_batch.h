// What the teams of a batch need of each other: which of them share a sample, and the sum of what they found.
#pragma once

#include "d2_cuda.h"
#include "d2_cuda_team.h"

namespace r2d2 {

// This is no slot: those of labelled samples go down to −262 144.
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

// Duplicates are settled in one launch: the team of a sample's last occurrence does all of them, so that whoever writes a row is
// the only one to have read it, and no block waits for another. For that each block looks through the whole index for the samples
// of its own teams, 8·B bytes from the L2 cache for each block and so in the order of B² in all. Every thread of the block must
// call this; `sample` is that of the thread's team, −1 where it owns no row.
template <class TeamType>
__device__ Occurrences find_occurrences(const Batch& batch, int position, int64_t sample) {
  constexpr int kHashes = 1024, kAhead = 4;
  // The block's teams are in chains, one for each hash value, so that nearly all samples of the batch are seen at once to be of
  // no team here.
  __shared__ int heads[kHashes], next[TeamType::kRows];
  __shared__ int64_t samples[TeamType::kRows];
  __shared__ int first[TeamType::kRows], last[TeamType::kRows];
  const int team = threadIdx.x / (TeamType::kBlock / TeamType::kRows);
  const bool leads = threadIdx.x % (TeamType::kBlock / TeamType::kRows) == 0;
  const auto hash = [](int64_t s) { return unsigned(s) * 0x9E3779B1u >> 22; };
  for (int h = threadIdx.x; h < kHashes; h += TeamType::kBlock) heads[h] = -1;
  if (leads) samples[team] = sample, first[team] = last[team] = position;
  __syncthreads();
  if (leads && sample >= 0) next[team] = atomicExch(&heads[hash(sample)], team);
  __syncthreads();
  // The type of the index is chosen outside of the loop, and a few elements are loaded ahead: otherwise each load would wait for
  // the one before.
  const auto look_through = [&](const auto* index) {
    for (int64_t begin = threadIdx.x; begin < batch.size; begin += kAhead * TeamType::kBlock) {
      int64_t others[kAhead];
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        const int64_t i = begin + ahead * TeamType::kBlock;
        others[ahead] = index[i < batch.size ? i : batch.size - 1];
      }
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        const int64_t i = begin + ahead * TeamType::kBlock, other = others[ahead];
        for (int t = i < batch.size && other >= 0 ? heads[hash(other)] : -1; t >= 0; t = next[t])
          if (samples[t] == other) {
            atomicMin(&first[t], int(i));
            atomicMax(&last[t], int(i));
          }
      }
    }
  };
  if (batch.index_is_int64)
    look_through(static_cast<const int64_t*>(batch.index));
  else
    look_through(static_cast<const int32_t*>(batch.index));
  __syncthreads();
  return {first[team], last[team]};
}

// The next position after `position` with the sample that occurs last at `last`.
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

// The block that is done last adds up what all have reported, always in the same order, so that every run gives the same bits.
template <int kBlock>
__device__ void sum_up(const Batch& batch, const Bank& bank, const CudaStep& step) {
  __shared__ bool is_last;
  __syncthreads();  // what this block's threads have reported comes before thread 0's fence
  if (threadIdx.x == 0) {
    __threadfence();
    // Wraps to 0 with the last block, so that nothing has to reset it before the next launch.
    is_last = atomicInc(reinterpret_cast<unsigned*>(step.status), gridDim.x - 1) == gridDim.x - 1;
    if (is_last) __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  Team<kBlock> block;
  double loss[1] = {}, sums[kStatistics] = {};
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < batch.size; i += kBlock) loss[0] += __ldcg(step.results + i);
  block.reduce(loss, Add());
  if (step.statistics) {
    // No branch between the loads, or each row would wait twice for the L2 cache.
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < batch.size; i += kBlock) {
      float row[kResults];
#pragma unroll
      for (int plane = kRowClassLoss; plane < kResults; ++plane) row[plane] = __ldcg(step.results + plane * batch.size + i);
      const int kind = int(row[kRowKind]);
      const bool counts = kind == kCounted || kind == kCountedAndAgrees;
      sums[kRows] += counts;
      sums[kClassLoss] += counts ? row[kRowClassLoss] : 0;
      sums[kEntropy] += counts ? row[kRowEntropy] : 0;
      sums[kPredictionConfidence] += counts ? row[kRowPrediction] : 0;
      sums[kPseudoConfidence] += counts ? row[kRowPseudo] : 0;
      sums[kAgreement] += kind == kCountedAndAgrees;
      sums[kSkipped] += kind == kBad;
    }
    block.reduce(sums, Add());
  }
  if (threadIdx.x != 0) return;
  *step.loss = float(loss[0] / double(step.normalizer));
  if (step.update) *bank.updates += 1;
  if (step.statistics)
#pragma unroll
    for (int s = 0; s < kStatistics; ++s) step.statistics[s] += sums[s];
}

}  // namespace r2d2
