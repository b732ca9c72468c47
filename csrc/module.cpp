// seqconv._C: the CPU kernels as a CPython stable-ABI module. Arguments are integers, or bytes that
// hold them; every check is made in Python (seqconv/ops), which also lends torch's thread pool
// through set_parallel_for.
#include <cstring>
#include <initializer_list>

#include "call.h"
#include "cpu/exact.h"
#include "cpu/fftconv.h"
#include "cpu/isa.h"
#include "cpu/stream.h"
#include "models.h"

namespace {

using namespace seqconv::module;
using seqconv::Problem;
using seqconv::Tensor;

constexpr Py_ssize_t kSizes = 9;                    // batch .. activation, see read_problem
constexpr Py_ssize_t kForward = 8, kBackward = 15;  // tensors

// The layout of a convolution's tensors as 64-bit integers in a bytes object, which Python keeps
// for calls that differ in addresses only; the number of threads; and the tensors' addresses, 0 for
// an absent one.
bool read_problem(PyObject* const* args, Py_ssize_t count, bool backward, Problem* p) {
  const Py_ssize_t tensors = backward ? kBackward : kForward;
  const Py_ssize_t bytes = 8 * (kSizes + tensors * kPerTensor);
  if (count != 2 + tensors || !PyBytes_Check(args[0]) || PyBytes_Size(args[0]) != bytes) {
    PyErr_Format(PyExc_TypeError,
                 "seqconv._C: %zd bytes and %zd integers wanted, got %zd arguments", bytes,
                 1 + tensors, count);
    return false;
  }
  int64_t layout[kSizes + kBackward * kPerTensor];
  std::memcpy(layout, PyBytes_AsString(args[0]), bytes);
  const int64_t* next = layout;
  p->batch = *next++;
  p->heads = *next++;
  p->channels = *next++;
  p->length = *next++;
  p->taps = *next++;
  p->taps_rev = *next++;
  const int64_t flags = *next++;
  p->kernel_per_sample = flags & 1;
  p->skip_per_head = flags & 2;
  p->bias_per_head = flags & 4;
  p->compute_double = *next++;
  p->activation = static_cast<seqconv::Activation>(*next++);
  Reader read{args + 1};
  p->threads = static_cast<int>(read.next());
  const auto fill = [&](std::initializer_list<Tensor*> all) {
    for (Tensor* t : all) {
      t->data = read.address();
      t->dtype = static_cast<seqconv::Dtype>(*next++);
      for (int64_t& stride : t->stride) stride = *next++;
    }
  };
  fill({&p->u, &p->k, &p->k_rev, &p->skip, &p->pre_gate, &p->post_gate, &p->bias});
  if (!backward)
    fill({&p->y});
  else
    fill({&p->dy, &p->du, &p->dk, &p->dk_rev, &p->dskip, &p->dpre_gate, &p->dpost_gate, &p->dbias});
  return read.ok;
}

using Operator = seqconv::Status (*)(const Problem&);

template <Operator op, bool backward>
PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Problem problem;
  if (!read_problem(args, count, backward, &problem)) return nullptr;
  return run([&] { return op(problem); });
}
constexpr auto forward = call<seqconv::forward, false>, backward = call<seqconv::backward, true>;

// The same with one more integer, the address of a pack's offsets.
using Packed = seqconv::Status (*)(const Problem&, const int64_t*);

template <Packed op, bool backward>
PyObject* call_packed(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Problem problem;
  if (!read_problem(args, count - 1, backward, &problem)) return nullptr;
  Reader last{args + count - 1};
  const auto* offsets = reinterpret_cast<const int64_t*>(last.address());
  if (!last.ok) return nullptr;
  return run([&] { return op(problem, offsets); });
}
constexpr auto forward_packed = call_packed<seqconv::forward_packed, false>;
constexpr auto backward_packed = call_packed<seqconv::backward_packed, true>;

constexpr auto exact_forward = call<seqconv::exact_forward, false>;
constexpr auto exact_backward = call<seqconv::exact_backward, true>;

// Whether pairs of memory hold the same bytes: two addresses and the number of bytes of each.
PyObject* same_bytes(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Reader read{args};
  bool same = true;
  for (Py_ssize_t i = 0; same && read.ok && i + 3 <= count; i += 3) {
    const char *x = read.address(), *y = read.address();
    const size_t bytes = static_cast<size_t>(read.next());
    if (!read.ok) break;
    Py_BEGIN_ALLOW_THREADS;
    same = std::memcmp(x, y, bytes) == 0;
    Py_END_ALLOW_THREADS;
  }
  return read.ok ? PyBool_FromLong(same) : nullptr;
}

// Whether pairs of dictionaries hold the same objects under the same names in the same order.
PyObject* same_items(PyObject*, PyObject* const* args, Py_ssize_t count) {
  for (Py_ssize_t i = 0; i + 1 < count; i += 2) {
    if (!PyDict_Check(args[i]) || !PyDict_Check(args[i + 1])) {
      PyErr_SetString(PyExc_TypeError, "seqconv._C: dictionaries wanted");
      return nullptr;
    }
    if (PyDict_Size(args[i]) != PyDict_Size(args[i + 1])) Py_RETURN_FALSE;
    Py_ssize_t at = 0, also_at = 0;
    PyObject *key, *value, *also_key, *also_value;
    while (PyDict_Next(args[i], &at, &key, &value) &&
           PyDict_Next(args[i + 1], &also_at, &also_key, &also_value))
      if (key != also_key || value != also_value) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

// batch, heads, channels, period, whether double, whether spread, activation, threads; u, pre_gate,
// post_gate and y; addresses of inputs, sums, clock, taps and spectra.
PyObject* stream_step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr Py_ssize_t kCount = 8 + 4 * (1 + kPerTensor) + 5;
  if (count != kCount) {
    PyErr_Format(PyExc_TypeError, "seqconv._C: %zd integers wanted, got %zd", kCount, count);
    return nullptr;
  }
  Reader read{args};
  seqconv::StreamProblem p{};
  for (int64_t* size : {&p.batch, &p.heads, &p.channels, &p.period}) *size = read.next();
  p.compute_double = read.next();
  p.spread = read.next();
  p.activation = static_cast<seqconv::Activation>(read.next());
  p.threads = static_cast<int>(read.next());
  for (Tensor* t : {&p.u, &p.pre_gate, &p.post_gate, &p.y}) *t = read.tensor();
  p.inputs = read.address();
  p.sums = read.address();
  p.clock = reinterpret_cast<int64_t*>(read.address());
  p.taps = read.address();
  p.spectra = read.address();
  if (!read.ok) return nullptr;
  return run([&] { return seqconv::stream_step(p); });
}

// heads, channels, taps, period, whether double, threads; addresses of the taps and the spectra.
PyObject* stream_spectra(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 8) {
    PyErr_Format(PyExc_TypeError, "seqconv._C: 8 integers wanted, got %zd", count);
    return nullptr;
  }
  Reader read{args};
  seqconv::StreamKernelProblem p{};
  for (int64_t* size : {&p.heads, &p.channels, &p.count, &p.period}) *size = read.next();
  p.compute_double = read.next();
  p.threads = static_cast<int>(read.next());
  p.k = read.address();
  p.spectra = read.address();
  if (!read.ok) return nullptr;
  return run([&] { return seqconv::stream_spectra(p); });
}

PyObject* stream_spectrum_size(PyObject*, PyObject* args) {
  long long period;
  int compute_double;
  if (!PyArg_ParseTuple(args, "Li", &period, &compute_double)) return nullptr;
  return PyLong_FromLongLong(seqconv::stream_spectrum_size(period, compute_double));
}

PyObject* prefer_huge_pages(PyObject*, PyObject* args) {
  long long address, bytes;
  if (!PyArg_ParseTuple(args, "LL", &address, &bytes)) return nullptr;
  seqconv::prefer_huge_pages(reinterpret_cast<void*>(static_cast<intptr_t>(address)),
                             static_cast<size_t>(bytes));
  Py_RETURN_NONE;
}

PyObject* set_parallel_for(PyObject*, PyObject* address) {
  void* function = PyLong_AsVoidPtr(address);
  if (!function && PyErr_Occurred()) return nullptr;
  seqconv::set_parallel_for(reinterpret_cast<seqconv::ParallelFor>(function));
  Py_RETURN_NONE;
}

PyObject* set_isa(PyObject*, PyObject* args) {
  const char* name;
  if (!PyArg_ParseTuple(args, "s", &name)) return nullptr;
  return PyBool_FromLong(seqconv::set_isa(name));
}

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(seqconv::isa()); }

PyObject* forked(PyObject*, PyObject*) { return PyBool_FromLong(seqconv::forked()); }

PyObject* compiler(PyObject*, PyObject*) {
#if defined(__clang__)
  return PyUnicode_FromString(__VERSION__);
#else
  return PyUnicode_FromString("g++ " __VERSION__);
#endif
}

PyObject* method(PyObject*, PyObject* args) {
  long long length, taps, taps_rev;
  int compute_double;
  if (!PyArg_ParseTuple(args, "LLLi", &length, &taps, &taps_rev, &compute_double)) return nullptr;
  const seqconv::Method m = seqconv::method(length, taps, taps_rev, compute_double);
  return Py_BuildValue("LL", static_cast<long long>(m.n), static_cast<long long>(m.blocks));
}

PyObject* exact_method(PyObject*, PyObject* args) {
  long long length, taps;
  if (!PyArg_ParseTuple(args, "LL", &length, &taps)) return nullptr;
  const seqconv::ExactMethod m = seqconv::exact_method(length, taps);
  return Py_BuildValue("iL", m.levels, static_cast<long long>(m.n));
}

PyMethodDef methods[] = {
    {"forward", fastcall(forward), METH_FASTCALL, "Runs the operator on packed arguments."},
    {"backward", fastcall(backward), METH_FASTCALL, "Runs its gradient on packed arguments."},
    {"forward_packed", fastcall(forward_packed), METH_FASTCALL, "The same of rows of any lengths."},
    {"backward_packed", fastcall(backward_packed), METH_FASTCALL, "Its gradients."},
    {"exact_forward", fastcall(exact_forward), METH_FASTCALL, "The same without the future."},
    {"exact_backward", fastcall(exact_backward), METH_FASTCALL, "Its gradient."},
    {"exact_method", exact_method, METH_VARARGS,
     "(length, taps): levels of tiles, and points of the longest."},
    {"ssm", fastcall(ssm), METH_FASTCALL, "A state space model's kernel, or its gradient."},
    {"modes", fastcall(modes), METH_FASTCALL, "S4D's modes from its parameters, or gradients."},
    {"real_part", fastcall(real_part), METH_FASTCALL,
     "Half of a spectrum, or gradients of its factors."},
    {"glu", fastcall(glu), METH_FASTCALL, "A gated linear unit, or its gradient."},
    {"ssm_step", fastcall(ssm_step), METH_FASTCALL, "A step of a state space model, in place."},
    {"same_bytes", fastcall(same_bytes), METH_FASTCALL, "Whether pairs of memory are equal."},
    {"same_items", fastcall(same_items), METH_FASTCALL, "Whether pairs of dictionaries are equal."},
    {"butterfly", fastcall(butterfly), METH_FASTCALL, "A learned butterfly, or its gradient."},
    {"stream_step", fastcall(stream_step), METH_FASTCALL,
     "One step of a convolution, and its tiles."},
    {"stream_spectra", fastcall(stream_spectra), METH_FASTCALL,
     "A kernel's spectra for the tiles."},
    {"stream_spectrum_size", stream_spectrum_size, METH_VARARGS,
     "(period, double): scalars of a row's spectra of all tiles."},
    {"prefer_huge_pages", prefer_huge_pages, METH_VARARGS,
     "(address, bytes): a hint for memory that is about to be written."},
    {"set_parallel_for", set_parallel_for, METH_O, "Takes the address of torch_parallel_for."},
    {"set_isa", set_isa, METH_VARARGS, "Selects an instruction set; False if it cannot run here."},
    {"isa", isa, METH_NOARGS, "The instruction set in use."},
    {"forked", forked, METH_NOARGS, "Whether this is a forked child, which runs serially."},
    {"compiler", compiler, METH_NOARGS, "The compiler that built this module."},
    {"method", method, METH_VARARGS,
     "(length, taps, taps_rev, double): points of a transform, or 0 for a direct sum, and blocks."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_C",
                      "CPU kernels of seqconv.",
                      -1,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
