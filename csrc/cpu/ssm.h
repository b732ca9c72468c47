// The kernel of a diagonal state space model as the CPU kernels see it:
//
//   k[c,h,l] = sum_n Re(w[c,h,n] exp(a[h,n] l)),  0 <= l < length
//
// and, for a gradient dk, with S_p[c,h,n] = sum_l l^p dk[c,h,l] exp(a[h,n] l),
//
//   dw[c,h,n] = conj(S_0),  da[h,n] = conj(sum_c w[c,h,n] S_1[c,h,n]).
//
// Complex numbers are pairs of doubles. Arguments arrive validated; all sizes are at least 1.
#pragma once
#include <cstdint>

#include "tensor.h"

namespace seqconv {

struct SsmProblem {
  int64_t heads, channels, modes, length;
  bool single;  // k and dk are float, not double
  int threads;  // results do not depend on it
  const double *a, *w;
  char* k;  // forward only
  const char* dk;
  int64_t dk_stride[3];  // of head, channel, time, in elements
  double *da, *dw;       // backward only
};

Status ssm_forward(const SsmProblem& problem);
Status ssm_backward(const SsmProblem& problem);

}  // namespace seqconv
