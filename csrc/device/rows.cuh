// The arguments of the convolution's kernels, and rows of its tensors: reading with gates, writing
// with skip, gates and activation.
#pragma once
#include "memory.cuh"
#include "transform.cuh"

enum Activation { kNone = 0, kGelu = 1, kSilu = 2, kRelu = 3 };

struct ConvolutionArgs {
  i64 batch, heads, channels, length;
  i64 taps, taps_rev;      // of k and of k_rev that meet an output at all
  i64 per_sample;          // whether every sample has taps of its own
  i64 activation;          // of enum Activation
  i64 windows;             // of a row
  i64 step, lead;          // of a window: its outputs, and its points that lie before the first one
  i64 row_threads, slots;  // threads of one row, and rows that a block handles at a time
  i64 groups;              // blocks that share the rows of one channel
  i64 parts;               // of dk_parts; every slot of every group has one
  i64 outer, lower;        // long rows: points of the outer transform, and points below it
  i64 columns;             // long rows: columns of a block
  i64 order;               // in which spectra are kept, of enum Order
  i64 head;                // tensor cores' gradients: the head whose turn it is
  double spectrum_scale;   // by which the taps' spectra are multiplied
  double gradient_scale;   // by which the spectra of the taps' gradients are multiplied
  Transform transform;
  c32* spectrum;       // of the taps: (row of taps, n)
  float* divisors;     // (row of taps): powers of two that spectra in tiles were divided by
  c32* dk_parts;       // (part, row of taps, n): sums of dv times the conjugate of x
  float* dskip_parts;  // (part, head, channel, row_threads): sums of dv times x, or of dv alone
  u32* x_spectra;      // tensor cores: (part, row of taps, n), where x's spectra wait for dv's
  float* dx;           // (batch, channels, length): sums over heads, where there are several
  c32* long_rows;      // long rows between their passes: (sample, head, channel, n)
  float* dv;           // (batch, heads, channels, length), where it is not simply post_gate * dy
  // k, k_rev, skip, bias and their gradients have any dtype, and the others have the kernel's.
  Tensor u, k, k_rev, skip, pre_gate, post_gate, bias, y;
  Tensor dy, du, dk, dk_rev, dskip, dpre_gate, dpost_gate;
};

SEQCONV_DEVICE float activate(float v, i64 activation) {
  if (activation == kGelu) return 0.5f * v * (1.f + erff(v * 0.70710678118654752440f));
  if (activation == kSilu) return v / (1.f + expf(-v));
  if (activation == kRelu) return v > 0.f || v != v ? v : 0.f;
  return v;
}
SEQCONV_DEVICE float slope(float v, i64 activation) {
  if (activation == kGelu)
    return 0.5f * (1.f + erff(v * 0.70710678118654752440f)) +
           v * 0.39894228040143267794f * expf(-0.5f * v * v);
  if (activation == kSilu) {
    const float s = 1.f / (1.f + expf(-v));
    return s * (1.f + v * (1.f - s));
  }
  if (activation == kRelu) return v > 0.f ? 1.f : 0.f;
  return 1.f;
}

// Where a block's row lies: window `window` of sample b, channel h.
struct Place {
  int b, h;
  int shift;  // time of local position 0
  int begin,
      end;  // the local positions whose time lies inside the row; a slot without a row has none
};

SEQCONV_DEVICE Place place(const ConvolutionArgs& a, int b, int h, int window, bool real) {
  const int shift = window * (int)a.step - (int)a.lead, end = (int)a.length - shift,
            n = (int)a.transform.n;
  return {b, h, shift, real && shift < 0 ? -shift : 0, real ? end < n ? end : n : 0};
}
// Only the outputs of the window, not what lies around them.
SEQCONV_DEVICE Place inside(const ConvolutionArgs& a, Place p) {
  if (p.begin < (int)a.lead) p.begin = (int)a.lead;
  if (p.end > (int)(a.lead + a.step)) p.end = (int)(a.lead + a.step);
  return p;
}

// A row that is read or written as it is, neighbours in memory; null for others.
template <class T>
struct PlainRow {
  T* data;
  int begin, end;

  SEQCONV_DEVICE explicit operator bool() const { return data != nullptr; }
  // op(i, place) for the place of each point of a column
  template <int R, class Op>
  SEQCONV_DEVICE void each(int t, int distance, Op op) const {
    T* p = data + t;
    const int from = begin - t, to = end - t;
    if (from <= 0 && (R - 1) * distance < to) {
#pragma unroll
      for (int i = 0; i < R; ++i) op(i, p + i * distance);
    } else {
#pragma unroll
      for (int i = 0; i < R; ++i)
        if (from <= i * distance && i * distance < to) op(i, p + i * distance);
    }
  }
};

// gate * value, zero outside the place
template <class T>
struct Gated {
  const T* data;
  const T* gate;
  const float* dv;
  i64 step, gate_step;
  int begin, end;
  bool plain;  // neighbours in memory, without a gate

  SEQCONV_DEVICE float operator()(int t) const {
    if (t < begin || t >= end) return 0.f;
    if (plain) return to_float(data[t]);
    if (dv != nullptr) return dv[t];
    const float x = to_float(data[t * step]);
    return gate == nullptr ? x : x * to_float(gate[t * gate_step]);
  }
  SEQCONV_DEVICE PlainRow<const T> plain_row() const {
    return {plain ? data : nullptr, begin, end};
  }
  // Whether the row can be read in pieces of 8, which lie wholly inside or outside of it.
  SEQCONV_DEVICE bool in_pieces() const {
    const bool whole = begin % 8 == 0 && end % 8 == 0;
    return whole && (dv != nullptr ? aligned(dv, 1, 16)
                                   : aligned(data, step, 16) && aligned(gate, gate_step, 16));
  }
  SEQCONV_DEVICE uint4 plain_piece(int t) const {
    return eight_words(data + t, t >= begin && t < end);
  }
  SEQCONV_DEVICE void piece(int t, float (&v)[8]) const {
    const bool is_inside = t >= begin && t < end;
    if (dv != nullptr) {
      const Eight<float> x = is_inside ? *(const Eight<float>*)(dv + t) : Eight<float>{};
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = x.at[i];
      return;
    }
    to_floats<T>(plain_piece(t), v);
    if (gate == nullptr) return;
    float by[8];
    to_floats<T>(eight_words(gate + t, is_inside), by);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= by[i];
  }
};
template <>
struct Gated<c32> {
  const c32* data;
  const c32* gate;
  const float* dv;
  i64 step, gate_step;
  int begin, end;
  bool plain;

  SEQCONV_DEVICE c32 operator()(int t) const {
    return t < begin || t >= end ? c32{0.f, 0.f} : data[t * step];
  }
};

template <class T>
SEQCONV_DEVICE Gated<T> gated(const Tensor& value, const Tensor& gate, const Place& p, i64 head) {
  const T* data = value.template row<T>(p.b, head, p.h);
  const T* by = gate.template row<T>(p.b, head, p.h);
  return {data + p.shift * value.time,
          by == nullptr ? by : by + p.shift * gate.time,
          nullptr,
          value.time,
          gate.time,
          p.begin,
          p.end,
          by == nullptr && value.time == 1};
}
template <class T>
SEQCONV_DEVICE Gated<T> input(const ConvolutionArgs& a, const Place& p) {  // x
  return gated<T>(a.u, a.pre_gate, p, 0);
}
SEQCONV_DEVICE i64 dv_row(const ConvolutionArgs& a, const Place& p, i64 head) {
  return ((p.b * a.heads + head) * a.channels + p.h) * a.length + p.shift;
}
template <class T>
SEQCONV_DEVICE Gated<T> gradient(const ConvolutionArgs& a, const Place& p, i64 head) {  // dv
  Gated<T> g = gated<T>(a.dy, a.post_gate, p, head);
  if (a.dv == nullptr) return g;
  g.dv = a.dv + dv_row(a, p, head);
  g.plain = false;
  return g;
}

SEQCONV_DEVICE float bias_of(const ConvolutionArgs& a, i64 head, i64 channel) {
  if (a.bias.data == nullptr) return 0.f;
  return load_any(a.bias.data, a.bias.dtype, head * a.bias.head + channel * a.bias.channel);
}

// Takes v without its bias, and adds it. Without a dy it writes y = post_gate * activation(v); with
// one it writes the gradients dv and dpost_gate.
template <class T>
struct Output {
  T *y, *dpost;
  const T *post, *dy;
  float* dv;
  i64 y_step, post_step, dy_step, dpost_step, activation;
  float bias;
  int begin, end;
  bool plain;  // y = v without a bias, neighbours in memory

  SEQCONV_DEVICE PlainRow<T> plain_row() const { return {plain ? y : nullptr, begin, end}; }
  SEQCONV_DEVICE void operator()(int t, c32 z) const {
    if (t < begin || t >= end) return;
    if (plain) return from_float(y[t], z.re);
    const float v = z.re + bias;
    const float gate = post == nullptr ? 1.f : to_float(post[t * post_step]);
    if (dy == nullptr) return from_float(y[t * y_step], gate * activate(v, activation));
    const float g = to_float(dy[t * dy_step]);
    if (dpost != nullptr) from_float(dpost[t * dpost_step], g * activate(v, activation));
    if (dv != nullptr) dv[t] = g * gate * slope(v, activation);
  }
};
template <>
struct Output<c32> {
  c32* y;
  i64 y_step;
  int begin, end;

  SEQCONV_DEVICE void operator()(int t, c32 z) const {
    if (t >= begin && t < end) y[t * y_step] = z;
  }
};

template <class T>
SEQCONV_DEVICE T* shifted(const Tensor& t, const Place& p, i64 head) {
  T* row = t.template row<T>(p.b, head, p.h);
  return row == nullptr ? row : row + p.shift * t.time;
}
template <class T>
struct Sinks {
  static SEQCONV_DEVICE Output<T> output(const ConvolutionArgs& a, const Place& p, i64 head) {
    return {shifted<T>(a.y, p, head),
            shifted<T>(a.dpost_gate, p, head),
            shifted<T>(a.post_gate, p, head),
            shifted<T>(a.dy, p, head),
            a.dv == nullptr ? nullptr : a.dv + dv_row(a, p, head),
            a.y.time,
            a.post_gate.time,
            a.dy.time,
            a.dpost_gate.time,
            a.activation,
            bias_of(a, head, p.h),
            p.begin,
            p.end,
            a.activation == kNone && a.bias.data == nullptr && a.dy.data == nullptr &&
                a.post_gate.data == nullptr && a.y.time == 1};
  }
};
template <>
struct Sinks<c32> {
  static SEQCONV_DEVICE Output<c32> output(const ConvolutionArgs& a, const Place& p, i64 head) {
    return {shifted<c32>(a.y, p, head), a.y.time, p.begin, p.end};
  }
};

// Takes dx, and writes the gradients of u and pre_gate.
template <class T>
struct InputGradient {
  T *du, *dpre;
  const T *u, *pre;
  i64 du_step, dpre_step, u_step, pre_step;
  int begin, end;
  bool plain;  // du = dx, neighbours in memory

  SEQCONV_DEVICE PlainRow<T> plain_row() const { return {plain ? du : nullptr, begin, end}; }
  SEQCONV_DEVICE void operator()(int t, c32 z) const {
    if (t < begin || t >= end) return;
    if (plain) return from_float(du[t], z.re);
    if (du != nullptr)
      from_float(du[t * du_step], pre == nullptr ? z.re : z.re * to_float(pre[t * pre_step]));
    if (dpre != nullptr) from_float(dpre[t * dpre_step], z.re * to_float(u[t * u_step]));
  }
};
template <>
struct InputGradient<c32> {
  c32 *du, *dpre;
  const c32 *u, *pre;
  i64 du_step, dpre_step, u_step, pre_step;
  int begin, end;
  bool plain;

  SEQCONV_DEVICE void operator()(int t, c32 z) const {
    if (t >= begin && t < end) du[t * du_step] = z;
  }
};
template <class T>
SEQCONV_DEVICE InputGradient<T> input_gradient(const ConvolutionArgs& a, const Place& p) {
  return {shifted<T>(a.du, p, 0),
          shifted<T>(a.dpre_gate, p, 0),
          shifted<T>(a.u, p, 0),
          shifted<T>(a.pre_gate, p, 0),
          a.du.time,
          a.dpre_gate.time,
          a.u.time,
          a.pre_gate.time,
          p.begin,
          p.end,
          a.du.data != nullptr && a.du.time == 1 && a.pre_gate.data == nullptr &&
              a.dpre_gate.data == nullptr};
}

// The taps as one complex row: k, plus the skip at lag 0, and the future's taps on the imaginary
// axis, since a lag of -m is position n - m times x^-n = -i. Complex rows (of the inner transforms
// of long rows of taps) are taken as they are.
struct Taps {
  Tensor k, k_rev;
  const void *data, *data_rev;
  float skip;
  int taps, taps_rev, n;

  SEQCONV_DEVICE c32 operator()(int t) const {
    if (k.dtype == kComplex) return ((const c32*)data)[t * k.time];
    c32 z{0.f, 0.f};
    if (t < taps) z.re = load_any(data, k.dtype, t * k.time);
    if (t == 0) z.re += skip;
    const int lag = n - t;
    if (t > 0 && lag <= taps_rev) z.im = -load_any(data_rev, k_rev.dtype, (lag - 1) * k_rev.time);
    return z;
  }
};
// The sample whose taps they are, and how many of them meet an output at all.
struct TapsPlace {
  i64 b;
  int taps, taps_rev;
};
SEQCONV_DEVICE TapsPlace taps_place(const ConvolutionArgs& a, i64 b) {
  return {b, (int)a.taps, (int)a.taps_rev};
}
// Rows of taps are numbered (sample or 0, head, channel).
template <class Args>
SEQCONV_DEVICE Taps taps(const Args& a, i64 row) {
  const i64 h = row % a.channels, c = row / a.channels % a.heads;
  const TapsPlace p = taps_place(a, row / a.channels / a.heads);
  float skip = 0.f;
  if (a.skip.data != nullptr)
    skip = load_any(a.skip.data, a.skip.dtype, c * a.skip.head + h * a.skip.channel);
  return {a.k,    a.k_rev,    row_of(a.k, p.b, c, h), row_of(a.k_rev, p.b, c, h), skip,
          p.taps, p.taps_rev, (int)a.transform.n};
}

// Takes the sum of dv times the conjugate of x, and writes the gradients of the taps or a complex
// row.
struct TapsGradient {
  Tensor dk, dk_rev;
  void *data, *data_rev;
  int taps, taps_rev, n;

  SEQCONV_DEVICE void operator()(int t, c32 z) const {
    if (dk.dtype == kComplex) {
      ((c32*)data)[t * dk.time] = z;
      return;
    }
    if (dk.data != nullptr && t < taps) store_any(data, dk.dtype, t * dk.time, z.re);
    const int lag = n - t;
    if (dk_rev.data != nullptr && t > 0 && lag <= taps_rev)
      store_any(data_rev, dk_rev.dtype, (lag - 1) * dk_rev.time, -z.im);
  }
};
template <class Args>
SEQCONV_DEVICE TapsGradient taps_gradient(const Args& a, i64 row) {
  const i64 h = row % a.channels, c = row / a.channels % a.heads;
  const TapsPlace p = taps_place(a, row / a.channels / a.heads);
  return {a.dk,
          a.dk_rev,
          (void*)row_of(a.dk, p.b, c, h),
          (void*)row_of(a.dk_rev, p.b, c, h),
          p.taps,
          p.taps_rev,
          (int)a.transform.n};
}
