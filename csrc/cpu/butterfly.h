// The learned butterfly as the CPU kernels see it: for every row of x, real and padded with zeros
// to n points, n = r_1 r_2 ... r_D, with B = r_1 ... r_{d-1} and s = n / (B r_d), pass d takes
//
//   out[(j r_d + p) B + m] = twiddle[p,j] sum_i F[p,i] in[(i s + j) B + m],   j < s, m < B,
//
// twiddle[p,j] = exp(-2 pi i p j / (r_d s)). What the last one gives are frequencies in their
// order. r_d is 16 but for the last, which may be 2, 4 or 8; passes of the same radix share F. A
// channel takes the matrices of its own of `heads` equal groups.
//
// Arguments arrive validated; n is at least 16, all sizes at least 1.
#pragma once
#include <cstdint>

#include "tensor.h"

namespace seqconv {

struct ButterflyProblem {
  int64_t batch, channels, length, heads, n;
  bool compute_double;  // all but x and dx is double, not float
  int threads;          // results do not depend on it
  Tensor x;
  // Complex numbers side by side, (heads, elements): F_16, and F of the last radix if it is
  // another.
  const char* matrices;
  // Of every pass but the last its real parts [j][p], then its imaginary ones.
  const char* twiddles;
  char* z;         // forward only: (batch, channels, n), complex
  const char* dz;  // backward only, like z
  Tensor dx;
  char* dmatrices;

  int64_t last() const {  // the last radix, if it is not 16
    int64_t rest = n;
    while (rest % 16 == 0) rest /= 16;
    return rest;
  }
  int64_t elements() const { return 256 + (last() > 1 ? last() * last() : 0); }
  int64_t rows() const { return batch * (channels / heads); }  // of one head
};

Status butterfly_forward(const ButterflyProblem& problem);
Status butterfly_backward(const ButterflyProblem& problem);

}  // namespace seqconv
