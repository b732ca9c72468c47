// One step of a diagonal state space model, in place (S4D, arXiv 2206.11893):
//
//   state[b,h,n] <- power[h,n] state[b,h,n] + input[h,n] x[b,h]
//   v[b,c,h] = Re sum_n output[c,h,n] state[b,h,n] + skip[c,h] x[b,h],  y = activation(v)
//
// States and sums are in float64, y's activation in float32. A team of lanes shares the modes of a
// channel, reads its tables once for a few samples, and adds up its sums by shuffles: an element of
// the state is read and written by one thread only, and the order of a sum is fixed.
//
// Floor: 32 bytes for a mode of a sample, and 48 for a mode's tables, over the bandwidth.
#pragma once
#include "rows.cuh"

constexpr int kSamples = 4;  // that one reading of the tables serves

struct alignas(16) Mode {
  double re, im;
};
// The arguments. Complex numbers in float64 are pairs.
struct SsmStepArgs {
  i64 batch, heads, channels, modes;
  i64 lanes;  // of a team: a power of two, at most 32
  i64 activation;
  double* state;                         // (batch, channels, modes)
  const double *power, *input, *output;  // (channels, modes), and output (heads, channels, modes)
  Tensor x, skip, y;
};

// Every team has one channel of kSamples samples. All lanes of a warp come to the shuffles.
SEQCONV_DEVICE void ssm_step(const SsmStepArgs& a, unsigned char*) {
  const int lanes = (int)a.lanes, rank = threadIdx.x % lanes, teams = blockDim.x / lanes;
  const int blocks = ((int)a.channels + teams - 1) / teams;  // that share a sample's channels
  const i64 h = (i64)(blockIdx.x % blocks) * teams + threadIdx.x / lanes;
  const i64 first = (i64)(blockIdx.x / blocks) * kSamples;
  const int samples = h >= a.channels              ? 0
                      : a.batch - first < kSamples ? (int)(a.batch - first)
                                                   : kSamples;
  const Mode *power = (const Mode*)a.power + h * a.modes,
             *input = (const Mode*)a.input + h * a.modes;
  double x[kSamples];
#pragma unroll
  for (int s = 0; s < kSamples; ++s)
    x[s] = s < samples ? load_any(row_of(a.x, first + s, 0, h), a.x.dtype, 0) : 0.;
  for (i64 c = 0; c < a.heads; ++c) {
    const Mode* output = (const Mode*)a.output + (c * a.channels + h) * a.modes;
    double sum[kSamples] = {};
    for (i64 m = rank; samples > 0 && m < a.modes; m += lanes) {
      const Mode w = output[m], z = power[m], b = input[m];
#pragma unroll
      for (int s = 0; s < kSamples; ++s) {
        if (s >= samples) continue;
        Mode* at = (Mode*)a.state + ((first + s) * a.channels + h) * a.modes + m;
        Mode now = *at;
        if (c == 0) {
          now = {z.re * now.re + (b.re * x[s] - z.im * now.im),
                 z.re * now.im + (b.im * x[s] + z.im * now.re)};
          *at = now;
        }
        sum[s] += w.re * now.re - w.im * now.im;
      }
    }
    for (int step = lanes / 2; step > 0; step /= 2)
#pragma unroll
      for (int s = 0; s < kSamples; ++s) sum[s] += shuffle_xor(sum[s], step);
#pragma unroll
    for (int s = 0; s < kSamples; ++s) {
      if (rank != s % lanes || s >= samples) continue;
      const double skip = load_any(row_of(a.skip, 0, c, h), a.skip.dtype, 0);
      const float v = activate((float)(sum[s] + skip * x[s]), (int)a.activation);
      store_any((void*)row_of(a.y, first + s, c, h), a.y.dtype, 0, v);
    }
  }
}
