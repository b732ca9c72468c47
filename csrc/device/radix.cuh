// Complex numbers and the discrete Fourier transforms of 2, 3, 4, 5, 8 and 16 of them held in
// registers, unscaled. The inverse is the conjugate's: dft<true>(z)[i] = sum_p z[p] exp(+2 pi i p i
// / R).
#pragma once
#include "compat.cuh"

struct alignas(8) c32 {
  float re, im;
};
SEQCONV_DEVICE c32 operator+(c32 a, c32 b) { return {a.re + b.re, a.im + b.im}; }
SEQCONV_DEVICE c32 operator-(c32 a, c32 b) { return {a.re - b.re, a.im - b.im}; }
SEQCONV_DEVICE c32 operator*(c32 a, float s) { return {a.re * s, a.im * s}; }
SEQCONV_DEVICE c32 operator*(c32 a, c32 b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
SEQCONV_DEVICE c32 conj(c32 a) { return {a.re, -a.im}; }
template <bool kConj>
SEQCONV_DEVICE c32 conj_if(c32 a) {
  return {a.re, kConj ? -a.im : a.im};
}
// a times -i, or +i in an inverse
template <bool kInverse>
SEQCONV_DEVICE c32 quarter(c32 a) {
  return kInverse ? c32{-a.im, a.re} : c32{a.im, -a.re};
}

template <bool kInverse>
SEQCONV_DEVICE void dft(c32 (&z)[2]) {
  const c32 a = z[0], b = z[1];
  z[0] = a + b;
  z[1] = a - b;
}

template <bool kInverse>
SEQCONV_DEVICE void dft(c32 (&z)[3]) {
  const c32 sum = z[1] + z[2], side = quarter<kInverse>(z[1] - z[2]) * 0.86602540378443864676f;
  const c32 middle = z[0] - sum * 0.5f;
  z[0] = z[0] + sum;
  z[1] = middle + side;
  z[2] = middle - side;
}

template <bool kInverse>
SEQCONV_DEVICE void dft(c32 (&z)[4]) {
  const c32 a = z[0] + z[2], b = z[0] - z[2], c = z[1] + z[3], d = quarter<kInverse>(z[1] - z[3]);
  z[0] = a + c;
  z[1] = b + d;
  z[2] = a - c;
  z[3] = b - d;
}

template <bool kInverse>
SEQCONV_DEVICE void dft(c32 (&z)[5]) {
  const float c1 = 0.30901699437494742410f, c2 = -0.80901699437494742410f;
  const float s1 = 0.95105651629515357212f, s2 = 0.58778525229247312917f;
  const c32 a = z[1] + z[4], b = z[2] + z[3], d = quarter<kInverse>(z[1] - z[4]),
            e = quarter<kInverse>(z[2] - z[3]);
  const c32 p = z[0] + a * c1 + b * c2, q = z[0] + a * c2 + b * c1, r = d * s1 + e * s2,
            s = d * s2 - e * s1;
  z[0] = z[0] + a + b;
  z[1] = p + r;
  z[2] = q + s;
  z[3] = q - s;
  z[4] = p - r;
}

// exp(-2 pi i k / 16)
template <bool kInverse>
SEQCONV_DEVICE c32 sixteenth(int k) {
  const float c[16] = {
      1.f,  0.92387953251128675613f,  0.70710678118654752440f,  0.38268343236508977173f,
      0.f,  -0.38268343236508977173f, -0.70710678118654752440f, -0.92387953251128675613f,
      -1.f, -0.92387953251128675613f, -0.70710678118654752440f, -0.38268343236508977173f,
      0.f,  0.38268343236508977173f,  0.70710678118654752440f,  0.92387953251128675613f};
  return conj_if<kInverse>(c32{c[k & 15], c[(k + 4) & 15]});
}

// A times B points: columns of A, twiddles, rows of B; the result is in natural order.
template <bool kInverse, int A, int B>
SEQCONV_DEVICE void dft_of_two(c32 (&z)[A * B]) {
#pragma unroll
  for (int j = 0; j < B; ++j) {
    c32 column[A];
#pragma unroll
    for (int i = 0; i < A; ++i) column[i] = z[i * B + j];
    dft<kInverse>(column);
#pragma unroll
    for (int p = 0; p < A; ++p)
      z[p * B + j] = p * j == 0 ? column[p] : column[p] * sixteenth<kInverse>(p * j * 16 / (A * B));
  }
  c32 out[A * B];
#pragma unroll
  for (int p = 0; p < A; ++p) {
    c32 row[B];
#pragma unroll
    for (int j = 0; j < B; ++j) row[j] = z[p * B + j];
    dft<kInverse>(row);
#pragma unroll
    for (int q = 0; q < B; ++q) out[p + A * q] = row[q];
  }
#pragma unroll
  for (int i = 0; i < A * B; ++i) z[i] = out[i];
}

template <bool kInverse>
SEQCONV_DEVICE void dft(c32 (&z)[8]) {
  dft_of_two<kInverse, 2, 4>(z);
}
template <bool kInverse>
SEQCONV_DEVICE void dft(c32 (&z)[16]) {
  dft_of_two<kInverse, 4, 4>(z);
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};
// f(Constant<r>()) for a radix known at run time only
template <class F>
SEQCONV_DEVICE void with_radix(int radix, F&& f) {
  switch (radix) {
    case 2:
      return f(Constant<2>());
    case 3:
      return f(Constant<3>());
    case 4:
      return f(Constant<4>());
    case 5:
      return f(Constant<5>());
    case 8:
      return f(Constant<8>());
    default:
      return f(Constant<16>());
  }
}
