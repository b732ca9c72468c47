// What an instruction set's translation unit provides, and what it is given.
//
// isa_*.cpp are compiled for instruction sets that the machine may not have. They must not
// instantiate anything from the standard library: the linker could pick such a copy for everybody.
#pragma once
#include <cstddef>
#include <cstdint>

#include "butterfly.h"
#include "fftconv.h"
#include "ssm.h"

namespace seqconv {

constexpr int kMaxStages = 32;
constexpr int kDirectTaps = 32;  // up to here the direct sum is at least as fast as the transform

// Quads of the vectors that the first and last pass use. The widest vectors are taken by halves
// there: splitting a row by butterflies costs half of splitting it into lanes.
constexpr int end_quads(int quads, int scalar_bytes) {
  return 4 * quads * scalar_bytes > 32 ? quads / 2 : quads;
}

struct Stage {
  int radix;
  int64_t twiddle;  // index of the stage's first twiddle, see Transform
};

// The right-angle transform of n points. A vector holds the same four neighbouring positions of
// `quads` branches: the factors into which the first pass splits x^n - i, quads at a time in the
// lanes, then `radix` at a time in memory. `quads * radix` segments of the row meet in that pass.
template <class T>
struct Transform {
  int64_t n = 0;
  int quads = 1, radix = 1;
  int64_t vectors = 0;   // complex vectors of one child of the first pass: n / (4 quads radix)
  int64_t spectrum = 0;  // scalars of a spectrum, complex vectors rounded up to whole groups of 4
  int stages = 0;
  Stage stage[kMaxStages];
  bool compact = false;         // radix 4 nodes keep w only; w^2 and w^3 are computed
  const T* twiddles = nullptr;  // per node w, w^2, ...: one complex vector each
  int64_t middle = 0;  // index of the last four positions' twiddles, per group of four nodes
  // Coefficients of the first and last pass: the segments' weights w, w / n, and -i w / n.
  const T *plain, *scaled, *scaled_times_minus_i;
};

// Threads that walk through the same unit together, sharing its scratch. They meet where work is
// spread (see transform.h): whoever arrives takes the next piece, and all wait until the last is
// done. It works with any number of them, one after another even.
struct Board {
  alignas(64) int64_t next = 0;  // tickets handed out, pieces done: of the whole unit, so that they
  alignas(64) int64_t done = 0;  // need no reset
};
struct Team {
  Board* board = nullptr;  // null: this thread is alone
  int64_t threads = 1;
  int64_t base = 0;     // pieces before the present ones
  int64_t ticket = -1;  // this thread's next piece, counted from the first of all
};
void wait_a_little(int64_t times_before);

struct Unit {
  int64_t channel, channels;  // handled together: more than one where they are adjacent in memory
  int64_t batch, batch_end;
  Team* team;         // for the inside of a row, where there are fewer units than threads
  char* partial;      // where sums over the batch go, to be reduced later; null: finish them here
  int64_t next = -1;  // the channel that this thread will probably start with afterwards
  bool knows_kernels = false;  // the scratch holds their spectra, from a unit of the same channels
};

template <class T>
struct Kernel {
  int quads;
  // Of such a unit, and of its sums over the batch.
  size_t (*scratch_bytes)(const Problem&, const Method&, const Transform<T>&, const Unit&,
                          bool backward);
  size_t (*partial_bytes)(const Problem&, const Method&, const Transform<T>&);
  void (*forward)(const Problem&, const Method&, const Transform<T>&, const Unit&, char* scratch);
  void (*backward)(const Problem&, const Method&, const Transform<T>&, const Unit&, char* scratch);
  // Sums `parts` partial results of one channel, in their order, and stores the gradients.
  void (*reduce)(const Problem&, const Method&, const Transform<T>&, const Unit&, char* scratch,
                 int64_t parts);
};

// A unit is a channel and a range of its blocks of outputs.
struct SsmKernel {
  int64_t (*blocks)(const SsmProblem&, bool backward);
  size_t (*scratch_bytes)(const SsmProblem&, bool backward);
  void (*forward)(const SsmProblem&, int64_t channel, int64_t begin, int64_t end, char* scratch);
  void (*backward)(const SsmProblem&, int64_t channel, int64_t begin, int64_t end, double* sums,
                   char* scratch);
};

// A unit is some rows of a head: (batch, channel of the head). backward sets `sums`, the gradient
// of the head's matrices from them.
struct ButterflyKernel {
  size_t (*scratch_bytes)(const ButterflyProblem&, bool backward);
  void (*forward)(const ButterflyProblem&, int64_t head, int64_t begin, int64_t end, char* scratch);
  void (*backward)(const ButterflyProblem&, int64_t head, int64_t begin, int64_t end, double* sums,
                   char* scratch);
};

struct IsaKernels {
  const char* name;
  bool (*runnable)();
  Kernel<float> f32;
  Kernel<double> f64;
  SsmKernel ssm_f32, ssm_f64;
  ButterflyKernel butterfly_f32, butterfly_f64;
  const IsaKernels* shorter = nullptr;  // for rows of fewer points than kShort, if not this one
};
constexpr int64_t kShort = 65;

extern const IsaKernels kPortable;
#if defined(__x86_64__)
extern const IsaKernels kAvx2, kAvx512;
#elif defined(__aarch64__)
extern const IsaKernels kNeon;
#endif

}  // namespace seqconv
