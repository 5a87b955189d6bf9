// A batch on a CPU: its indices are checked, overridden duplicates come first, threads share the rows, sums have a fixed order.
#include "d2_cpu.h"

#include <vector>

#include "dispatch.h"

namespace r2d2 {
namespace {

// Each thread gets at least so many elements: about 20 µs of work, several times what waking the thread costs.
constexpr int64_t kElementsPerThread = 16384;

struct Workspace {
  std::vector<int32_t> slots, order, seen;
  std::vector<RowResult> results;
};

template <class Index>
int64_t look_up(const Batch& batch, const Bank& bank, int32_t* slots) {
  const Index* index = static_cast<const Index*>(batch.index);
  for (int64_t i = 0; i < batch.size; ++i) {
    const int64_t s = index[i];
    if (s < 0 || s >= bank.samples) return i;
    slots[i] = bank.slots[s];
  }
  return -1;
}

// Fills workspace.slots; returns the position of a bad index, or −1.
int64_t look_up(const Batch& batch, const Bank& bank, Workspace& work) {
  work.slots.resize(batch.size);
  int32_t* slots = work.slots.data();
  return batch.index_is_int64 ? look_up<int64_t>(batch, bank, slots) : look_up<int32_t>(batch, bank, slots);
}

// Fills workspace.order with the positions of a batch, those that a later occurrence of their row overrides first, and returns
// how many these are. They only read the row: all of them are done before anything is written, so that they read the old one.
int64_t overridden_first(Workspace& work) {
  const int64_t size = work.slots.size();
  int bits = 4;
  while ((int64_t(1) << bits) < 2 * size) ++bits;
  const int64_t capacity = int64_t(1) << bits;
  work.seen.assign(capacity, -1);
  work.order.resize(size);
  int64_t first = 0, last = size;
  for (int64_t i = size - 1; i >= 0; --i) {
    const int32_t slot = work.slots[i];
    bool overridden = false;
    if (slot >= 0) {
      // The upper bits of the product: the lower ones would map evenly spaced slots onto few places.
      int64_t at = int64_t(uint64_t(slot) * 0x9E3779B97F4A7C15u >> (64 - bits));
      while (work.seen[at] >= 0 && work.seen[at] != slot) at = (at + 1) & (capacity - 1);
      overridden = work.seen[at] == slot;
      work.seen[at] = slot;
    }
    work.order[overridden ? first++ : --last] = int32_t(i);
  }
  return first;
}

template <class F>
void parallel_for(int64_t count, int64_t classes, int threads, F rows) {
  const int64_t useful = count * classes / kElementsPerThread;
  if (threads > useful) threads = int(useful);
  if (threads <= 1) return rows(0, count);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; ++t) rows(count * t / threads, count * (t + 1) / threads);
}

void sum_up(const Batch& batch, const Step& step, const Workspace& work) {
  double loss = 0;
  for (const RowResult& r : work.results) loss += r.loss;
  *step.loss = float(loss / step.normalizer);
  if (step.row_losses)
    for (int64_t i = 0; i < batch.size; ++i) step.row_losses[i] = work.results[i].loss;
  if (!step.statistics) return;
  for (int64_t i = 0; i < batch.size; ++i) {
    const RowResult& r = work.results[i];
    step.statistics[kSkipped] += !r.sound;
    if (!r.sound || work.slots[i] < 0) continue;
    step.statistics[kRows] += 1;
    step.statistics[kClassLoss] += r.class_loss;
    step.statistics[kEntropy] += r.entropy;
    step.statistics[kPredictionConfidence] += r.prediction_confidence;
    step.statistics[kPseudoConfidence] += r.pseudo_confidence;
    step.statistics[kAgreement] += r.agreement;
  }
}

Workspace& workspace() {
  static thread_local Workspace work;
  return work;
}

}  // namespace

int64_t d2_step(const Batch& batch, const Bank& bank, const Step& step) {
  Workspace& work = workspace();
  const int64_t bad = look_up(batch, bank, work);
  if (bad >= 0) return bad;
  const int64_t overridden = overridden_first(work);
  work.results.resize(batch.size);
  const Kernels& kernels = best_kernels();
  const auto rows = [&](int64_t offset, bool update) {
    return [&, offset, update](int64_t begin, int64_t end) {
      kernels.step_rows(batch, bank, step, update, work.slots.data(), work.order.data(), offset + begin, offset + end,
                        work.results.data());
    };
  };
  parallel_for(overridden, bank.classes, step.threads, rows(0, false));
  parallel_for(batch.size - overridden, bank.classes, step.threads, rows(overridden, step.update));
  *bank.updates += step.update;
  sum_up(batch, step, work);
  return -1;
}

int64_t predict(const Batch& batch, const Bank& bank, int threads, int64_t* skipped, int64_t* first_skipped) {
  Workspace& work = workspace();
  const int64_t bad = look_up(batch, bank, work);
  if (bad >= 0) return bad;
  const int64_t overridden = overridden_first(work);
  work.results.resize(batch.size);
  const Kernels& kernels = best_kernels();
  parallel_for(batch.size - overridden, bank.classes, threads, [&](int64_t begin, int64_t end) {
    for (int64_t k = overridden + begin; k < overridden + end; ++k) {
      const int32_t i = work.order[k], slot = work.slots[i];
      work.results[i].sound = slot < 0 || kernels.predict_row(batch, bank, i, slot);
    }
  });
  *skipped = 0;
  for (int64_t k = batch.size - 1; k >= overridden; --k) {
    const int32_t i = work.order[k];
    if (work.results[i].sound) continue;
    if (!*skipped || i < *first_skipped) *first_skipped = i;
    ++*skipped;
  }
  return -1;
}

}  // namespace r2d2
