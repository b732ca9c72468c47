// The causal convolution without any trace of the future, by relaxed tiling.
//
// Time is cut into blocks of n steps, on the first level of kExactBlock. kFan neighbouring blocks
// are a group, and a group is a block of the next level. In a group a block acts on the d-th block
// behind it by the lags between (d - 1) n and (d + 1) n:
//
//   v[dn + i] += sum_{j < n} k[dn + i - j] x[j],  i < n,
//
// a two-sided convolution of n points, whose inputs all lie before its outputs: so no transform
// holds an output together with a later input. A block is transformed once, and so are its outputs,
// whose spectrum is a sum over the earlier blocks of the group. On the last level no tap reaches
// beyond kMost blocks, and all blocks are one group. Every pair of an input and a later output
// meets on one level, or in a block of kExactBlock, where it is summed directly. Up to kDirectTaps
// taps all is summed directly.
//
// An output is a sum whose order and whose transforms depend on its own time and on the number of
// taps alone. Source: J. van der Hoeven, "Relax, but don't be too lazy", 2002, and "Faster relaxed
// multiplication", 2014, for groups of more than two blocks.
#pragma once
#include "fftconv.h"

namespace seqconv {

constexpr int64_t kExactBlock = 64, kFan = 8, kMost = 16;
constexpr int kMaxLevels = 24;

// As forward and backward, without k_rev; p.taps is not cut, since later taps take part in the
// rounding, though in nothing else. A gradient with respect to u or a gate has no trace of the
// gradients of earlier outputs, and where that of an output is 0, the output's value does not
// matter.
Status exact_forward(const Problem& problem);
Status exact_backward(const Problem& problem);

// The levels of so many taps, and the points of the last: 0 and 0 where the direct sum is all.
struct ExactMethod {
  int levels;
  int64_t n;
};
ExactMethod exact_method(int64_t length, int64_t taps);

}  // namespace seqconv
