// Complex matrices of 16 x 16 in a warp's registers, as operands and results of the tensor cores.
//
// An operand holds fp16 pairs; a result holds fp16 pairs (fast: accumulated in fp16, already an
// operand) or float32 pairs (accurate). Packed registers {0, 1, 2, 3} of a left operand are, as {0,
// 2} and {1, 3}, the two right operands of its transpose, so a chain of products needs neither
// shuffles nor shared memory.
#pragma once
#include "mma.cuh"

struct Matrix {  // left operand
  u32 re[4], im[4];
};
struct Columns {  // right operand: 8 columns [j], rows 0..7 and 8..15 [half]
  u32 re[2][2], im[2][2];
};
template <class Number>  // u32: fp16 pairs; Pair: float32
struct Result {
  Number re[2][2],
      im[2][2];  // 8 columns [j], rows group and group + 8 [half]; two neighbouring columns each
};

SEQCONV_DEVICE u32 to_operand(u32 x) { return x; }
SEQCONV_DEVICE u32 to_operand(Pair x) { return pack(x.x, x.y); }
SEQCONV_DEVICE void from_operand(u32& y, u32 x) { y = x; }
SEQCONV_DEVICE void from_operand(Pair& y, u32 x) { y = unpack(x); }
SEQCONV_DEVICE Pair to_pair(u32 x) { return unpack(x); }
SEQCONV_DEVICE Pair to_pair(Pair x) { return x; }
SEQCONV_DEVICE void from_pair(u32& y, Pair x) { y = pack(x.x, x.y); }
SEQCONV_DEVICE void from_pair(Pair& y, Pair x) { y = x; }

template <class Number>
SEQCONV_DEVICE Matrix to_operand(const Result<Number>& x) {
  Matrix m;
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      m.re[2 * j + half] = to_operand(x.re[j][half]);
      m.im[2 * j + half] = to_operand(x.im[j][half]);
    }
  return m;
}
SEQCONV_DEVICE Columns transposed(const Matrix& m) {
  return {{{m.re[0], m.re[2]}, {m.re[1], m.re[3]}}, {{m.im[0], m.im[2]}, {m.im[1], m.im[3]}}};
}

template <class Number>
SEQCONV_DEVICE void clear(Number (&x)[2][2]) {
#pragma unroll
  for (int j = 0; j < 2; ++j) x[j][0] = x[j][1] = Number{};
}

// a x, or conj(a) x
template <class Number, bool kConj = false>
SEQCONV_DEVICE Result<Number> product(const Matrix& a, const Columns& x) {
  Result<Number> d;
  clear(d.re);
  clear(d.im);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    mma(d.re[j], a.re, x.re[j][0], x.re[j][1]);
    mma(d.im[j], a.re, x.im[j][0], x.im[j][1]);
    const u32(&direct)[2] = kConj ? x.im[j] : x.re[j], (&turned)[2] = kConj ? x.re[j] : x.im[j];
    mma(kConj ? d.re[j] : d.im[j], a.im, direct[0], direct[1]);
    mma(kConj ? d.im[j] : d.re[j], a.im, negate2(turned[0]), negate2(turned[1]));
  }
  return d;
}
// a x of a real x
template <class Number>
SEQCONV_DEVICE Result<Number> product_of_real(const Matrix& a, const u32 (&x)[2][2]) {
  Result<Number> d;
  clear(d.re);
  clear(d.im);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    mma(d.re[j], a.re, x[j][0], x[j][1]);
    mma(d.im[j], a.im, x[j][0], x[j][1]);
  }
  return d;
}
// the real part of a x, always in float32: it is the end of a chain
SEQCONV_DEVICE void real_product(Pair (&d)[2][2], const Matrix& a, const Columns& x) {
  clear(d);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    mma(d[j], a.re, x.re[j][0], x.re[j][1]);
    mma(d[j], a.im, negate2(x.im[j][0]), negate2(x.im[j][1]));
  }
}

// x w or x conj(w), elementwise on pairs
template <bool kConj>
SEQCONV_DEVICE void multiply(u32& re, u32& im, u32 wr, u32 wi) {
  const u32 r = fma2(kConj ? im : negate2(im), wi, mul2(re, wr));
  im = fma2(kConj ? negate2(re) : re, wi, mul2(im, wr));
  re = r;
}
template <bool kConj>
SEQCONV_DEVICE void multiply(Pair& re, Pair& im, Pair wr, Pair wi) {
  const float sign = kConj ? -1.f : 1.f;
  const Pair r{re.x * wr.x - sign * im.x * wi.x, re.y * wr.y - sign * im.y * wi.y};
  im = {im.x * wr.x + sign * re.x * wi.x, im.y * wr.y + sign * re.y * wi.y};
  re = r;
}

struct alignas(16) c32x2 {
  c32 x, y;
};
// Factors of a tile in the place of a result's elements (or of a right operand's).
template <class Number>
struct Factors {
  Number re[2][2], im[2][2];
  SEQCONV_DEVICE void set(int j, int half, c32 x, c32 y) {
    from_pair(re[j][half], {x.re, y.re});
    from_pair(im[j][half], {x.im, y.im});
  }
};
template <bool kConj, class Number>
SEQCONV_DEVICE void multiply(Result<Number>& x, const Factors<Number>& w) {
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      multiply<kConj>(x.re[j][half], x.im[j][half], w.re[j][half], w.im[j][half]);
}
template <bool kConj, class Number>
SEQCONV_DEVICE void multiply(Columns& x, const Factors<Number>& w) {
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Number re, im;
      from_operand(re, x.re[j][half]);
      from_operand(im, x.im[j][half]);
      multiply<kConj>(re, im, w.re[j][half], w.im[j][half]);
      x.re[j][half] = to_operand(re);
      x.im[j][half] = to_operand(im);
    }
}
