// Every kernel over exactly sized heap buffers, for AddressSanitizer and UBSan (tests/test_package.py).
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <vector>

#include "d2_cpu.h"
#include "dispatch.h"

using namespace r2d2;

int main() {
  int runs = 0;
  for (const Kernels* kernels : runnable_kernels()) {
    use_kernels(kernels->name);
    for (int64_t classes : {2, 3, 5, 8, 15, 16, 17, 63, 64, 65, 100, 129, 1000})
      for (int logits_dtype = 0; logits_dtype < 3; ++logits_dtype)
        for (int bank_dtype = 0; bank_dtype < 3; ++bank_dtype)
          for (int loss = 0; loss < 3; ++loss)
            for (int variant = 0; variant < 4; ++variant) {
              const int64_t rows = 7, samples = 10, size = 13, stride = classes + variant;
              std::vector<int32_t> slots = {0, -1, 1, 2, -2, 3, 4, 5, -1, 6};
              std::vector<int64_t> index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 3};
              const int64_t a = element_size(DType(logits_dtype)), b = element_size(DType(bank_dtype));
              std::vector<char> logits(((size - 1) * stride + classes) * a), bank_rows(rows * classes * b),
                  grad(size * classes * a);
              for (size_t i = 0; i < logits.size(); ++i) logits[i] = char(i * 37 % 61);  // small positive numbers
              std::vector<double> statistics(kStatistics);
              std::vector<float> row_losses(size);
              float value;
              int64_t step = 5;
              Bank bank{bank_rows.data(), DType(bank_dtype), classes, slots.data(), samples, classes, 10, variant == 1 && bank_dtype,
                        7, &step};
              Batch batch{logits.data(), DType(logits_dtype), size, stride, index.data(), true};
              Step d2{ClassLoss(loss), {0.1f, 0.03f, 0.1f, 40.0f}, variant != 2, grad.data(), double(size), &value,
                      variant == 3 ? row_losses.data() : nullptr, variant == 3 ? statistics.data() : nullptr, 2};
              int64_t skipped, first;
              if (predict(batch, bank, 2, &skipped, &first) != -1 || d2_step(batch, bank, d2) != -1) return 1;
              if (!isfinite(value)) return 2;
              index[4] = samples;
              if (d2_step(batch, bank, d2) != 4) return 3;
              ++runs;
            }
  }
  // Several threads over tiles and rows, int32 indices, rows that are spoilt and rows that need taming.
  for (const Kernels* kernels : runnable_kernels()) {
    use_kernels(kernels->name);
    for (int64_t classes : {10, 64, 100, 1000})
      for (int loss = 0; loss < 3; ++loss) {
        const int64_t size = 4 * 16384 / classes + 3;
        std::vector<float> logits(size * classes), bank_rows(size * classes), grad(size * classes);
        for (size_t i = 0; i < logits.size(); ++i) logits[i] = float(i * 37 % 61) / 10;
        std::vector<int32_t> slots(size), index(size);
        for (int64_t i = 0; i < size; ++i) slots[i] = int32_t(i), index[i] = int32_t(size - 1 - i);
        logits[5 * classes + 1] = NAN;
        logits[9 * classes] = 3e38f, logits[9 * classes + 1] = -3e38f;
        float value;
        int64_t step = 0;
        std::vector<double> statistics(kStatistics);
        std::vector<float> row_losses(size);
        Bank bank{bank_rows.data(), DType(0), classes, slots.data(), size, classes, 10, false, 0, &step};
        Batch batch{logits.data(), DType(0), size, classes, index.data(), false};
        Step d2{ClassLoss(loss), {0.1f, 0.03f, 0.1f, 40.0f}, true, grad.data(), double(size), &value, row_losses.data(),
                statistics.data(), 3};
        if (d2_step(batch, bank, d2) != -1 || statistics[kSkipped] != 1 || !isnan(value)) return 4;
        ++runs;
      }
  }
  printf("done: %d runs\n", runs);
}
