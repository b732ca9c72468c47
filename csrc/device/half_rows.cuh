// How rows of 16-bit numbers come into shared memory and leave it, for the kernels on tensor cores.
#pragma once
#include "fftconv.cuh"
#include "half_transform.cuh"

// The rows of one set of taps that a block works on: those of a group, for one head and channel.
struct Unit {
  int set, group, head, channel;  // set: the sample whose taps they are, or 0
  int first, last;                // rows, which are the windows of one sample after the other

  SEQCONV_DEVICE Unit(const ConvolutionArgs& a, int index, int heads) {
    const int channels = (int)a.channels, groups = (int)a.groups;
    channel = index % channels, index /= channels;
    head = (int)a.head, group = index % groups, set = index / groups;
    if (heads > 1) {
      head = index % heads, index /= heads;
      group = index % groups, set = index / groups;
    }
    const int rows = (int)((a.per_sample ? 1 : a.batch) * a.windows);
    const int share = (rows + groups - 1) / groups;
    first = group * share, last = first + share < rows ? first + share : rows;
  }
  SEQCONV_DEVICE int taps_row(const ConvolutionArgs& a) const {
    return (set * (int)a.heads + head) * (int)a.channels + channel;
  }
  // The row of sums over rows that a slot writes.
  SEQCONV_DEVICE int sums_row(const ConvolutionArgs& a, int slot) const {
    const int rows = (int)((a.per_sample ? a.batch : 1) * a.heads * a.channels);
    return (group * (int)a.slots + slot) * rows + taps_row(a);
  }
  SEQCONV_DEVICE Place place_of_row(const ConvolutionArgs& a, int row) const {
    int sample = row, window = 0;
    if (a.windows > 1) {  // division is slow
      sample = row / (int)a.windows;
      window = row - sample * (int)a.windows;
    }
    return place(a, a.per_sample ? set : sample, channel, window, true);
  }
};

// ---- sizes ----
// The exponent e for which a row whose largest size has these bits, over 2^e, lies in [1/4, 1/2).
// It is limited to what T's 2^-e can be.
template <class T>
SEQCONV_DEVICE int exponent_of(u32 bits) {
  const int least = 1 - Format<T>::kBias;
  const int most = Format<T>::kMantissa == 10 ? 18 : Format<T>::kBias - 1;
  const int e = (int)(bits >> Format<T>::kMantissa) - (Format<T>::kBias - 2);
  return e < least ? least : e > most ? most : e;
}
// 2^-e, twice. fp16 needs its smallest numbers for rows near its largest ones.
template <class T>
SEQCONV_DEVICE u32 power_below(int e) {
  const int bias = Format<T>::kBias, mantissa = Format<T>::kMantissa;
  const u32 bits = e < bias ? (u32)(bias - e) << mantissa : 1u << (mantissa + bias - 1 - e);
  return bits | bits << 16;
}
// The largest of the team's numbers for each of its rows. Whoever comes out of it knows that all
// threads of the team have come to it.
template <class S>
SEQCONV_DEVICE void team_max(const Lane<S>& l, u32 (&top)[S::pair]) {
#pragma unroll
  for (int r = 0; r < S::pair; ++r) {
    top[r] = warp_max(top[r]);
    if (S::warps > 1 && l.lane == 0) store1(l.largest + 64 * r + 4 * l.warp, top[r]);
  }
  l.meet();
#pragma unroll
  for (int r = 0; r < S::pair; ++r) {
    if (S::warps == 2) {
      const uint2 v = load2(l.largest + 64 * r);
      top[r] = v.x > v.y ? v.x : v.y;
    }
#pragma unroll
    for (int w = 0; w < S::warps && S::warps > 2; w += 4) {
      const uint4 v = load4(l.largest + 64 * r + 4 * w);
      const u32 x = v.x > v.y ? v.x : v.y, y = v.z > v.w ? v.z : v.w, all = x > y ? x : y;
      top[r] = w == 0 || all > top[r] ? all : top[r];
    }
  }
}

// What undoes the scales of a row and of the taps' spectrum must be a float32: large results leave
// rows up to 2^8 times larger.
SEQCONV_DEVICE int within_range(int e, float divisor) {
  const int most = 254 - (int)(__float_as_uint(divisor) >> 23), least = e - 8;
  return e <= most ? e : least > most ? least : most;
}
// Finds for each of the team's rows the exponent e that brings its largest size to [1/4, 1/2), and
// the power of two 2^-e in the form that Raw::scaled takes. kOut of the rows come out again.
template <class T, int kOut, class S>
SEQCONV_DEVICE void measure(const Lane<S>& l, const Raw<S>& raw, float divisor, int (&e)[S::pair],
                            u32 (&down)[S::pair]) {
  constexpr bool kTwo = S::pre && Format<T>::kMantissa == 10;  // products may not be fp16 numbers
  u32 top[S::pair];
#pragma unroll
  for (int r = 0; r < S::pair; ++r)
    top[r] = kTwo ? __float_as_uint(raw.largest_product(r)) : raw.template largest<T>(r);
  team_max(l, top);
#pragma unroll
  for (int r = 0; r < S::pair; ++r) {
    e[r] = kTwo ? exponent_above(__uint_as_float(top[r])) : exponent_of<T>(top[r]);
    if (r < kOut) e[r] = within_range(e[r], divisor);
    down[r] = S::pre ? __float_as_uint(power_of_two(-e[r])) : power_below<T>(e[r]);
  }
}

// ---- rows in pieces of 16 bytes ----
// A thread's pieces of the rows of one tensor that belong to a unit.
template <class T, class S>
struct Stream {
  const Tensor* tensor;
  int head;
  T* first;  // whole rows: this thread's first piece of row 0

  SEQCONV_DEVICE Stream(const Lane<S>& l, const Tensor& t, const Unit& unit)
      : tensor(&t), head(unit.head) {
    T* row = t.template row<T>(unit.set, head, unit.channel);
    if (S::whole) first = row == nullptr ? row : row + piece_time(l, 0);
  }
  static SEQCONV_DEVICE int piece_time(const Lane<S>& l, int i) {
    return 256 * (l.warp + S::warps * i) + 8 * l.lane;
  }
  // How far piece i is from this thread's first one in a plane.
  static SEQCONV_DEVICE u32 piece_place(int i) {
    static_assert(S::warps % S::split == 0, "a warp's rows are evenly spaced");
    return i * (S::warps / S::split) * S::pitch;
  }
  // This thread's first piece of a row.
  SEQCONV_DEVICE T* begin(const Lane<S>& l, int row, const Place& p) const {
    // Where samples have taps of their own, a unit has one row, number 0.
    return S::whole ? first + row * tensor->batch
                    : tensor->template row<T>(p.b, head, p.h) + p.shift + piece_time(l, 0);
  }
  // Calls op(i, piece) for the pieces of a row, which is a null pointer outside of the row.
  template <class Op>
  SEQCONV_DEVICE void each(const Lane<S>& l, int row, const Place& p, Op op) const {
    T* at = begin(l, row, p);
#pragma unroll
    for (int i = 0; i < S::inner; ++i) {
      const int t = piece_time(l, i);
      op(i, S::whole || (t >= p.begin && t < p.end) ? at + 256 * S::warps * i : nullptr);
    }
  }
  // Brings a row into the plane that begins `to` bytes after the first one.
  SEQCONV_DEVICE void fetch(const Lane<S>& l, u32 to, int row, const Place& p) const {
    each(l, row, p, [&](int i, const T* piece) {
      const u32 at = l.own + to + piece_place(i);
      if (S::whole)
        copy_piece(at, piece);
      else
        copy_piece(at, piece == nullptr ? tensor->data : piece, piece == nullptr ? 0 : 16);
    });
  }
  SEQCONV_DEVICE void write(const Lane<S>& l, u32 from, int row, const Place& p) const {
    each(l, row, p, [&](int i, T* piece) {
      if (S::whole || piece != nullptr) *(uint4*)piece = load4(l.own + from + piece_place(i));
    });
  }
};

// ---- any rows ----
// Writes a row as fp16 numbers to the first plane of row r of the team, scaled by the power of two
// whose exponent it returns. The row is read twice, the second time from the cache: registers do
// not suffice to keep it.
template <class T, class Op>
SEQCONV_DEVICE void each_eight(const Gated<T>& source, int rank, int step, int n, Op op) {
  float v[8];
  if (source.in_pieces()) {
    for (int t = 8 * rank; t < n; t += 8 * step) {
      source.piece(t, v);
      op(t, v);
    }
    return;
  }
#pragma unroll 1
  for (int t = 8 * rank; t < n; t += 8 * step) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = source(t + i);
    op(t, v);
  }
}
template <class T, class S>
SEQCONV_DEVICE float largest_of(const Lane<S>& l, const Gated<T>& source) {
  float largest = 0.f;
  each_eight(source, l.rank, S::threads, S::points, [&](int, const float (&v)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(v[i]));
  });
  return largest;
}
template <class T, class S>
SEQCONV_DEVICE void stage(const Lane<S>& l, int r, const Gated<T>& source, int exponent) {
  const float scale = power_of_two(-exponent);
  each_eight(source, l.rank, S::threads, S::points, [&](int t, const float (&v)[8]) {
    store4(l.element(t) + r * S::row,
           uint4{halves(v[0] * scale, v[1] * scale), halves(v[2] * scale, v[3] * scale),
                 halves(v[4] * scale, v[5] * scale), halves(v[6] * scale, v[7] * scale)});
  });
}
// The outer pass of rows that the team has staged, in place; then the whole team has come.
template <class T, class S>
SEQCONV_DEVICE void outer_forward_any(const Lane<S>& l) {
  l.meet();
  const Raw<S> raw(l);
  sync_warp();
  const u32 down[S::pair] = {};
  outer_forward<T>(l, raw, OuterMatrix<S>(l), down);
  l.meet();
}
// Real parts without their scale, for `drain`.
template <class S, int kRows>
SEQCONV_DEVICE void outer_inverse_any(const Lane<S>& l) {
  outer_inverse<S, kRows>(l, BackMatrix<S>(l),
                          [](int, float (&v)[4], u32, u32, u32& low, u32& high) {
                            low = halves(v[0], v[1]), high = halves(v[2], v[3]);
                          });
}
// Gives the real parts, which are fp16 numbers in the first plane, times a scale to the sink.
template <class S, class Sink>
SEQCONV_DEVICE void drain(const Lane<S>& l, float scale, const Sink& sink) {
#pragma unroll 1
  for (int t = 2 * l.rank; t < S::points; t += 2 * S::threads) {
    const u32 v = load1(l.element(t));
    sink(t, c32{Format<fp16>::low(v) * scale, 0.f});
    sink(t + 1, c32{Format<fp16>::high(v) * scale, 0.f});
  }
}
