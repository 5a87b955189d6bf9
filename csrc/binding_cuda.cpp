// The Python module r2d2fast._cuda: handles, addresses and a stream in; a failed launch comes out as an exception.
#include <pybind11/stl.h>

#include <atomic>
#include <string>
#include <vector>

#include "binding.h"
#include "d2_cuda.h"

namespace py = pybind11;
using namespace r2d2;

namespace {

using PyScalar = std::pair<float, uintptr_t>;  // the number, or the address of one on the device

Scalar scalar(const PyScalar& given) { return {given.first, pointer<float>(given.second)}; }

// Odd, so that no sum of fewer than 2^32 of them is 0, and far from those before it.
unsigned next_launch() {
  static std::atomic<unsigned> launches{0};
  return launches.fetch_add(1, std::memory_order_relaxed) * 0x9E3779B2u + 1;
}

void check(int error, const char* what) {
  if (error)
    throw std::runtime_error(std::string("the ") + what + " kernel could not be launched: " + cuda_error_name(error) + " (" +
                             cuda_error_text(error) + ")");
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of r2d2fast; use r2d2fast.FusedD2Loss and r2d2fast.d2_step.";
  module.def("step", [](const py::tuple& to, const py::tuple& of, int class_loss, PyScalar alpha, PyScalar beta, PyScalar label_lr,
                        PyScalar grad_scale, float normalizer, float update_normalizer, bool update, uintptr_t grad,
                        uintptr_t loss, uintptr_t statistics, uintptr_t results, int device, uintptr_t stream) {
    const PyBank bank(to);
    const CudaStep step{ClassLoss(class_loss), scalar(alpha), scalar(beta), scalar(label_lr), scalar(grad_scale), normalizer,
                        update_normalizer, update, pointer<void>(grad), pointer<float>(loss), pointer<double>(statistics),
                        pointer<float>(results), next_launch(), bank.status};
    check(d2_step_cuda(batch(of), bank.bank, step, {device, pointer<void>(stream)}), "D2 step");
  });
  module.def("predict", [](const py::tuple& to, const py::tuple& of, int device, uintptr_t stream) {
    const PyBank bank(to);
    check(predict_cuda(batch(of), bank.bank, bank.status, {device, pointer<void>(stream)}), "prediction");
  });
  module.def("scale", [](uintptr_t out, uintptr_t in, int64_t size, int dtype, uintptr_t grad_output, PyScalar grad_scale,
                         int device, uintptr_t stream) {
    check(scale_cuda(pointer<void>(out), pointer<void>(in), size, DType(dtype), pointer<float>(grad_output), scalar(grad_scale),
                     {device, pointer<void>(stream)}),
          "gradient");
  });
  module.attr("results") = int(kResults);
  module.attr("cuda_version") = cuda_version();
  module.def("driver_version", &cuda_driver_version);
  module.attr("architectures") = std::vector<int>{R2D2_CUDA_ARCHS};
}
