#include "modes.h"

#include "isa.h"
#include "parallel.h"

namespace seqconv {
namespace {

constexpr int64_t kSerial = 2048;  // modes: below, one thread does it all

// A set's channels are one thread's, because gradients are added up over them.
Status for_each_set(const ModesProblem& p, void (*unit)(const ModesProblem&, int64_t)) {
  const int threads = p.channels * p.modes < kSerial ? 1 : threads_for(p.threads);
  return share_out(p.sets, threads, 0, [&](int64_t set, char*, bool) { unit(p, set); });
}

}  // namespace

Status modes_forward(const ModesProblem& p) { return for_each_set(p, kernels().modes_forward); }

// Sums grow in double, beside gradients in float.
Status modes_backward(const ModesProblem& problem) {
  ModesProblem p = problem;
  const int64_t parts = p.real ? 1 : 2, modes = p.channels * p.modes, in_sets = p.sets * p.modes;
  const int64_t counts[] = {p.heads * modes * parts, in_sets * parts, p.tied ? p.channels : modes,
                            in_sets, p.real ? 0 : in_sets};
  double** sums[] = {&p.dC, &p.dB, &p.dinv_dt, &p.dinv_A_real, &p.dinv_A_imag};
  int64_t all = 0;
  for (int64_t count : counts) all += count;
  const Memory memory = allocate(static_cast<size_t>(all) * sizeof(double));
  if (!memory) return Status::kOutOfMemory;
  double* room = reinterpret_cast<double*>(memory.get());
  for (int i = 0; i < 5; room += counts[i++]) {
    const bool wide = p.grads[i].dtype == Dtype::kFloat64;
    *sums[i] = wide ? reinterpret_cast<double*>(p.grads[i].data) : room;
  }
  const Status status = for_each_set(p, kernels().modes_backward);
  for (int i = 0; i < 5; ++i) {
    if (p.grads[i].dtype == Dtype::kFloat64) continue;
    float* to = reinterpret_cast<float*>(p.grads[i].data);
    for (int64_t j = 0; j < counts[i]; ++j) to[j] = static_cast<float>((*sums[i])[j]);
  }
  return status;
}

}  // namespace seqconv
