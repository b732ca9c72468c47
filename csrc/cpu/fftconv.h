// The operator's problem as the CPU kernels see it.
//
//   x = pre_gate * u,  v[t] = sum_s k[t-s] x[s] (+ sum_{s>t} k_rev[s-t-1] x[s]) + skip * x[t],
//   y = post_gate * activation(v + bias)
//
// Knows nothing of Python or torch. Arguments arrive validated; sizes may be zero.
#pragma once
#include <cstdint>

#include "plan.h"
#include "tensor.h"

namespace seqconv {

enum class Activation : int { kNone = 0, kGelu = 1, kSilu = 2, kRelu = 3 };

// A row of a pack: its first step, how many there are, and which row it is.
struct Row {
  int64_t start, length, number;
};

struct Problem {
  int64_t batch, heads, channels, length;  // length: of the longest row
  int64_t taps,
      taps_rev;  // of k and k_rev, cut to what can reach an output: <= length, <= length - 1
  bool kernel_per_sample, skip_per_head, bias_per_head, compute_double;
  Activation activation;
  int threads;  // how many parallel_for has; results do not depend on it
  Tensor u, k, k_rev, skip, pre_gate, post_gate, bias;
  Tensor y;                                                        // forward only
  Tensor dy, du, dk, dk_rev, dskip, dpre_gate, dpost_gate, dbias;  // backward only; null where
                                                                   // not wanted
  // Of `batch` rows that lie one after another in time; null: all have the same length.
  const Row* packed = nullptr;
  bool adds = false;  // the gradients of kernels, skip and bias are added to what is there

  int64_t length_of(int64_t b) const { return packed ? packed[b].length : length; }
  // Of its kernel, where every row has its own.
  int64_t number_of(int64_t b) const { return packed ? packed[b].number : b; }
  int64_t offset_of(const Tensor& t, int64_t b) const {
    return packed ? packed[b].start * t.stride[3] : b * t.stride[0];
  }
};

// Whether short kernels are summed a line of channels after another (direct_lines.h), and how many
// lines of neighbours in memory a unit then has at most.
constexpr int64_t kLineChannels = 16, kMostLines = 8;
inline bool takes_lines(const Problem& p, bool backward) {
  const auto is_line = [&](const Tensor& t) { return t && t.stride[2] == 1 && t.stride[3] != 1; };
  return p.channels >= kLineChannels && p.heads == 1 && !p.kernel_per_sample &&
         (p.taps > 0 || p.skip) && p.activation == Activation::kNone && !p.pre_gate &&
         !p.post_gate && is_line(p.u) && is_line(backward ? p.dy : p.y) && (!p.du || is_line(p.du));
}

// All sizes >= 1 (batch, heads, channels, length); taps may be 0.
Status forward(const Problem& problem);
Status backward(const Problem& problem);

// The same of rows of any lengths, packed one after another: row i has the steps [offsets[i],
// offsets[i + 1]) of tensors whose batch axis is not there. taps and taps_rev are not cut; batch is
// the number of rows. Rows whose transforms have the same size share the kernels' spectra. A result
// of a row depends on that row and its kernel alone, in every bit.
Status forward_packed(const Problem& problem, const int64_t* offsets);
Status backward_packed(const Problem& problem, const int64_t* offsets);

// How calls of these sizes are carried out.
Method method(int64_t length, int64_t taps, int64_t taps_rev, bool compute_double);

}  // namespace seqconv
