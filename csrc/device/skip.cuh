// The skip's gradient is a sum over samples and time. Every thread of the backward pass adds up a
// part, and a kernel of its own adds up the parts.
#pragma once
#include "rows.cuh"

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
