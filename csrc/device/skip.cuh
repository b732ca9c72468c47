// The gradients of skip and bias are sums over samples and time. Every thread of the backward pass
// adds up a part, and a kernel of its own adds up the parts.
#pragma once
#include "packed.cuh"

// A thread's part. It is a direct sum, since a transform would carry the round-off of all other
// taps.
template <class T>
SEQCONV_DEVICE float skip_sum(Gated<T> dv, Gated<T> x, int n, Team team) {
  float sum = 0.f, lost = 0.f;  // what rounding added to the sum: a small team's sums are long
  for (int t = team.rank; t < n; t += team.size) {
    const float term = dv(t) * x(t) - lost, next = sum + term;
    lost = next - next == 0.f ? (next - sum) - term : 0.f;  // an infinite sum stays what it is
    sum = next;
  }
  return sum;
}
template <>
SEQCONV_DEVICE float skip_sum(Gated<c32>, Gated<c32>, int, Team) {
  return 0.f;
}

// The bias's gradient is the sum of dv alone. Blocks take every `groups`-th sample, and of it every
// `slots`-th piece of as many steps as there are threads; the parts are added up as the skip's.
struct Steps {
  int b, begin, count;  // sample, the first step and the steps of a row
};
SEQCONV_DEVICE Steps steps_of(const ConvolutionArgs& a, int b) { return {b, 0, (int)a.length}; }
SEQCONV_DEVICE Steps steps_of(const PackedArgs& a, int b) {
  const Span row = span(a, b);
  return {0, row.begin, row.steps};
}
template <class T, class Args>
SEQCONV_DEVICE void bias_sums(const Args& a, unsigned char*) {
  const int rows = (int)(a.heads * a.channels), row = blockIdx.x % rows, part = blockIdx.x / rows,
            channels = (int)a.channels, slots = (int)a.slots, threads = blockDim.x;
  float sum = 0.f, lost = 0.f;  // as in skip_sum
  for (int b = part / slots; b < (int)a.batch; b += (int)a.groups) {
    const Steps s = steps_of(a, b);
    const Place p{s.b, row % channels, s.begin, 0, s.count};
    const Gated<T> dv = gradient<T>(a, p, row / channels);
    for (int t = part % slots * threads + threadIdx.x; t < s.count; t += slots * threads) {
      const float term = dv(t) - lost, next = sum + term;
      lost = next - next == 0.f ? (next - sum) - term : 0.f;
      sum = next;
    }
  }
  a.dskip_parts[(part * (i64)rows + row) * threads + threadIdx.x] = sum;
}

struct SkipArgs {
  i64 parts, heads, channels, threads;  // where one skip serves all heads, heads count as parts
  const float* dskip_parts;             // (part, head, channel, thread)
  Tensor dskip;
};

// Adds up the parts for the head and channel of this block, in float64, since they may cancel, and
// in an order that is always the same.
SEQCONV_DEVICE void skip_gradient(const SkipArgs& a, unsigned char* shared) {
  const int threads = (int)a.threads, count = (int)a.parts * threads;
  const i64 rows = a.heads * a.channels, row = blockIdx.x;
  const Team team{(int)threadIdx.x, (int)blockDim.x};
  double sum = 0.;
  for (int i = team.rank; i < count; i += team.size)
    sum += a.dskip_parts[(i / threads * rows + row) * threads + i % threads];
  sum = team_reduce(team, sum, (double*)shared, [](double x, double y) { return x + y; });
  const i64 at = row / a.channels * a.dskip.head + row % a.channels * a.dskip.channel;
  if (team.rank == 0) store_any(a.dskip.data, a.dskip.dtype, at, (float)sum);
}
