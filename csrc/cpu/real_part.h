// Half of the spectrum of the real part of a signal whose whole spectrum is a product u k:
//
//   half[b,c,d,j] = (u[b,d,j] k[c,d,j] + conj(u[b,d,n-j] k[c,d,n-j])) / 2,  0 <= j <= n / 2
//
// where frequency n is frequency 0. With the half spectrum r of the inverse transform's gradient,
// g[j] = r[j] / n and g[n-j] = conj(r[j]) / n, the gradients are
//
//   du[b,d,j] = sum_c g[b,c,d,j] conj(k[c,d,j]),  dk[c,d,j] = sum_b g[b,c,d,j] conj(u[b,d,j])
//
// Real and imaginary parts lie side by side, and rows are contiguous. Arguments arrive validated;
// all sizes are at least 1, and n is even.
#pragma once
#include <cstdint>

#include "tensor.h"

namespace seqconv {

struct RealPartProblem {
  int64_t batch, heads, channels, n;
  bool compute_double;
  int threads;  // results do not depend on it
  const void *u, *k;
  int64_t u_stride, k_stride;  // numbers from one sample to the next, or from one head
  void* half;                  // (batch, heads, channels, n / 2 + 1), or its gradient r
  void *du, *dk;               // as u and k; backward only; either may be null
};

Status real_part_forward(const RealPartProblem& problem);
Status real_part_backward(const RealPartProblem& problem);

}  // namespace seqconv
