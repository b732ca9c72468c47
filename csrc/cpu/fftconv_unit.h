// One unit of work of the convolution and of its gradient.
//
// With x = pre_gate * u, spectra X, and K the spectrum of k[t] - i k_rev[n - t], on n >= length
// points (see plan.h):
//   v = Re inv(X K),   dx = Re inv(dV conj K),   dk = Re inv(sum dV conj X),   dk_rev = -Im of it.
// A kernel much shorter than the row takes blocks of n points instead, with all its taps in one
// causal kernel kk of `width` taps, kk[reach] being k[0], and x shifted by `reach`:
//   v_j = Re inv(K (X_j - i X_{j-1})),   dx_j = Re inv(conj K (dV_j + i dV_{j+1})),
//   dkk = Re inv(sum_j conj X_j (dV_j + i dV_{j+1})),
// since the wrapped parts are the imaginary ones: every point of every block is of use.
#pragma once
#include "backward.h"
#include "forward.h"

namespace seqconv::SEQCONV_ISA {

template <class T>
size_t scratch_bytes(const Problem& p, const Method& method, const Plan<T>& plan, const Unit& unit,
                     bool backward) {
  Scratch scratch;
  const Work<T> w(p, method, plan, unit, backward, scratch);
  return scratch.used();
}

template <class T>
constexpr ConvKernel<T> kConvKernel = {kQuads<T>,       scratch_bytes<T>, partial_bytes<T>,
                                       forward_unit<T>, backward_unit<T>, reduce<T>};

}  // namespace seqconv::SEQCONV_ISA
