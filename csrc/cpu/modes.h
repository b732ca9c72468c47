// The modes of S4D's kernel from its parameters, and the gradients of these:
//
//   q = inv_dt or sinh(inv_dt),  dt = rate exp(q) or rate softplus(q)
//   A = -g(inv_A_real) + i g'(inv_A_imag),  with g and g' one of Positive
//   "zoh", "dss":  a = dt A                                  b = (exp(dt A) - 1) / A
//   "bilinear":    a = log((1 + dt A / 2) / (1 - dt A / 2))  b = dt / (1 - dt A / 2)
//   w[c,h,n] = factor C[c,h,n] b[h,n] B[s,n],  factor 1 with "dss", else 2
//
// Channel h takes the set s = h mod sets of (A, B). With a band limit, modes whose dt |Im A| / 2
// pi, without the rate, reaches half of it have no weight. Complex numbers are pairs; with `real`
// imaginary parts are absent, and those of a and w zero. Arguments arrive validated; all sizes are
// at least 1.
#pragma once
#include <cstdint>

#include "tensor.h"

namespace seqconv {

enum class Positive { kExp, kRelu, kSoftplus, kSigmoid, kNone };

// Contiguous numbers in float or double, or null.
struct Numbers {
  char* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  explicit operator bool() const { return data != nullptr; }
  double operator[](int64_t i) const {
    return dtype == Dtype::kFloat64 ? reinterpret_cast<const double*>(data)[i]
                                    : static_cast<double>(reinterpret_cast<const float*>(data)[i]);
  }
};

struct ModesProblem {
  int64_t heads, channels, modes, sets;
  Positive real_transform, imag_transform;
  bool bilinear, real, softplus, sinh, tied;  // tied: one dt for all modes of a channel
  double factor, rate, band;                  // band: half of the limit, infinite where none is set
  int threads;                                // results do not depend on it
  Numbers C, B, inv_dt, inv_A_real, inv_A_imag;
  double *a, *w;  // (channels, modes, 2), (heads, channels, modes, 2): results, or their gradients
  Numbers grads[5];  // of C, B, inv_dt, inv_A_real and inv_A_imag, in their shapes
  double *dC, *dB, *dinv_dt, *dinv_A_real, *dinv_A_imag;  // where sums grow; not for the caller
};

Status modes_forward(const ModesProblem& problem);
Status modes_backward(const ModesProblem& problem);

}  // namespace seqconv
