// What teams need of each other: which of them share a sample, and the sum of what they found.
#pragma once

#include <cuda/atomic>

#include "d2_cuda.h"
#include "d2_cuda_in_flight.h"
#include "d2_cuda_team.h"

namespace r2d2 {

// This is no slot: those of labelled samples go down to −262 144.
constexpr int32_t kOutside = INT32_MIN;

__device__ __forceinline__ InFlight<int64_t> sample_at(const Batch& batch, int64_t i) {
  if (batch.index_is_int64) return InFlight<int64_t>(static_cast<const int64_t*>(batch.index) + i);
  return InFlight<int64_t>(static_cast<const int32_t*>(batch.index) + i);
}

__device__ __forceinline__ bool known(const Bank& bank, int64_t sample) { return sample >= 0 && sample < bank.samples; }

// ------------------------------------------------------------------------------------------- duplicates

// Where in the batch the sample of a team occurs: last, and before that at places that Search::next() tells one by one.
struct Occurrences {
  int last, note;
};

// Duplicates are settled in one launch: the team of a sample's last occurrence does all of them, so that whoever writes a row is
// the only one to have read it, and no block waits for another. For that each block looks through the whole index for the samples
// of its own teams, 8·B bytes from the L2 cache for each block and so in the order of B² in all.
//
// This lies in shared memory. All threads of the block call its functions, in the order in which they stand here.
template <class TeamType>
class Search {
 public:
  // Elements of the index on their way to a thread: vectors of 16 bytes, and one of the few before and after those.
  struct Ahead {
    static constexpr int kVectors = 4;
    InFlight<uint4> vectors[kVectors];
    InFlight<int64_t> loose;
  };

  // Nothing here depends on the team's own sample, so that it is done while that is on its way.
  __device__ Ahead start(const Batch& batch) {
    for (int h = threadIdx.x; h < kHashes; h += TeamType::kBlock) heads_[h] = kNone;
    if (threadIdx.x == 0) used_ = 0;
    const Parts parts(batch);
    Ahead ahead;
    request(parts, threadIdx.x, ahead);
    if (threadIdx.x < parts.loose) ahead.loose = sample_at(batch, parts.loose_position(threadIdx.x));
    __syncthreads();
    return ahead;
  }

  // `sample` is that of the thread's team, −1 where it owns no row; `position` its place in the batch.
  __device__ Occurrences find(const Batch& batch, const TeamType& team, int position, int64_t sample, const Ahead& ahead) {
    if (team.rank == 0) {
      samples_[team.number] = sample;
      positions_[team.number] = last_[team.number] = position;
      met_[team.number] = kNone;
      // The block's teams are in chains, one for each hash value, so that nearly all samples of the batch are seen at once to be
      // of no team here.
      if (sample >= 0) next_[team.number] = atomicExch(&heads_[hash(sample)], team.number);
    }
    __syncthreads();
    const Parts parts(batch);
    look_through(parts, ahead);
    if (threadIdx.x < parts.loose) note(parts.loose_position(threadIdx.x), ahead.loose.get());
    __syncthreads();
    return {last_[team.number], met_[team.number]};
  }

  // Of the occurrences before the last one each in turn, and then the last; `position` is the one before, −1 at first.
  __device__ int next(const Batch& batch, TeamType& team, Occurrences& occurrences, int position) const {
    if (occurrences.note == kNone) return occurrences.last;
    if (used_ <= kNotes) {
      const InFlight<int> found(&notes_[occurrences.note].position), following(&notes_[occurrences.note].next);
      occurrences.note = following.get();
      return found.get();
    }
    // There was no room to note all, and what has been noted is left aside: the team goes through the index by itself.
    const int64_t sample = samples_[team.number];
#pragma unroll 1
    for (int begin = position + 1; begin < occurrences.last; begin += TeamType::kThreads) {
      const int i = begin + team.rank;
      const bool same = i < occurrences.last && sample_at(batch, i).get() == sample;
      const int found = team.reduce(same ? i : occurrences.last, Min());
      if (found < occurrences.last) return found;
    }
    return occurrences.last;
  }

 private:
  static constexpr int kHashes = 512, kNotes = 256, kNone = -1;

  struct Note {
    int position, next;
  };

  // The index divided: `head` elements before the first multiple of 16 bytes, vectors of 16 bytes, and what is left.
  struct Parts {
    const char* data;
    bool is_int64;
    int head, vectors, loose;

    __device__ explicit Parts(const Batch& batch) : data(static_cast<const char*>(batch.index)), is_int64(batch.index_is_int64) {
      const int size = int(batch.size);
      head = int(-uintptr_t(data) % 16) >> (is_int64 ? 3 : 2);
      if (head > size) head = size;
      vectors = (size - head) >> (is_int64 ? 1 : 2);
      loose = size - elements(vectors);
    }
    __device__ int elements(int vectors) const { return vectors << (is_int64 ? 1 : 2); }
    __device__ int loose_position(int number) const { return number < head ? number : number + elements(vectors); }
    __device__ int vector_position(int number) const { return head + elements(number); }
    __device__ const uint4* vector(int number) const {
      return reinterpret_cast<const uint4*>(data + (int64_t(vector_position(number)) << (is_int64 ? 3 : 2)));
    }
  };

  static __device__ unsigned hash(int64_t sample) { return unsigned(sample) * 0x9E3779B1u >> 23; }

  __device__ static void request(const Parts& parts, int first, Ahead& ahead) {
#pragma unroll
    for (int v = 0; v < Ahead::kVectors; ++v)
      if (const int number = first + v * TeamType::kBlock; number < parts.vectors)
        ahead.vectors[v] = InFlight<uint4>(parts.vector(number));
  }

  __device__ void look_through(const Parts& parts, Ahead ahead) {
#pragma unroll 1
    for (int first = threadIdx.x; first < parts.vectors;) {
#pragma unroll
      for (int v = 0; v < Ahead::kVectors; ++v) {
        const int number = first + v * TeamType::kBlock;
        if (number >= parts.vectors) break;
        const uint4 words = ahead.vectors[v].get();
        const int position = parts.vector_position(number);
        if (parts.is_int64) {
          note_all<2>(position, {int64_t(words.x | uint64_t(words.y) << 32), int64_t(words.z | uint64_t(words.w) << 32)});
        } else {
          note_all<4>(position, {int(words.x), int(words.y), int(words.z), int(words.w)});
        }
      }
      first += Ahead::kVectors * TeamType::kBlock;
      request(parts, first, ahead);
    }
  }

  template <int kCount>
  __device__ void note_all(int position, const int64_t (&samples)[kCount]) {
    InFlight<int> chains[kCount];
#pragma unroll
    for (int e = 0; e < kCount; ++e) chains[e] = InFlight<int>(&heads_[hash(samples[e])]);
#pragma unroll
    for (int e = 0; e < kCount; ++e) note(position + e, samples[e], chains[e].get());
  }

  __device__ void note(int i, int64_t sample) { note(i, sample, heads_[hash(sample)]); }

  // Notes position i of the batch for the teams of this sample, if they are in this chain.
  __device__ void note(int i, int64_t sample, int chain) {
#pragma unroll 1
    for (int t = chain; t != kNone;) {
      const InFlight<int64_t> sample_of(&samples_[t]);
      const InFlight<int> position_of(&positions_[t]), following(&next_[t]);
      const int position = position_of.get();
      if (sample_of.get() == sample && i > position) atomicMax(&last_[t], i);
      if (sample_of.get() == sample && i < position) {
        const int number = atomicAdd(&used_, 1);
        const int before = atomicExch(&met_[t], number < kNotes ? number : 0);
        if (number < kNotes) notes_[number].position = i, notes_[number].next = before;
      }
      t = following.get();
    }
  }

  int heads_[kHashes], next_[TeamType::kRows];
  int64_t samples_[TeamType::kRows];
  int positions_[TeamType::kRows], last_[TeamType::kRows], met_[TeamType::kRows];
  Note notes_[kNotes];
  int used_;
};

// ------------------------------------------------------------------------------------------- sums over the batch

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

// Whether all blocks have reported, this one last. A block adds the launch's own number to the ticket, which was 0: after the last
// block it is that number times the blocks. Where an earlier launch was cut short, or another one runs on the same bank at the same
// time, the ticket gets there in no block: the loss stays the NaN that it was set to at the beginning, and bank.check() finds the
// ticket, until load_state_dict() mends it.
__device__ inline bool reports_last(const CudaStep& step) {
  __shared__ bool is_last;
  __syncthreads();  // what this block's threads have reported comes before thread 0's ticket
  if (threadIdx.x == 0) {
    const cuda::atomic_ref<unsigned, cuda::thread_scope_device> ticket(*reinterpret_cast<unsigned*>(step.status));
    is_last = ticket.fetch_add(step.launch, cuda::memory_order_acq_rel) + step.launch == step.launch * gridDim.x;
  }
  __syncthreads();
  return is_last;
}

// Adds up what all blocks have reported, always in the same order, so that every run gives the same bits.
template <int kBlock, bool kWithStatistics>
__device__ void sum_up(const Batch& batch, const Bank& bank, const CudaStep& step) {
  // Every plane of so many rows is on its way to a thread before it waits for one.
  constexpr int kTogether = kWithStatistics ? 2 : 8, kPlanes = kWithStatistics ? kResults : 1;
  enum { kLoss = kStatistics, kSums };
  InFlight<int64_t> updates;
  InFlight<double> before[kStatistics];
  if (threadIdx.x == 0) {
    updates = InFlight<int64_t>(bank.updates);
    if (kWithStatistics)
#pragma unroll
      for (int s = 0; s < kStatistics; ++s) before[s] = InFlight<double>(step.statistics + s);
  }
  double sums[kWithStatistics ? kSums : 1] = {};
  double& loss = sums[kWithStatistics ? kLoss : 0];
#pragma unroll 1
  for (int64_t first = threadIdx.x; first < batch.size; first += kTogether * kBlock) {
    InFlight<float> rows[kTogether][kPlanes];
#pragma unroll
    for (int r = 0; r < kTogether; ++r)
      if (const int64_t i = first + r * kBlock; i < batch.size)
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) rows[r][plane] = InFlight<float>(step.results + plane * batch.size + i);
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      if (first + r * kBlock >= batch.size) break;
      loss += rows[r][kRowLoss].get();
      if constexpr (kWithStatistics) {
        const int kind = int(rows[r][kRowKind].get());
        const bool counts = kind == kCounted || kind == kCountedAndAgrees;
        sums[kRows] += counts;
        sums[kClassLoss] += counts ? rows[r][kRowClassLoss].get() : 0;
        sums[kEntropy] += counts ? rows[r][kRowEntropy].get() : 0;
        sums[kPredictionConfidence] += counts ? rows[r][kRowPrediction].get() : 0;
        sums[kPseudoConfidence] += counts ? rows[r][kRowPseudo].get() : 0;
        sums[kAgreement] += kind == kCountedAndAgrees;
        sums[kSkipped] += kind == kBad;
      }
    }
  }
  Team<kBlock> block;
  block.reduce(sums, Add());
  if (threadIdx.x != 0) return;
  *step.loss = float(loss / double(step.normalizer));
  step.status[0] = 0;
  if (step.update) *bank.updates = updates.get() + 1;
  if constexpr (kWithStatistics)
#pragma unroll
    for (int s = 0; s < kStatistics; ++s) step.statistics[s] = before[s].get() + sums[s];
}

}  // namespace r2d2
