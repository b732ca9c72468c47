// Tiles of complex numbers of 16 bits in a warp's registers: products with matrices of the table,
// with twiddles, and butterflies between products.
#pragma once
#include "half_shape.cuh"

SEQCONV_DEVICE u32 halves(float x, float y) { return Format<fp16>::pack(x, y); }

struct Pairs {  // a tile of 16 x 16 complex numbers: each register holds two
  u32 re[4], im[4];
};
// x w, or x conj(w)
template <bool kConj>
SEQCONV_DEVICE void multiply(u32& re, u32& im, u32 wr, u32 wi) {
  const u32 r = fma2(kConj ? im : negate2(im), wi, mul2(re, wr));
  im = fma2(kConj ? negate2(re) : re, wi, mul2(im, wr));
  re = r;
}
template <bool kConj>
SEQCONV_DEVICE void multiply(Pairs& x, const uint4& re, const uint4& im) {
  multiply<kConj>(x.re[0], x.im[0], re.x, im.x);
  multiply<kConj>(x.re[1], x.im[1], re.y, im.y);
  multiply<kConj>(x.re[2], x.im[2], re.z, im.z);
  multiply<kConj>(x.re[3], x.im[3], re.w, im.w);
}
SEQCONV_DEVICE uint4 as_words(const u32 (&m)[4]) { return uint4{m[0], m[1], m[2], m[3]}; }

// ---- matrices ----
// Matrices of the table, in their order: as left operands, or as right ones of their transpose,
// whose pairs of registers have to be neighbours. What is needed both ways is there twice, since
// the compiler would move registers at every use.
enum Constants {
  kOuterRe,
  kOuterIm,
  kInnerRe,
  kInnerIm,
  kInnerMinusIm,
  kRightRe,
  kRightIm,
  kRightMinusIm,  // with 8 products there is no room for it
  kTwiddleRe,
  kTwiddleIm,
  kBackRe,
  kBackIm,
  kConstants
};
template <class S>
SEQCONV_DEVICE constexpr int place_of_constant(int which) {
  return 512 * (S::split == 8 && which > kRightMinusIm ? which - 1 : which);
}
SEQCONV_DEVICE void load_matrix(u32 (&m)[4], u32 at) {
  const uint4 v = load4(at);
  m[0] = v.x, m[1] = v.y, m[2] = v.z, m[3] = v.w;
}
// The matrix of an outer pass or of its inverse: one for all products of a column, or one for each.
template <class S, int kRe, int kMore>
struct OuterMatrices {
  u32 re[S::matrices][4], im[S::matrices][4];

  SEQCONV_DEVICE explicit OuterMatrices(const Lane<S>& l) {
    load_matrix(re[0], l.constants + place_of_constant<S>(kRe));
    load_matrix(im[0], l.constants + place_of_constant<S>(kRe + 1));
#pragma unroll
    for (int s = 1; s < S::matrices; ++s) {
      const int m = 4 * (s - 1) + kMore;
      load_matrix(re[s], S::padded ? l.pads + S::pad(m) : l.constants + 512 * (kConstants + m));
      load_matrix(im[s],
                  S::padded ? l.pads + S::pad(m + 1) : l.constants + 512 * (kConstants + m + 1));
    }
  }
};
template <class S>
using OuterMatrix = OuterMatrices<S, kOuterRe, 0>;
template <class S>
using BackMatrix = OuterMatrices<S, kBackRe, 2>;

template <class S>
struct InnerMatrices {
  u32 left_re[4], left_im[4], left_minus[4], right_re[4], right_im[4], right_minus[4];
  u32 twiddle_re[4], twiddle_im[4];

  SEQCONV_DEVICE explicit InnerMatrices(const Lane<S>& l) {
    const auto load = [&](u32(&m)[4], int which) {
      load_matrix(m, l.constants + place_of_constant<S>(which));
    };
    load(left_re, kInnerRe), load(left_im, kInnerIm), load(left_minus, kInnerMinusIm);
    load(right_re, kRightRe), load(right_im, kRightIm);
    if (S::split == 8) {
#pragma unroll
      for (int e = 0; e < 4; ++e) right_minus[e] = right_im[e] ^ 0x80008000u;
    } else {
      load(right_minus, kRightMinusIm);
    }
    load(twiddle_re, kTwiddleRe), load(twiddle_im, kTwiddleIm);
  }
};

// ---- products ----
// m x of complex matrices; `minus` is -im, which goes with im for the conjugate of m. The registers
// of a right operand for 8 columns are neighbours.
SEQCONV_DEVICE Pairs left_product(const u32 (&re)[4], const u32 (&im)[4], const u32 (&minus)[4],
                                  const u32 (&xr)[4], const u32 (&xi)[4]) {
  Pairs d;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    u32 r[2], i[2];
    mma_first(r, re, xr[2 * j], xr[2 * j + 1]), mma_first(i, re, xi[2 * j], xi[2 * j + 1]);
    mma(r, minus, xi[2 * j], xi[2 * j + 1]), mma(i, im, xr[2 * j], xr[2 * j + 1]);
    d.re[2 * j] = r[0], d.re[2 * j + 1] = r[1], d.im[2 * j] = i[0], d.im[2 * j + 1] = i[1];
  }
  return d;
}
// x m
SEQCONV_DEVICE Pairs right_product(const Pairs& x, const u32 (&re)[4], const u32 (&im)[4],
                                   const u32 (&minus)[4]) {
  Pairs d;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    u32 r[2], i[2];
    mma_first(r, x.re, re[2 * j], re[2 * j + 1]), mma_first(i, x.re, im[2 * j], im[2 * j + 1]);
    mma(r, x.im, minus[2 * j], minus[2 * j + 1]), mma(i, x.im, re[2 * j], re[2 * j + 1]);
    d.re[2 * j] = r[0], d.re[2 * j + 1] = r[1], d.im[2 * j] = i[0], d.im[2 * j + 1] = i[1];
  }
  return d;
}
// m x^T for registers that hold x as a left operand
SEQCONV_DEVICE Pairs product_of_transpose(const u32 (&re)[4], const u32 (&im)[4],
                                          const u32 (&minus)[4], const Pairs& x) {
  const u32 xr[4] = {x.re[0], x.re[2], x.re[1], x.re[3]};
  const u32 xi[4] = {x.im[0], x.im[2], x.im[1], x.im[3]};
  return left_product(re, im, minus, xr, xi);
}

// ---- butterflies ----
// 1, 2, 4 or 8 points over the products of a column, unscaled; the inverse is the conjugate's.
template <bool kInverse>
SEQCONV_DEVICE void butterfly(u32 (&)[1], u32 (&)[1]) {}
template <bool kInverse>
SEQCONV_DEVICE void butterfly(u32 (&re)[2], u32 (&im)[2]) {
  const u32 r = re[1], i = im[1];
  re[1] = sub2(re[0], r), im[1] = sub2(im[0], i);
  re[0] = add2(re[0], r), im[0] = add2(im[0], i);
}
template <bool kInverse>
SEQCONV_DEVICE void butterfly(u32 (&re)[4], u32 (&im)[4]) {
  const u32 ar = add2(re[0], re[2]), ai = add2(im[0], im[2]);
  const u32 br = sub2(re[0], re[2]), bi = sub2(im[0], im[2]);
  const u32 cr = add2(re[1], re[3]), ci = add2(im[1], im[3]);
  const u32 dr = sub2(re[1], re[3]), di = sub2(im[1], im[3]);
  constexpr int kMinus = kInverse ? 3 : 1, kPlus = 4 - kMinus;  // b - i d, b + i d
  re[0] = add2(ar, cr), im[0] = add2(ai, ci);
  re[2] = sub2(ar, cr), im[2] = sub2(ai, ci);
  re[kMinus] = add2(br, di), im[kMinus] = sub2(bi, dr);
  re[kPlus] = sub2(br, di), im[kPlus] = add2(bi, dr);
}
template <bool kInverse>
SEQCONV_DEVICE void butterfly(u32 (&re)[8], u32 (&im)[8]) {
  const u32 half = 0x39a839a8;  // sqrt(1/2), twice
  u32 er[4], ei[4], r[4], i[4];
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    er[s] = re[2 * s], ei[s] = im[2 * s];
    r[s] = re[2 * s + 1], i[s] = im[2 * s + 1];
  }
  butterfly<kInverse>(er, ei), butterfly<kInverse>(r, i);
  // The odd half is multiplied by exp(-i pi p / 4), or its conjugate.
  const u32 sum1 = add2(r[1], i[1]), sum3 = add2(r[3], i[3]);
  const u32 r1 = kInverse ? sub2(r[1], i[1]) : sum1, i1 = kInverse ? sum1 : sub2(i[1], r[1]);
  const u32 r3 = kInverse ? negate2(sum3) : sub2(i[3], r[3]);
  const u32 i3 = kInverse ? sub2(r[3], i[3]) : negate2(sum3);
  const u32 r2 = kInverse ? negate2(i[2]) : i[2], i2 = kInverse ? r[2] : negate2(r[2]);
  r[1] = mul2(r1, half), i[1] = mul2(i1, half), r[2] = r2, i[2] = i2;
  r[3] = mul2(r3, half), i[3] = mul2(i3, half);
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    re[p] = add2(er[p], r[p]), im[p] = add2(ei[p], i[p]);
    re[p + 4] = sub2(er[p], r[p]), im[p + 4] = sub2(ei[p], i[p]);
  }
}
