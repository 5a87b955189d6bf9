// The Python module r2d2fast._C: addresses and sizes in, positions of bad indices out. Tensors stay on the Python side.
#include <pybind11/pybind11.h>

#include "binding.h"
#include "d2_cpu.h"
#include "dispatch.h"

namespace py = pybind11;
using namespace r2d2;

namespace {

// pybind11 converts each argument in about 50 ns; a handle object for the bank would have to be kept valid for no gain.
int64_t step(uintptr_t rows, int rows_dtype, int64_t rows_stride, uintptr_t slots, int64_t samples, int64_t classes,
             float label_scale, bool stochastic, uint64_t seed, uintptr_t updates, uintptr_t logits, int dtype, int64_t size,
             int64_t stride, uintptr_t index, bool index_is_int64, uintptr_t grad, uintptr_t loss, uintptr_t statistics, int class_loss,
             float alpha, float beta, float grad_weight, float label_rate, double normalizer, bool update, int threads) {
  const Bank bank{pointer<void>(rows), DType(rows_dtype), rows_stride, pointer<int32_t>(slots), samples, classes, label_scale,
                  stochastic, seed, pointer<int64_t>(updates)};
  const Batch batch{pointer<void>(logits), DType(dtype), size, stride, pointer<void>(index), index_is_int64};
  const Step step{ClassLoss(class_loss), {alpha, beta, grad_weight, label_rate}, update, pointer<void>(grad), normalizer,
                  pointer<float>(loss), pointer<double>(statistics), threads};
  py::gil_scoped_release release;
  return d2_step(batch, bank, step);
}

py::tuple predict_rows(uintptr_t rows, int rows_dtype, int64_t rows_stride, uintptr_t slots, int64_t samples, int64_t classes,
                       uintptr_t logits, int dtype, int64_t size, int64_t stride, uintptr_t index, bool index_is_int64,
                       int threads) {
  const Bank bank{pointer<void>(rows), DType(rows_dtype), rows_stride, pointer<int32_t>(slots), samples, classes, 0, false, 0,
                  nullptr};
  const Batch batch{pointer<void>(logits), DType(dtype), size, stride, pointer<void>(index), index_is_int64};
  int64_t skipped = 0, first = -1, bad;
  {
    py::gil_scoped_release release;
    bad = predict(batch, bank, threads, &skipped, &first);
  }
  return py::make_tuple(bad, skipped, first);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of r2d2fast; use r2d2fast.FusedD2Loss and r2d2fast.d2_step.";
  module.def("step", &step);
  module.def("predict", &predict_rows);
  module.def("equals", [](uintptr_t scalar, float value) {
    return scalar && *pointer<float>(scalar) == value;  // a symbolic zero has no address
  });
  module.def("instruction_sets", [] {
    py::list names;
    for (const Kernels* kernels : runnable_kernels()) names.append(kernels->name);
    return names;
  });
  module.def("instruction_set", [] { return best_kernels().name; });
  module.def("use_instruction_set", &use_kernels);
}
