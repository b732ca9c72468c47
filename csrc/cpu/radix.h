// Vectors of complex numbers, and the butterflies of a transform on them.
#pragma once
#include "vectors.h"

namespace seqconv::SEQCONV_ISA {

template <class T, int Q = kQuads<T>>
struct Complex {
  Vec<T, Q> re, im;
};

template <class T>
constexpr int64_t kStep = 2 * kLanes<T>;  // scalars of a complex vector in memory

// Imaginary parts lie `apart` scalars after the real ones.
template <class T, int Q = kQuads<T>>
SEQCONV_INLINE Complex<T, Q> load(const T* from, int64_t apart = kLanes<T>) {
  return {*reinterpret_cast<const Vec<T, Q>*>(from),
          *reinterpret_cast<const Vec<T, Q>*>(from + apart)};
}
template <class T, int Q>
SEQCONV_INLINE void store(T* to, Complex<T, Q> x) {
  *reinterpret_cast<Vec<T, Q>*>(to) = x.re;
  *reinterpret_cast<Vec<T, Q>*>(to + kLanes<T>) = x.im;
}

template <class T, int Q>
SEQCONV_INLINE Complex<T, Q> operator+(Complex<T, Q> a, Complex<T, Q> b) {
  return {a.re + b.re, a.im + b.im};
}
template <class T, int Q>
SEQCONV_INLINE Complex<T, Q> operator-(Complex<T, Q> a, Complex<T, Q> b) {
  return {a.re - b.re, a.im - b.im};
}
template <class T, int Q>
SEQCONV_INLINE Complex<T, Q> operator*(Complex<T, Q> a, Complex<T, Q> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <class T, int Q>
SEQCONV_INLINE Complex<T, Q> operator*(T s, Complex<T, Q> a) {
  return {s * a.re, s * a.im};
}
// a conj(b)
template <class T, int Q>
SEQCONV_INLINE Complex<T, Q> times_conj(Complex<T, Q> a, Complex<T, Q> b) {
  return {a.re * b.re + a.im * b.im, a.im * b.re - a.re * b.im};
}
template <class T, int Q>
SEQCONV_INLINE Complex<T, Q> times_i(Complex<T, Q> a) {
  return {-a.im, a.re};
}

// Calls op(Number<R>{}) for the R among kRadices that `radix` is.
template <int R>
struct Number {
  static constexpr int value = R;
};
template <int... kRadices, class Op>
SEQCONV_INLINE void with_radix(int64_t radix, const Op& op) {
  ((radix == kRadices ? op(Number<kRadices>{}) : void()), ...);
}

// cos and sin of 2 pi e / R for odd R.
template <int R>
struct Roots;
template <>
struct Roots<3> {
  static constexpr double cos[] = {1, -0.5, -0.5};
  static constexpr double sin[] = {0, 0.866025403784438646763723, -0.866025403784438646763723};
};
template <>
struct Roots<5> {
  static constexpr double c1 = 0.309016994374947424102293, c2 = -0.809016994374947424102293;
  static constexpr double s1 = 0.951056516295153572116439, s2 = 0.587785252292473129168706;
  static constexpr double cos[] = {1, c1, c2, c2, c1}, sin[] = {0, s1, s2, -s2, -s1};
};
template <>
struct Roots<7> {
  static constexpr double c1 = 0.623489801858733530525005, c2 = -0.222520933956314404288903,
                          c3 = -0.900968867902419126236102;
  static constexpr double s1 = 0.781831482468029808708445, s2 = 0.974927912181823607018132,
                          s3 = 0.433883739117558120475768;
  static constexpr double cos[] = {1, c1, c2, c3, c3, c2, c1},
                          sin[] = {0, s1, s2, s3, -s3, -s2, -s1};
};

// a[j] <- sum_r a[r] exp(2 pi i j r / R)
template <int R, class T, int Q>
SEQCONV_INLINE void dft(Complex<T, Q>* a);

// R = 2 h, h odd: the two factors need no twiddles between them (Good and Thomas).
template <int R, class T, int Q>
SEQCONV_INLINE void dft_twice_odd(Complex<T, Q>* a) {
  constexpr int h = R / 2;
  Complex<T, Q> sum[h], difference[h];
  SEQCONV_UNROLL
  for (int r = 0; r < h; ++r) {
    const Complex<T, Q> x = a[2 * r], y = a[(2 * r + h) % R];
    sum[r] = x + y;
    difference[r] = x - y;
  }
  dft<h>(sum);
  dft<h>(difference);
  SEQCONV_UNROLL
  for (int j = 0; j < R; ++j) a[j] = j % 2 ? difference[j % h] : sum[j % h];
}

template <int R, class T, int Q>
SEQCONV_INLINE void dft_odd(Complex<T, Q>* a) {
  constexpr int h = (R - 1) / 2;
  Complex<T, Q> s[h], d[h], sum = a[0];
  SEQCONV_UNROLL
  for (int r = 0; r < h; ++r) {
    s[r] = a[r + 1] + a[R - 1 - r];
    d[r] = times_i(a[r + 1] - a[R - 1 - r]);
    sum = sum + s[r];
  }
  SEQCONV_UNROLL
  for (int j = 1; j <= h; ++j) {
    Complex<T, Q> even = a[0], odd = {};
    SEQCONV_UNROLL
    for (int r = 0; r < h; ++r) {
      even = even + T(Roots<R>::cos[j * (r + 1) % R]) * s[r];
      odd = odd + T(Roots<R>::sin[j * (r + 1) % R]) * d[r];
    }
    a[j] = even + odd;
    a[R - j] = even - odd;
  }
  a[0] = sum;
}

template <int R, class T, int Q>
SEQCONV_INLINE void dft(Complex<T, Q>* a) {
  if constexpr (R == 1) {
  } else if constexpr (R == 2) {
    const Complex<T, Q> d = a[0] - a[1];
    a[0] = a[0] + a[1];
    a[1] = d;
  } else if constexpr (R == 4) {
    const Complex<T, Q> s0 = a[0] + a[2], d0 = a[0] - a[2];
    const Complex<T, Q> s1 = a[1] + a[3], d1 = times_i(a[1] - a[3]);
    a[0] = s0 + s1;
    a[1] = d0 + d1;
    a[2] = s0 - s1;
    a[3] = d0 - d1;
  } else if constexpr (R == 8) {
    Complex<T, Q> even[4] = {a[0], a[2], a[4], a[6]}, odd[4] = {a[1], a[3], a[5], a[7]};
    dft<4>(even);
    dft<4>(odd);
    SEQCONV_UNROLL
    for (int j = 0; j < 4; ++j) {
      // exp(2 pi i j / 8), its constant left to fused operations.
      Complex<T, Q> b = j / 2 ? times_i(odd[j]) : odd[j];
      if (j % 2) b = b + times_i(b);
      const T scale = j % 2 ? T(0.707106781186547524400844) : T(1);
      a[j] = {even[j].re + scale * b.re, even[j].im + scale * b.im};
      a[j + 4] = {even[j].re - scale * b.re, even[j].im - scale * b.im};
    }
  } else if constexpr (R % 2 == 0) {
    dft_twice_odd<R>(a);
  } else {
    dft_odd<R>(a);
  }
}

template <int R, bool kCompact, class T>
SEQCONV_INLINE void load_twiddles(const T* from, Complex<T>* w) {
  w[1] = load<T>(from);
  if constexpr (kCompact) {
    static_assert(R == 4);
    const Vec<T> twice = w[1].re + w[1].re;
    w[2] = {twice * w[1].re - T(1), twice * w[1].im};
    w[3] = w[1] * w[2];
  } else {
    SEQCONV_UNROLL
    for (int r = 2; r < R; ++r) w[r] = load<T>(from + (r - 1) * kStep<T>);
  }
}

// a <- the R factors' residues of the node whose R segments a holds.
template <int R, class T>
SEQCONV_INLINE void split_node(Complex<T>* a, const Complex<T>* w) {
  SEQCONV_UNROLL
  for (int r = 1; r < R; ++r) a[r] = a[r] * w[r];
  dft<R>(a);
}
// Undoes it, up to a factor R.
template <int R, class T>
SEQCONV_INLINE void join_node(Complex<T>* a, const Complex<T>* w) {
  Complex<T> b[R];
  SEQCONV_UNROLL
  for (int r = 0; r < R; ++r) b[r] = a[r ? R - r : 0];  // reversed roots: the inverse DFT
  dft<R>(b);
  a[0] = b[0];
  SEQCONV_UNROLL
  for (int r = 1; r < R; ++r) a[r] = times_conj(b[r], w[r]);
}

}  // namespace seqconv::SEQCONV_ISA
