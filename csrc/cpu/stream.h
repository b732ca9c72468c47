// A causal convolution one step at a time, by relaxed tiling, as the CPU kernels see it.
//
// A row (of a sample and a channel) has a clock, the number of its steps modulo the period. Its
// inputs and the sums of its outputs to come lie in rings of one period, in blocks of kBlock steps.
// At step c
//
//   v = sums[c] + k[0] x[c],  y = post_gate * activation(v),  x = pre_gate * u,
//   sums[c + j] += k[j] x[c]  for 0 < j < kBlock - c mod kBlock,
//
// with the skip as part of k[0]. After it, where a block ends, the last n inputs are convolved into
// the next n sums, n being the largest power of two that divides c + 1, at most the period:
//
//   sums[c + 1 + i] += sum_{j < n} k[n + i - j] x[c + 1 - n + j],  i < n.
//
// That is a two-sided convolution of n points, one right-angle transform there and back, whose
// spectrum is made once per kernel. Every pair of an input and an output meets once.
//
// Arguments arrive validated. All sizes are at least 1; the period is a power of two, at least
// kBlock and the number of taps less 1.
#pragma once
#include <cstdint>

#include "fftconv.h"

namespace seqconv {

constexpr int64_t kBlock = 32, kTogether = 4, kGroup = kBlock / 2 * kTogether;

struct StreamProblem {
  int64_t batch, heads, channels, period;
  bool compute_double, spread;
  Activation activation;
  int threads;                       // results do not depend on it
  Tensor u, pre_gate, post_gate, y;  // (batch, head, channel)
  char* inputs;                      // (batch, period / kBlock, channels, kBlock)
  char* sums;                        // (batch, period / kBlock, heads, channels, kBlock)
  int64_t* clock;                    // (batch)
  const char* taps;     // (heads, channels, 2 kBlock): kBlock zeros, then k[0] ... k[kBlock - 1]
  const char* spectra;  // see stream_spectra

  int64_t rows() const { return batch * channels; }
  // With `spread` a channel's clock is ahead of its sample's. kTogether neighbours, which are
  // neighbours in memory, have one clock. Those of a group are 2 steps apart, and those of every
  // other group 1 more, so that at any step one of them has a tile due in every other group. Pairs
  // of groups are different numbers of blocks apart, so that tiles of all sizes are due at any
  // time: multiples of an odd number have all residues modulo a power of two equally often.
  int64_t clock_of(int64_t sample, int64_t channel) const {
    const int64_t group = channel / kGroup, place = channel % kGroup / kTogether;
    const int64_t ahead = spread ? 2 * place + group % 2 + kBlock * (group / 2 * 0x9E3779B1) : 0;
    return (clock[sample] + ahead) & (period - 1);
  }
  // Of the tile that is due after step c; 0 where none is.
  int64_t tile_after(int64_t c) const {
    const int64_t end = c + 1;
    return end % kBlock ? 0 : end & -end;
  }
};

// One step of all rows, at whose end the clocks have advanced.
Status stream_step(const StreamProblem& problem);

// Scalars of the spectra of tiles of kBlock, 2 kBlock, ..., period points, per head and channel.
int64_t stream_spectrum_size(int64_t period, bool compute_double);

// spectra <- those of taps k (heads, channels, count), contiguous: of every size of tiles, of every
// head, of every channel.
struct StreamKernelProblem {
  int64_t heads, channels, count, period;
  bool compute_double;
  int threads;
  const char* k;
  char* spectra;
};
Status stream_spectra(const StreamKernelProblem& problem);

}  // namespace seqconv
