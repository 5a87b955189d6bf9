// The Python module r2d2fast._C; what comes out are positions of bad indices.
#include <array>

#include "binding.h"
#include "d2_cpu.h"
#include "dispatch.h"

namespace py = pybind11;
using namespace r2d2;

namespace {

template <size_t kCount>
std::array<double, kCount> numbers(const py::tuple& given) {
  Fields fields(given);
  std::array<double, kCount> read;
  for (double& value : read) value = fields.number();
  fields.done();
  return read;
}

int64_t step(const py::tuple& to, const py::tuple& of, int class_loss, const py::tuple& scalars, const py::tuple& normalizers,
             bool update, uintptr_t grad, uintptr_t loss, uintptr_t row_losses, uintptr_t statistics, int threads) {
  const PyBank bank(to);
  const Batch rows = batch(of);
  const auto [alpha, beta, label_lr, grad_scale] = numbers<4>(scalars);
  const auto [normalizer, update_normalizer] = numbers<2>(normalizers);
  const Weights weights{float(alpha), float(beta), float(grad_scale / normalizer), float(label_lr / update_normalizer)};
  const Step step{ClassLoss(class_loss), weights, update, pointer<void>(grad), normalizer, pointer<float>(loss),
                  pointer<float>(row_losses), pointer<double>(statistics), threads};
  py::gil_scoped_release release;
  return d2_step(rows, bank.bank, step);
}

py::tuple predict_rows(const py::tuple& to, const py::tuple& of, int threads) {
  const PyBank bank(to);
  const Batch rows = batch(of);
  int64_t skipped = 0, first = -1, bad;
  {
    py::gil_scoped_release release;
    bad = predict(rows, bank.bank, threads, &skipped, &first);
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
