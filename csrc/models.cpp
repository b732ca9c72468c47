#include "models.h"

#include <initializer_list>

#include "cpu/butterfly.h"
#include "cpu/glu.h"
#include "cpu/modes.h"
#include "cpu/real_part.h"
#include "cpu/ssm.h"
#include "cpu/ssm_step.h"

namespace seqconv::module {

// heads, channels, modes, length, single, threads; addresses of a and w; then of k, or of dk, its
// three strides, and the addresses of da and dw.
PyObject* ssm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const bool backward = count == 14;
  if (count != 9 && !backward) {
    PyErr_Format(PyExc_TypeError, "seqconv._C: 9 or 14 integers wanted, got %zd", count);
    return nullptr;
  }
  Reader read{args};
  SsmProblem p{};
  p.heads = read.next();
  p.channels = read.next();
  p.modes = read.next();
  p.length = read.next();
  p.single = read.next();
  p.threads = static_cast<int>(read.next());
  p.a = reinterpret_cast<const double*>(read.address());
  p.w = reinterpret_cast<const double*>(read.address());
  if (backward) {
    p.dk = read.address();
    for (int64_t& stride : p.dk_stride) stride = read.next();
    p.da = reinterpret_cast<double*>(read.address());
    p.dw = reinterpret_cast<double*>(read.address());
  } else {
    p.k = read.address();
  }
  if (!read.ok) return nullptr;
  return run([&] { return backward ? ssm_backward(p) : ssm_forward(p); });
}

// batch, heads, channels, modes, activation, threads; addresses of state, power, input, output and
// y, which are contiguous; then address, dtype and two strides of x, and the same of skip.
PyObject* ssm_step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 19) {
    PyErr_Format(PyExc_TypeError, "seqconv._C: 19 integers wanted, got %zd", count);
    return nullptr;
  }
  Reader read{args};
  SsmStepProblem p{};
  for (int64_t* size : {&p.batch, &p.heads, &p.channels, &p.modes}) *size = read.next();
  p.activation = static_cast<Activation>(read.next());
  p.threads = static_cast<int>(read.next());
  p.state = reinterpret_cast<double*>(read.address());
  for (const double** table : {&p.power, &p.input, &p.output})
    *table = reinterpret_cast<const double*>(read.address());
  p.y = read.address();
  for (Tensor* t : {&p.x, &p.skip}) {
    t->data = read.address();
    t->dtype = static_cast<Dtype>(read.next());
    for (int i = 0; i < 2; ++i) t->stride[i] = read.next();
  }
  if (!read.ok) return nullptr;
  return run([&] { return ssm_step(p); });
}

namespace {

// Reads the address and dtype of numbers.
Numbers numbers(Reader& read) {
  Numbers t;
  t.data = read.address();
  t.dtype = static_cast<Dtype>(read.next());
  return t;
}

}  // namespace

// heads, channels, modes, sets, the two transforms, whether bilinear, real, softplus, sinh and
// tied, threads; factor, rate and half of the band limit as floats; address and dtype of C, B,
// inv_dt, inv_A_real and inv_A_imag; addresses of a and w; and of the five gradients as of
// what they belong to, or nothing.
PyObject* modes(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr Py_ssize_t kCount = 12 + 3 + 10 + 2;
  const bool backward = count == kCount + 10;
  if (count != kCount && !backward) {
    PyErr_Format(PyExc_TypeError, "seqconv._C: %zd or %zd numbers wanted, got %zd", kCount,
                 kCount + 10, count);
    return nullptr;
  }
  Reader read{args};
  ModesProblem p{};
  for (int64_t* size : {&p.heads, &p.channels, &p.modes, &p.sets}) *size = read.next();
  for (Positive* kind : {&p.real_transform, &p.imag_transform})
    *kind = static_cast<Positive>(read.next());
  for (bool* flag : {&p.bilinear, &p.real, &p.softplus, &p.sinh, &p.tied}) *flag = read.next();
  p.threads = static_cast<int>(read.next());
  for (double* value : {&p.factor, &p.rate, &p.band}) *value = read.number();
  for (Numbers* t : {&p.C, &p.B, &p.inv_dt, &p.inv_A_real, &p.inv_A_imag}) *t = numbers(read);
  for (double** t : {&p.a, &p.w}) *t = reinterpret_cast<double*>(read.address());
  if (backward)
    for (Numbers& t : p.grads) t = numbers(read);
  if (!read.ok) return nullptr;
  return run([&] { return backward ? modes_backward(p) : modes_forward(p); });
}

// rows, channels, threads, addresses of z and of the bias; then of y, or dy, its stride, and the
// addresses of dz and dbias.
PyObject* glu(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const bool backward = count == 9;
  if (count != 6 && !backward) {
    PyErr_Format(PyExc_TypeError, "seqconv._C: 6 or 9 integers wanted, got %zd", count);
    return nullptr;
  }
  Reader read{args};
  const auto floats = [&read] { return reinterpret_cast<float*>(read.address()); };
  GluProblem p{};
  p.rows = read.next();
  p.channels = read.next();
  p.threads = static_cast<int>(read.next());
  p.z = floats();
  p.bias = floats();
  if (backward) {
    p.dy = floats();
    p.dy_stride = read.next();
    p.dz = floats();
    p.dbias = reinterpret_cast<double*>(read.address());
  } else {
    p.y = floats();
  }
  if (!read.ok) return nullptr;
  return run([&] { return backward ? glu_backward(p) : glu_forward(p); });
}

// batch, channels, length, heads, n, whether double, threads, x, addresses of matrices and
// twiddles; then of z, or of dz, dx, and the address of dmatrices.
PyObject* butterfly(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr Py_ssize_t kTensor = 1 + kPerTensor;  // with its address
  constexpr Py_ssize_t kCommon = 9 + kTensor;
  const bool backward = count == kCommon + kTensor + 2;
  if (count != kCommon + 1 && !backward) {
    PyErr_Format(PyExc_TypeError, "seqconv._C: %zd or %zd integers wanted, got %zd", kCommon + 1,
                 kCommon + kTensor + 2, count);
    return nullptr;
  }
  Reader read{args};
  ButterflyProblem p{};
  for (int64_t* size : {&p.batch, &p.channels, &p.length, &p.heads, &p.n}) *size = read.next();
  p.compute_double = read.next();
  p.threads = static_cast<int>(read.next());
  p.x = read.tensor();
  p.matrices = read.address();
  p.twiddles = read.address();
  if (backward) {
    p.dz = read.address();
    p.dx = read.tensor();
    p.dmatrices = read.address();
  } else {
    p.z = read.address();
  }
  if (!read.ok) return nullptr;
  return run([&] { return backward ? butterfly_backward(p) : butterfly_forward(p); });
}

// batch, heads, channels, n, whether double, threads; address of u and its stride from sample to
// sample, of k and its stride from head to head, and of the half spectrum; then, backward, those
// of du and dk.
PyObject* real_part(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const bool backward = count == 13;
  if (count != 11 && !backward) {
    PyErr_Format(PyExc_TypeError, "seqconv._C: 11 or 13 integers wanted, got %zd", count);
    return nullptr;
  }
  Reader read{args};
  RealPartProblem p{};
  for (int64_t* size : {&p.batch, &p.heads, &p.channels, &p.n}) *size = read.next();
  p.compute_double = read.next();
  p.threads = static_cast<int>(read.next());
  p.u = read.address();
  p.u_stride = read.next();
  p.k = read.address();
  p.k_stride = read.next();
  p.half = read.address();
  if (backward) {
    p.du = read.address();
    p.dk = read.address();
  }
  if (!read.ok) return nullptr;
  return run([&] { return backward ? real_part_backward(p) : real_part_forward(p); });
}

}  // namespace seqconv::module
