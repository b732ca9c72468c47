// The operator's problem as the CPU kernels see it.
//
//   x = pre_gate * u,  v[t] = sum_s k[t-s] x[s] (+ sum_{s>t} k_rev[s-t-1] x[s]) + skip * x[t],
//   y = post_gate * activation(v)
//
// Knows nothing of Python or torch. Arguments arrive validated; sizes may be zero.
#pragma once
#include <cstdint>

#include "plan.h"
#include "tensor.h"

namespace seqconv {

enum class Activation : int { kNone = 0, kGelu = 1, kSilu = 2, kRelu = 3 };

struct Problem {
  int64_t batch, heads, channels, length;
  int64_t taps,
      taps_rev;  // of k and k_rev, cut to what can reach an output: <= length, <= length - 1
  bool kernel_per_sample, skip_per_head, compute_double;
  Activation activation;
  int threads;  // how many parallel_for has; results do not depend on it
  Tensor u, k, k_rev, skip, pre_gate, post_gate;
  Tensor y;                                                 // forward only
  Tensor dy, du, dk, dk_rev, dskip, dpre_gate, dpost_gate;  // backward only; null where not wanted
};

// All sizes >= 1 (batch, heads, channels, length); taps may be 0.
Status forward(const Problem& problem);
Status backward(const Problem& problem);

// How calls of these sizes are carried out.
Method method(int64_t length, int64_t taps, int64_t taps_rev, bool compute_double);

}  // namespace seqconv
