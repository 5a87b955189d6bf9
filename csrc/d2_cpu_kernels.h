// From rows to a batch: which rows go together, where their data lies, and what is written back.
#pragma once

#include "d2_cpu_rows.h"

namespace r2d2 {
namespace {

// Rows of floats, readable and writable up to the next multiple of kLanes. The memory is kept between calls, because a fresh 5 MB
// for the widest row would cost more in page faults than the row itself.
class Scratch {
 public:
  explicit Scratch(int64_t classes) : pitch_((classes + 31) / 16 * 16) {
    static thread_local struct Buffer {
      float* data = nullptr;
      int64_t size = 0;
      ~Buffer() { free(data); }
    } buffer;
    if (buffer.size < kRows * pitch_) {
      free(buffer.data);
      buffer.size = kRows * pitch_;
      buffer.data = static_cast<float*>(aligned_alloc(64, buffer.size * sizeof(float)));
      if (!buffer.data) abort();
    }
    data_ = buffer.data;
  }
  float* row(int i) const { return data_ + i * pitch_; }

 private:
  static constexpr int kRows = 5;
  int64_t pitch_;
  float* data_;
};

inline bool all_finite(const float* x, int64_t n) {
  for (int64_t j = 0; j < n; ++j)
    if (!(fabsf(x[j]) <= FLT_MAX)) return false;
  return true;
}

// A gap of more than FLT_MAX to the largest number would make u infinite: gaps are cut to 1e33, and with them the class
// loss of such a row, which is finite but no longer exact. Not further: beside 3.4e38, 1e31 is less than the spacing of float32.
inline const float* cut_gaps(const float* x, float largest, float* out, int64_t n) {
  for (int64_t j = 0; j < n; ++j) out[j] = x[j] > largest - 1e33f ? x[j] : largest - 1e33f;
  return out;
}

inline void clamp_row(float* x, int64_t n, float largest) {
  for (int64_t j = 0; j < n; ++j) x[j] = x[j] > largest ? largest : x[j] < -largest ? -largest : x[j];
}

inline char* bank_row(const Bank& bank, int32_t slot) {
  return static_cast<char*>(bank.rows) + slot * bank.stride * element_size(bank.dtype);
}

inline const char* logits_row(const Batch& batch, int64_t position) {
  return static_cast<const char*>(batch.logits) + position * batch.stride * element_size(batch.dtype);
}

// The step over the rows of one batch. The class loss and whether statistics are kept are template arguments; dtypes are the
// business of RowIO.
template <ClassLoss L, bool kStats>
class StepKernel {
 public:
  StepKernel(const Batch& batch, const Bank& bank, const Step& step, bool update, const int32_t* slots, RowResult* results)
      : batch_(batch), bank_(bank), step_(step), update_(update), slots_(slots), results_(results),
        logits_io_(kRowIO[int(batch.dtype)]), bank_io_(kRowIO[int(bank.dtype)]), n_(bank.classes),
        scratch_(n_) {}

  void run(const int32_t* order, int64_t begin, int64_t end) const {
    int64_t ahead = begin;
    if (n_ <= kTileClasses) {
      for (int64_t i = begin; i < end; i += kLanes) {
        for (; ahead < end && ahead < i + kTiledRowsAhead; ++ahead) prefetch<kLine>(slots_[order[ahead]]);
        tile(order + i, end - i < kLanes ? int(end - i) : kLanes);
      }
    } else {
      for (int64_t i = begin; i < end; ++i) {
        if (ahead < i + kRowsAhead)
          for (; ahead < end && ahead < i + 2 * kRowsAhead; ++ahead) prefetch<kPage>(slots_[order[ahead]]);
        row(order[i], i + 1 < end ? order[i + 1] : -1);
      }
    }
  }

 private:
  // Up to so many classes lanes are rows, so that no sum crosses lanes and no lane idles in a tail.
  static constexpr int kTileClasses = 64;

  // Rows of the bank lie anywhere in memory, so that this many of them are prefetched while others are worked on. Of long rows only
  // the pages, a block of rows at a time: walks of the page table go on side by side, but one for each row would be waited for.
  static constexpr int kTiledRowsAhead = 256, kRowsAhead = 48;
  static constexpr int kLine = 64, kPage = 4096;

  // Inlined by force: GCC drops a call of a function that does nothing but prefetch.
  template <int kApart>
  R2D2_INLINE void prefetch(int32_t slot) const {
    if (slot < 0) return;
    const char *row = bank_row(bank_, slot), *end = row + n_ * element_size(bank_.dtype);
    for (; row < end; row += kApart) __builtin_prefetch(row);
    __builtin_prefetch(end - 1);
  }

  char* grad_row(int64_t i) const { return static_cast<char*>(step_.grad) + i * n_ * element_size(batch_.dtype); }
  bool moves(int32_t slot) const { return update_ && slot >= 0; }
  // float32 is read and written where it lies, without a copy in scratch.
  bool in_place(DType dtype) const { return dtype == DType::float32; }

  // `next`: the row after this one, −1 if there is none.
  void row(int32_t i, int32_t next) const {
    const int32_t slot = slots_[i];
    RowView r{};
    r.classes = n_;
    r.eu = scratch_.row(2), r.ev = scratch_.row(3);
    if (next >= 0) {
      if (slots_[next] >= 0) r.pseudo = {bank_row(bank_, slots_[next]), n_ * element_size(bank_.dtype)};
      r.logits = {logits_row(batch_, next), n_ * element_size(batch_.dtype)};
      r.grad = {grad_row(next), n_ * element_size(batch_.dtype)};
    }
    r.x = read(logits_io_, batch_.dtype, logits_row(batch_, i), scratch_.row(0), r.max_x);
    if (slot >= 0)
      r.y = read(bank_io_, bank_.dtype, bank_row(bank_, slot), scratch_.row(1), r.max_y);
    else
      r.y = labelled(-1 - slot, scratch_.row(1), 1);
    bool agreement;
    Sums<float> sums = sum_row<L, kStats>(r, agreement);
    const float* y = r.y;
    if (!sound(sums)) {
      if (!all_finite(r.x, n_) || !all_finite(r.y, n_)) return write_nan(i);
      r.x = cut_gaps(r.x, r.max_x, scratch_.row(0), n_);
      r.y = cut_gaps(r.y, r.max_y, scratch_.row(4), n_);
      sums = sum_row<L, kStats>(r, agreement);
    }
    Deviations<float> deviations;
    if (L == ClassLoss::mse) deviations = sum_deviations(r, sums);
    Vec ratios = splat(sums.p);
    ratios[1] = sums.p / sums.q;
    const Vec logs = log(ratios);
    const Row<float> c = finish<L>(sums, deviations, logs[0], logs[1], step_.weights);
    results_[i] = result(c.class_loss, c.entropy, c.prediction_confidence, c.pseudo_confidence, agreement);

    float* grad = in_place(batch_.dtype) ? reinterpret_cast<float*>(grad_row(i)) : r.eu;
    if (moves(slot)) {
      float* moved = in_place(bank_.dtype) ? reinterpret_cast<float*>(bank_row(bank_, slot)) : r.ev;
      write_gradient<L, true>(r, c, y, bank_io_.largest, grad, moved);
      if (!in_place(bank_.dtype)) write_bank(slot, moved);
    } else {
      write_gradient<L, false>(r, c, y, bank_io_.largest, grad, nullptr);
    }
    if (!in_place(batch_.dtype)) logits_io_.write_row(grad_row(i), grad, n_);
  }

  void tile(const int32_t* order, int rows) const {
    alignas(64) float x[kTileClasses * kLanes], y[kTileClasses * kLanes], eu[kTileClasses * kLanes], ev[kTileClasses * kLanes];
    read_tiles(order, rows, x, y);
    Vec max_x = load(x), max_y = load(y);
    for (int64_t j = kLanes; j < n_ * kLanes; j += kLanes) max_x = max(load(x + j), max_x), max_y = max(load(y + j), max_y);
    Sums<Vec> sums;
    Vec both = splat(-INFINITY);
    for (int64_t j = 0; j < n_ * kLanes; j += kLanes) {
      const Vec u = load(x + j) - max_x, v = load(y + j) - max_y;
      Vec e[2];
      exp({u, v}, e);
      const Vec a = e[0], b = e[1];
      store(eu + j, a), store(ev + j, b);
      accumulate<L>(sums, u, v, a, b);
      if (kStats) both = max(u + v, both);
    }
    Deviations<Vec> deviations;
    if (L == ClassLoss::mse)
      for (int64_t j = 0; j < n_ * kLanes; j += kLanes) accumulate(deviations, load(eu + j) / sums.p, load(ev + j) / sums.q);
    const Row<Vec> c = finish<L>(sums, deviations, log(sums.p), log(sums.p / sums.q), step_.weights);
    for (int64_t j = 0; j < n_ * kLanes; j += kLanes) {
      const Vec u = load(x + j) - max_x, v = load(y + j) - max_y, a = load(eu + j), b = load(ev + j);
      store(eu + j, gradient<L>(c, u, v, a, b));
      store(ev + j, load(y + j) - descent<L>(c, u, v, a, b));
    }
    const IntVec good = sound(sums);
    void *grads[kLanes], *moved[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int32_t i = order[lane < rows ? lane : rows - 1];
      const bool counts = lane < rows && good[lane];
      grads[lane] = counts ? grad_row(i) : nullptr;
      moved[lane] = counts && moves(slots_[i]) ? bank_row(bank_, slots_[i]) : nullptr;
      if (counts)
        results_[i] = result(c.class_loss[lane], c.entropy[lane], c.prediction_confidence[lane], c.pseudo_confidence[lane],
                             kStats && both[lane] == 0);
    }
    logits_io_.write_tile(grads, eu, n_);
    clamp_row(ev, n_ * kLanes, bank_io_.largest);
    if (bank_.stochastic)
      for (int lane = 0; lane < rows; ++lane) {
        if (!moved[lane]) continue;
        float* row = scratch_.row(3);
        for (int64_t j = 0; j < n_; ++j) row[j] = ev[j * kLanes + lane];
        write_bank(slots_[order[lane]], row);
      }
    else
      bank_io_.write_tile(moved, ev, n_);
    for (int lane = 0; lane < rows; ++lane)
      if (!good[lane]) row(order[lane], -1);  // tells a bad row from one that only has gaps to be cut
  }

  // Lanes past `rows` repeat the last.
  void read_tiles(const int32_t* order, int rows, float* x, float* y) const {
    const void *logits[kLanes], *pseudo[kLanes];
    const void* any = nullptr;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int32_t i = order[lane < rows ? lane : rows - 1];
      logits[lane] = logits_row(batch_, i);
      pseudo[lane] = slots_[i] >= 0 ? bank_row(bank_, slots_[i]) : nullptr;
      if (pseudo[lane]) any = pseudo[lane];
    }
    for (const void*& row : pseudo)
      if (!row) row = any;
    logits_io_.read_tile(logits, x, n_);
    if (any) bank_io_.read_tile(pseudo, y, n_);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int32_t slot = slots_[order[lane < rows ? lane : rows - 1]];
      if (slot < 0) labelled(-1 - slot, y + lane, kLanes);
    }
  }

  const float* read(const RowIO& io, DType dtype, const char* from, float* scratch, float& largest) const {
    float* to = in_place(dtype) ? reinterpret_cast<float*>(const_cast<char*>(from)) : scratch;
    largest = io.read_row(from, to, n_);
    return to;
  }

  // K·onehot(label) less K, so that the largest is 0.
  const float* labelled(int32_t label, float* y, int stride) const {
    for (int64_t j = 0; j < n_; ++j) y[j * stride] = -bank_.label_scale;
    y[label * stride] = 0;
    return y;
  }

  void write_bank(int32_t slot, const float* moved) const {
    if (bank_.stochastic)
      bank_io_.round_row(bank_row(bank_, slot), moved, n_, uint64_t(slot) * n_, uint64_t(*bank_.updates), bank_.seed);
    else
      bank_io_.write_row(bank_row(bank_, slot), moved, n_);
  }

  RowResult result(float class_loss, float entropy, float prediction, float pseudo, bool agreement) const {
    const float loss = step_.weights.alpha * class_loss + step_.weights.beta * entropy;
    return {loss, class_loss, entropy, prediction, pseudo, agreement, true};
  }

  void write_nan(int32_t i) const {
    float* nan = scratch_.row(2);
    for (int64_t j = 0; j < n_; ++j) nan[j] = NAN;
    logits_io_.write_row(grad_row(i), nan, n_);
    results_[i] = {NAN, NAN, NAN, NAN, NAN, false, false};
  }

  const Batch& batch_;
  const Bank& bank_;
  const Step& step_;
  const bool update_;
  const int32_t* slots_;
  RowResult* results_;
  const RowIO &logits_io_, &bank_io_;
  const int64_t n_;
  const Scratch scratch_;
};

template <ClassLoss L>
void step_rows_of(const Batch& batch, const Bank& bank, const Step& step, bool update, const int32_t* slots,
                  const int32_t* order, int64_t begin, int64_t end, RowResult* results) {
  if (step.statistics)
    StepKernel<L, true>(batch, bank, step, update, slots, results).run(order, begin, end);
  else
    StepKernel<L, false>(batch, bank, step, update, slots, results).run(order, begin, end);
}

void step_rows(const Batch& batch, const Bank& bank, const Step& step, bool update, const int32_t* slots,
               const int32_t* order, int64_t begin, int64_t end, RowResult* results) {
  constexpr decltype(&step_rows) kByLoss[] = {step_rows_of<ClassLoss::kl_reverse>, step_rows_of<ClassLoss::kl>,
                                              step_rows_of<ClassLoss::mse>};
  kByLoss[int(step.class_loss)](batch, bank, step, update, slots, order, begin, end, results);
}

bool predict_row(const Batch& batch, const Bank& bank, int64_t position, int32_t slot) {
  const RowIO &from = kRowIO[int(batch.dtype)], &to = kRowIO[int(bank.dtype)];
  float* row = Scratch(bank.classes).row(0);
  from.read_row(logits_row(batch, position), row, bank.classes);
  if (!all_finite(row, bank.classes)) return false;
  clamp_row(row, bank.classes, to.largest);
  to.write_row(bank_row(bank, slot), row, bank.classes);
  return true;
}

}  // namespace
}  // namespace r2d2
