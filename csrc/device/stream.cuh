// A causal convolution one step at a time, by relaxed tiling (csrc/cpu/stream.h has the algorithm).
//
// In a step the lanes of a row write the input, take the sum that waits for it away, and add the
// input times the first taps to the sums of the rest of the block. Where a block of steps ends, a
// tile of n points is due, and another kernel convolves the last n inputs into the next n sums.
//
// A tile has pieces of m points, the most that a block of threads transforms; most tiles have one.
// The inputs of piece j meet the sums of piece i with lags around n + (i - j) m, which is one
// two-sided convolution of m points. The spectra belong to that middle lag, so that tiles of
// several sizes share them, and those of all tiles together have hardly more than `period` points.
// Nothing is kept between pieces. The price is (n / m)^2 convolutions of m points for one of n, in
// n / m blocks at a time.
//
// In a plain step all rows have one clock, which the host knows: it launches tiles where they are
// due. In a spread step every row has its own in global memory, and the launches never change: of a
// sample's channels, about one in kBlock comes to the end of a block.
#pragma once
#include "fftconv.cuh"

constexpr int kBlock = 32;    // steps
constexpr int kRowLanes = 8;  // of a row in a step; each has four neighbours of a block
constexpr int kTogether = 4;  // neighbouring channels that have one clock
constexpr int kGroup = kTogether * kBlock / 2;
constexpr i64 kGolden = 0x9E3779B1;  // blocks that a pair of groups is ahead of the one before

struct StreamArgs {
  i64 batch, heads, channels, period;
  i64 activation;     // of enum Activation
  i64 largest;        // points of the largest piece of a tile
  i64 now;            // plain: the clock of all rows, before the step
  i64 points;         // plain: of the tiles that are due
  i64 count;          // taps of k
  i64* clock;         // spread: (batch)
  float* inputs;      // (batch, period / kBlock, channels, kBlock)
  float* sums;        // (batch, period / kBlock, heads, channels, kBlock)
  const float* taps;  // (heads, channels, 2 kBlock): kBlock zeros, then k[0] ... k[kBlock - 1]
  const float* k;     // (heads, channels, count)
  c32* spectra;       // of every middle lag, (heads, channels, points of a piece)
  const c32* tables;  // of transforms of kBlock, 2 kBlock, ..., largest points
  Tensor u, pre_gate, post_gate, y;  // (batch, head, channel)
};

SEQCONV_DEVICE i64 clock_of(const StreamArgs& a, i64 b, i64 h) {
  if (a.clock == nullptr) return a.now;
  const int group = (int)h / kGroup, place = (int)h % kGroup / kTogether;
  const i64 ahead = 2 * place + group % 2 + kBlock * (group / 2 * kGolden);
  return (a.clock[b] + ahead) & (a.period - 1);
}
// Where in a ring of (batch, blocks, rings, kBlock) the block of a time begins.
SEQCONV_DEVICE i64 block_at(const StreamArgs& a, i64 b, i64 time, i64 rings, i64 ring) {
  return ((b * (a.period / kBlock) + time / kBlock) * rings + ring) * kBlock;
}
SEQCONV_DEVICE float value_at(const Tensor& t, i64 b, i64 c, i64 h) {
  return load_any(row_of(t, b, c, h), t.dtype, 0);
}

// One step of all rows.
SEQCONV_DEVICE void stream_step(const StreamArgs& a, unsigned char*) {
  const int lane = threadIdx.x % kRowLanes, first = kBlock / kRowLanes * lane;
  const int channels = (int)a.channels, rows = (int)a.batch * channels;
  const int row = (int)((blockIdx.x * blockDim.x + threadIdx.x) / kRowLanes);
  if (row >= rows) return;
  const int b = row / channels, h = row % channels;
  const i64 clock = clock_of(a, b, h);
  const int s = (int)clock & (kBlock - 1);
  float now = value_at(a.u, b, 0, h);
  if (a.pre_gate.data != nullptr) now *= value_at(a.pre_gate, b, 0, h);
  if (lane == 0) a.inputs[block_at(a, b, clock, channels, h) + s] = now;
  if (first + 3 < s) return;
  for (int c = 0; c < (int)a.heads; ++c) {
    const i64 ring = (i64)c * channels + h;
    Four<float>* sums =
        (Four<float>*)(a.sums + block_at(a, b, clock, a.heads * channels, ring) + first);
    const float* taps = a.taps + ring * 2 * kBlock + kBlock - s + first;
    Four<float> sum = *sums;
    float v = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = first + i;
      if (at < s)
        continue;  // Those stay as they are whatever the input is: 0 times infinity is NaN.
      sum.at[i] += taps[i] * now;
      if (at > s) continue;
      v = sum.at[i];
      sum.at[i] = 0.f;  // for the output a period later
    }
    *sums = sum;
    if (lane != s / 4) continue;
    v = activate(v, a.activation);
    if (a.post_gate.data != nullptr) v *= value_at(a.post_gate, b, c, h);
    store_any((void*)row_of(a.y, b, c, h), a.y.dtype, 0, v);
  }
}
// Spread: one thread for every sample, behind the tiles.
SEQCONV_DEVICE void stream_clocks(const StreamArgs& a, unsigned char*) {
  const i64 b = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (b < a.batch) a.clock[b] = (a.clock[b] + 1) & (a.period - 1);
}

// Blocks of a ring, as one row.
template <class T>
struct Blocks {
  T* data;
  i64 apart;  // from one block to the next

  SEQCONV_DEVICE T* at(int t) const { return data + (t / kBlock) * apart + t % kBlock; }
  // The points of a column of a pass lie whole blocks apart, or half a block where a row of 16 R
  // points begins with radix R.
  SEQCONV_DEVICE T* at(int t, int i, int distance) const {
    const bool half = distance < kBlock;
    const i64 one = half ? distance : distance / kBlock * apart, two = half ? apart : 2 * one;
    return at(t) + (i / 2) * two + (i % 2) * one;
  }
};
struct InputBlocks : Blocks<const float> {
  SEQCONV_DEVICE explicit operator bool() const { return true; }
  SEQCONV_DEVICE float operator()(int t) const { return *at(t); }
  template <int R, class Op>
  SEQCONV_DEVICE void each(int t, int distance, Op op) const {
#pragma unroll
    for (int i = 0; i < R; ++i) op(i, at(t, i, distance));
  }
};
// What adds to a number that was read before.
struct AddTo {
  float* at;
  float before;
  SEQCONV_DEVICE AddTo operator*() const { return *this; }
};
SEQCONV_DEVICE void from_float(AddTo to, float x) { *to.at = to.before + x; }
struct SumBlocks : Blocks<float> {
  bool real;  // false: nothing is read or written

  SEQCONV_DEVICE explicit operator bool() const { return true; }
  template <int R, class Op>
  SEQCONV_DEVICE void each(int t, int distance, Op op) const {
    float before[R];  // all are read before one is written, so that none waits for another
#pragma unroll
    for (int i = 0; i < R; ++i) before[i] = real ? *at(t, i, distance) : 0.f;
    keep_order();
#pragma unroll
    for (int i = 0; i < R; ++i)
      if (real) op(i, AddTo{at(t, i, distance), before[i]});
  }
};

// The transform of n points, a power of two, by its place in the tables: that of n points begins at
// 2 (n - kBlock), where the smaller ones end at the latest.
SEQCONV_DEVICE AnyTransform any_transform(const StreamArgs& a, i64 n) {
  const int log = log2_of((int)n), first = log % 4 ? 1 << (log % 4) : 16;
  return {{n, (log + 3) / 4, 0x1010101000 + first, a.tables + 2 * (n - kBlock)}};
}
// Of pieces of m points around a middle lag, which is m or, for the largest pieces, a multiple of
// it. Those before have lag - kBlock points for every head and channel.
SEQCONV_DEVICE c32* spectrum_at(const StreamArgs& a, i64 lag, i64 m, i64 row) {
  return a.spectra + a.heads * a.channels * (lag - kBlock) + row * m;
}

// Adds up one piece of the sums of one head, from the inputs before `end`.
template <class T>
SEQCONV_DEVICE void tile_piece(const StreamArgs& a, const T& t, Plane plane, Team team, int b,
                               int c, int h, i64 end, i64 n, int piece, bool real) {
  const typename T::Columns columns{};
  const int m = (int)t.n, pieces = (int)(n / m);
  const i64 rings = a.heads * a.channels, row = c * a.channels + h;
  // The last lag is `period`: taps beyond are zeros.
  const int without = piece - (int)((a.period - n) / m);
  for (int from = without > 0 ? without : 0; from < pieces; ++from) {
    const i64 begin = end - n + (i64)from * m, lag = n + (i64)(piece - from) * m;
    const InputBlocks x{{a.inputs + block_at(a, b, begin, a.channels, h), a.channels * kBlock}};
    first_pass(t, plane, m, columns, x, team);
    sync_block();
    middle_passes<false>(t, plane, m, (int)t.passes - 1, columns, team);
    const c32* k = spectrum_at(a, lag, m, row);
    middle<kBoth>(t, plane, [&](i64 f, int, c32 z) { return z * k[f]; }, team);
    sync_block();
    middle_passes<true>(t, plane, m, (int)t.passes - 1, columns, team);
    const i64 to = (end & (a.period - 1)) + (i64)piece * m;
    const SumBlocks sums{{a.sums + block_at(a, b, to, rings, row), rings * kBlock}, real};
    last_pass(t, plane, m, columns, sums, team);
    // The next first pass writes what the same threads have read.
  }
}

// The tiles of a plain step, several rows to a block where a row has one piece.
template <class Shape>
SEQCONV_DEVICE void stream_tile(const StreamArgs& a, unsigned char* shared) {
  const Shape t{a.tables + 2 * (Shape::n - kBlock)};
  const int size = Shape::threads(0), slot = threadIdx.x / size;
  const int channels = (int)a.channels, pieces = (int)(a.points / Shape::n);
  const int count = (int)(a.batch * a.heads) * pieces * channels;
  const int unit = blockIdx.x * (blockDim.x / size) + slot;
  const bool real = unit < count;
  const int row = real ? unit : count - 1;  // a slot without a row repeats the last
  const int piece = row / channels % pieces, head = row / channels / pieces;
  const Plane plane{(c32*)shared + slot * plane_size(Shape::n)};
  tile_piece(a, t, plane, {(int)threadIdx.x % size, size}, head / (int)a.heads, head % (int)a.heads,
             row % channels, a.now + 1, a.points, piece, real);
}

// The tiles of a spread step. The grid has a block for every piece of the largest tile of every
// head of every channel that may be due; most of them have nothing to do.
SEQCONV_DEVICE void stream_tiles(const StreamArgs& a, unsigned char* shared) {
  const int most = (int)(a.period / a.largest);
  const int of_sample = (((int)a.channels - 1) / (2 * kGroup) + 1) * kTogether;
  int block = blockIdx.x;
  const int number = block % of_sample;
  block /= of_sample;
  const int piece = block % most;
  block /= most;
  const int c = block % (int)a.heads, b = block / (int)a.heads;
  // Of every second group kTogether channels are so many steps ahead that their blocks end.
  const int missing = (int)((kBlock - 1 - a.clock[b]) & (kBlock - 1));
  const int group = 2 * (number / kTogether) + missing % 2;
  const int h = group * kGroup + missing / 2 * kTogether + number % kTogether;
  if (h >= (int)a.channels) return;
  const i64 end = clock_of(a, b, h) + 1, n = end & -end;
  const i64 m = n < a.largest ? n : a.largest;
  if (piece >= n / m) return;
  const Team team{(int)threadIdx.x, (int)blockDim.x};
  tile_piece(a, any_transform(a, m), Plane{(c32*)shared}, team, b, c, h, end, n, piece, true);
}

// The taps around a middle lag: those from it on, and on the imaginary axis those before it, since
// a lag of -l is position m - l times x^-m = -i.
struct TileTaps {
  const float* k;
  i64 count, lag;
  int m;

  SEQCONV_DEVICE c32 operator()(int t) const {
    c32 z{0.f, 0.f};
    if (lag + t < count) z.re = k[lag + t];
    if (t > 0 && lag - m + t < count) z.im = -k[lag - m + t];
    return z;
  }
};
// A block for every row of taps and every middle lag.
SEQCONV_DEVICE void stream_spectra(const StreamArgs& a, unsigned char* shared) {
  const int rows = (int)(a.heads * a.channels), row = blockIdx.x % rows;
  const i64 which = blockIdx.x / rows + 1;
  const int smaller = log2_of((int)(a.largest / kBlock));
  const i64 lag = which <= smaller ? kBlock << (which - 1) : (which - smaller) * a.largest;
  const i64 m = lag < a.largest ? lag : a.largest;
  const AnyTransform t = any_transform(a, m);
  const Plane plane{(c32*)shared};
  const Team team{(int)threadIdx.x, (int)blockDim.x};
  forward_passes(t, plane, TileTaps{a.k + row * a.count, a.count, lag, (int)m}, team);
  c32* to = spectrum_at(a, lag, m, row);
  const float scale = 1.f / (float)m;
  middle<kForwardOnly>(
      t, plane,
      [&](i64 f, int, c32 z) {
        to[f] = z * scale;
        return z;
      },
      team);
}
