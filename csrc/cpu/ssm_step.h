// One step of a diagonal state space model, in place:
//
//   state[b,h,n] <- power[h,n] state[b,h,n] + input[h,n] x[b,h]
//   v[b,c,h] = sum_n Re(output[c,h,n] state[b,h,n]) + skip[c,h] x[b,h],  y = activation(v)
//
// Complex numbers are pairs of doubles, in contiguous memory. x is indexed by batch and channel,
// and skip by head and channel. y (batch, heads, channels) is contiguous, in x's dtype. The sums
// are in double, and so is the activation where x is; elsewhere it is in float. Arguments arrive
// validated; all sizes are at least 1. A row does not depend on the others.
#pragma once
#include <cstdint>

#include "fftconv.h"
#include "tensor.h"

namespace seqconv {

struct SsmStepProblem {
  int64_t batch, heads, channels, modes;
  Activation activation;
  int threads;  // results do not depend on it
  double* state;
  const double *power, *input, *output;
  Tensor x, skip;
  char* y;
};

// Some rows of neighbouring samples: channels `begin` to `end` of samples `batch` to `batch_end`.
struct SsmStepUnit {
  int64_t batch, batch_end, begin, end;
};

Status ssm_step(const SsmStepProblem& problem);

}  // namespace seqconv
