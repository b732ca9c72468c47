// What every function of the module needs: reading its arguments, running without Python's lock,
// and its place in the module's table.
#pragma once
#include <pyconfig.h>
// A Python without the global lock has no limited API.
#if !defined(Py_LIMITED_API) && !defined(Py_GIL_DISABLED)
#define Py_LIMITED_API 0x030a0000
#endif
#include <Python.h>

#include <cstdint>

#include "cpu/parallel.h"
#include "cpu/tensor.h"

namespace seqconv::module {

constexpr Py_ssize_t kPerTensor = 5;  // dtype, four strides

// Reads integers one after another; after a failure ok is false and the values are meaningless.
struct Reader {
  PyObject* const* args;
  bool ok = true;
  int64_t next() {
    const long long value = PyLong_AsLongLong(*args++);
    if (value == -1 && PyErr_Occurred()) ok = false;
    return value;
  }
  double number() {
    const double value = PyFloat_AsDouble(*args++);
    if (value == -1 && PyErr_Occurred()) ok = false;
    return value;
  }
  char* address() { return reinterpret_cast<char*>(static_cast<intptr_t>(next())); }
  Tensor tensor() {
    Tensor t;
    t.data = address();
    t.dtype = static_cast<Dtype>(next());
    for (int64_t& stride : t.stride) stride = next();
    return t;
  }
};

// None, or MemoryError.
template <class Op>
PyObject* run(const Op& op) {
  Status status;
  Py_BEGIN_ALLOW_THREADS;
  status = op();
  Py_END_ALLOW_THREADS;
  if (status == Status::kOutOfMemory) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

inline PyCFunction fastcall(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace seqconv::module
