// The instruction sets, one of which is chosen when it is first needed: what the translation unit
// of each (isa_*.cpp) provides, and what it is given.
//
// They are compiled for instruction sets that the machine may not have. They must not instantiate
// anything from the standard library: the linker could pick such a copy for everybody.
#pragma once
#include <cstddef>
#include <cstdint>

#include "butterfly.h"
#include "exact.h"
#include "fftconv.h"
#include "glu.h"
#include "modes.h"
#include "plan.h"
#include "real_part.h"
#include "ssm.h"
#include "ssm_step.h"
#include "stream.h"

namespace seqconv {

// Threads that walk through the same unit together, sharing its scratch. They meet where work is
// spread (see spread.h): whoever arrives takes the next piece, and all wait until the last is done.
// It works with any number of them, one after another even.
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

// Some samples of a channel, or of a few neighbouring ones.
struct Unit {
  int64_t channel, channels;  // handled together: more than one where they are adjacent in memory
  int64_t batch, batch_end;
  Team* team;         // for the inside of a row, where there are fewer units than threads
  char* partial;      // where sums over the batch go, to be reduced later; null: finish them here
  int64_t next = -1;  // the channel that this thread will probably start with afterwards
  bool knows_kernels = false;  // the scratch holds their spectra, from a unit of the same channels
};

template <class T>
struct ConvKernel {
  int quads;
  // Of such a unit, and of its sums over the batch.
  size_t (*scratch_bytes)(const Problem&, const Method&, const Plan<T>&, const Unit&,
                          bool backward);
  size_t (*partial_bytes)(const Problem&, const Method&, const Plan<T>&);
  void (*forward)(const Problem&, const Method&, const Plan<T>&, const Unit&, char* scratch);
  void (*backward)(const Problem&, const Method&, const Plan<T>&, const Unit&, char* scratch);
  // Sums `parts` partial results of one channel, in their order, and stores the gradients.
  void (*reduce)(const Problem&, const Method&, const Plan<T>&, const Unit&, char* scratch,
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

// A unit is a channel.
struct RealPartKernel {
  void (*forward)(const RealPartProblem&, int64_t channel);
  void (*backward)(const RealPartProblem&, int64_t channel);
};

// A step of some channels of a sample, and a tile of one row (see stream.h).
template <class T>
struct StreamKernel {
  int quads;
  void (*step)(const StreamProblem&, int64_t sample, int64_t channel, int64_t channels);
  size_t (*scratch_bytes)(const Plan<T>&, int64_t heads);
  void (*tile)(const StreamProblem&, const Plan<T>&, int64_t sample, int64_t channel, int64_t clock,
               const T* spectra, int64_t apart, char* scratch);
  void (*spectrum)(const Plan<T>&, const T* k, int64_t count, T* to);
};

// The exactly causal convolution (see exact.h): a level's plan and what it does with blocks, by the
// instruction set for its length.
template <class T>
struct ExactLevel {
  int64_t blocks;  // of a group
  int64_t reach;   // how many blocks further a block acts
  const Plan<T>* plan;
  void (*split)(const Plan<T>&, const T* x, T* to);
  void (*join)(const Plan<T>&, const T* ring, int64_t reach, int64_t b, const T* kernels, T* data,
               T* v, int64_t room);
  void (*spectrum)(const Plan<T>&, const T* k, int64_t count, T* to);
};
template <class T>
struct ExactLevels {
  int count = 0;
  ExactLevel<T> level[kMaxLevels];
};
// Some heads of a channel, of some samples.
struct ExactUnit {
  int64_t channel, head, heads, batch, batch_end;
};
template <class T>
struct ExactKernel {
  int quads;
  void (*split)(const Plan<T>&, const T*, T*);
  void (*join)(const Plan<T>&, const T*, int64_t, int64_t, const T*, T*, T*, int64_t);
  void (*spectrum)(const Plan<T>&, const T*, int64_t, T*);
  size_t (*scratch_bytes)(const Problem&, const ExactLevels<T>&, const ExactUnit&);
  void (*forward)(const Problem&, const ExactLevels<T>&, const ExactUnit&, char* scratch);
  void (*backward)(const Problem&, const Tensor& dv, const ExactLevels<T>&, const ExactUnit&,
                   char* scratch);
};

struct IsaKernels {
  const char* name;
  bool (*runnable)();
  ConvKernel<float> conv_f32;
  ConvKernel<double> conv_f64;
  SsmKernel ssm_f32, ssm_f64;
  ButterflyKernel butterfly_f32, butterfly_f64;
  RealPartKernel real_part_f32, real_part_f64;
  StreamKernel<float> stream_f32;
  StreamKernel<double> stream_f64;
  void (*ssm_step_f32)(const SsmStepProblem&, const SsmStepUnit&);
  void (*ssm_step_f64)(const SsmStepProblem&, const SsmStepUnit&);
  ExactKernel<float> exact_f32;
  ExactKernel<double> exact_f64;
  void (*modes_forward)(const ModesProblem&, int64_t set);
  void (*modes_backward)(const ModesProblem&, int64_t set);
  void (*glu_forward)(const GluProblem&, int64_t begin, int64_t end);
  void (*glu_backward)(const GluProblem&, int64_t begin, int64_t end, float* sums);
  const IsaKernels* shorter = nullptr;  // for rows of fewer points than kShort, if not this one
};
constexpr int64_t kShort = 65;

extern const IsaKernels kPortable;
#if defined(__x86_64__)
extern const IsaKernels kAvx2, kAvx512;
#elif defined(__aarch64__)
extern const IsaKernels kNeon;
#endif

// Of the instruction set in use: the best that runs here, or what set_isa() chose.
const IsaKernels& kernels();
const char* isa();
bool set_isa(const char* name);  // false if unknown or not runnable here

}  // namespace seqconv
