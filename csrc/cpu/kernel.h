// What an instruction set's translation unit provides. A unit of work is a few neighbouring
// channels (one per vector lane) and a range of samples; units write to disjoint memory and need no
// synchronisation.
//
// kernel_*.cpp are compiled for instruction sets that the machine may not have. They must not
// instantiate anything from the standard library: the linker could pick such a copy for everybody.
#pragma once
#include <cstddef>
#include <cstdint>

#include "fftconv.h"

namespace seqconv {

constexpr int kMaxStages = 64;
constexpr int kDirectTaps = 32;  // up to here the direct sum is at least as fast as the transform

struct Stage {
  int radix;        // 2, 3, 4 or 5
  int64_t twiddle;  // index of this stage's first twiddle; node j owns (radix - 1) complex numbers
};

template <class T>
struct Transform {
  int64_t n = 1;
  int stages = 0;
  Stage stage[kMaxStages];
  const T* twiddles = nullptr;  // w, w^2, ... of each node, interleaved real and imaginary
};

struct Unit {
  int64_t channel, channels;  // first channel and how many, <= lanes
  int64_t batch, batch_end;
};

template <class T>
struct Kernel {
  int lanes;
  size_t (*scratch_bytes)(const Problem&, int64_t n, bool backward);
  void (*forward)(const Problem&, const Transform<T>&, const Unit&, void* scratch);
  void (*backward)(const Problem&, const Transform<T>&, const Unit&, void* scratch);
};

struct IsaKernels {
  const char* name;
  bool (*runnable)();
  Kernel<float> f32;
  Kernel<double> f64;
};

extern const IsaKernels kPortable;
#if defined(__x86_64__)
extern const IsaKernels kAvx2;
#endif

}  // namespace seqconv
