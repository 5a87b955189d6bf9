// What both Python modules are given: addresses as integers, and a bank and a batch as tuples of their fields. The tensors stay on the
// Python side, which checks them and keeps them alive.
#pragma once

#include <pybind11/pybind11.h>
#include <stdint.h>

#include "d2_step.h"

namespace r2d2 {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Reads a tuple of numbers from first to last. A class of pybind11 in its place would take a microsecond to make, its own conversion of
// tuples half a microsecond: a small step takes ten.
class Fields {
 public:
  explicit Fields(const pybind11::tuple& given) : given_(given) {}

  int64_t integer() { return PyLong_AsLongLong(next()); }
  double number() { return PyFloat_AsDouble(next()); }
  bool flag() { return next() == Py_True; }
  template <class T>
  T* address() {
    return pointer<T>(PyLong_AsSize_t(next()));
  }

  // What was given must be numbers, and no more of them than were read.
  void done() const {
    if (PyErr_Occurred()) throw pybind11::error_already_set();
    if (at_ != given_.size()) throw pybind11::type_error("a tuple has more fields than the kernels know");
  }

 private:
  PyObject* next() {
    if (at_ == given_.size()) throw pybind11::type_error("a tuple has fewer fields than the kernels need");
    return PyTuple_GET_ITEM(given_.ptr(), at_++);
  }

  const pybind11::tuple& given_;
  size_t at_ = 0;
};

struct PyBank {
  Bank bank;
  int32_t* status;  // for GPU kernels

  explicit PyBank(const pybind11::tuple& given) {
    Fields fields(given);
    bank = {fields.address<void>(), DType(fields.integer()), fields.integer(), fields.address<int32_t>(), fields.integer(),
            fields.integer(), float(fields.number()), fields.flag(), uint64_t(fields.integer()), fields.address<int64_t>()};
    status = fields.address<int32_t>();
    fields.done();
  }
};

inline Batch batch(const pybind11::tuple& given) {
  Fields fields(given);
  const Batch batch{fields.address<void>(), DType(fields.integer()), fields.integer(), fields.integer(), fields.address<void>(),
                    fields.flag()};
  fields.done();
  return batch;
}

}  // namespace r2d2
