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
  return {fused(a.re, b.re, -(a.im * b.im)), fused(a.re, b.im, a.im * b.re)};
}
SEQCONV_DEVICE c32 to_complex(float a) { return {a, 0.f}; }
SEQCONV_DEVICE c32 to_complex(c32 a) { return a; }
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

// exp(-2 pi i k / 64), a constant where k is one
template <bool kInverse>
SEQCONV_DEVICE c32 root(int k) {
  const float c[5][4] = {{1.f, 0.99518472667f, 0.98078528040f, 0.95694033573f},
                         {0.92387953251f, 0.88192126435f, 0.83146961230f, 0.77301045336f},
                         {0.70710678119f, 0.63439328416f, 0.55557023302f, 0.47139673683f},
                         {0.38268343237f, 0.29028467725f, 0.19509032202f, 0.09801714033f},
                         {0.f}};
  const auto cosine = [&](int i) {
    i = (i & 63) > 32 ? 64 - (i & 63) : i & 63;
    return i > 16 ? -c[(32 - i) / 4][-i & 3] : c[i / 4][i & 3];
  };
  return conj_if<kInverse>(c32{cosine(k), cosine(k + 16)});
}

// x, y = x + w y, x - w y for w = root(k). The larger part of w is taken out of it, which saves two
// of eight operations.
template <bool kInverse>
SEQCONV_DEVICE void combine(c32& x, c32& y, int k) {
  const c32 w = root<kInverse>(k), a = x;
  if (k % 16 == 0) {
    const c32 b = k == 0 ? y : quarter<kInverse>(y);
    x = a + b;
    y = a - b;
    return;
  }
  const bool real = fabsf(w.re) > fabsf(w.im);
  const float s = real ? w.re : w.im, t = real ? w.im / s : w.re / s;
  const c32 b = real ? c32{fused(-t, y.im, y.re), fused(t, y.re, y.im)}
                     : c32{fused(t, y.re, -y.im), fused(t, y.im, y.re)};
  x = {fused(s, b.re, a.re), fused(s, b.im, a.im)};
  y = {fused(-s, b.re, a.re), fused(-s, b.im, a.im)};
}

// Of 4 points, where point i is multiplied by root(k i) before.
template <bool kInverse>
SEQCONV_DEVICE void dft(c32 (&z)[4], int k = 0) {
  c32 a = z[0], b = z[2], c = z[1], d = z[3];
  combine<kInverse>(a, b, 2 * k);
  combine<kInverse>(c, d, 2 * k);
  combine<kInverse>(a, c, k);
  combine<kInverse>(b, d, k + 16);
  z[0] = a, z[1] = b, z[2] = c, z[3] = d;
}

// A times 4 points: columns of A, twiddles, rows of 4; the result is in natural order.
template <bool kInverse, int A>
SEQCONV_DEVICE void dft_by_four(c32 (&z)[4 * A]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    c32 column[A];
#pragma unroll
    for (int i = 0; i < A; ++i) column[i] = z[i * 4 + j];
    dft<kInverse>(column);
#pragma unroll
    for (int i = 0; i < A; ++i) z[i * 4 + j] = column[i];
  }
  c32 out[4 * A];
#pragma unroll
  for (int p = 0; p < A; ++p) {
    c32 row[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) row[j] = z[p * 4 + j];
    dft<kInverse>(row, p * 16 / A);
#pragma unroll
    for (int q = 0; q < 4; ++q) out[p + A * q] = row[q];
  }
#pragma unroll
  for (int i = 0; i < 4 * A; ++i) z[i] = out[i];
}

template <bool kInverse>
SEQCONV_DEVICE void dft(c32 (&z)[8]) {
  dft_by_four<kInverse, 2>(z);
}
template <bool kInverse>
SEQCONV_DEVICE void dft(c32 (&z)[16]) {
  dft_by_four<kInverse, 4>(z);
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
