// The passes of the learned butterfly on a row; butterfly.h has the formula.
//
// A row is two planes, real and imaginary parts. Vectors run over m, but in the first pass, where m
// is 0 only, over the 16 values of p.
#pragma once
#include "vectors.h"

namespace seqconv::SEQCONV_ISA {

template <class T>
struct Planes {
  T *re = nullptr, *im = nullptr;
  Planes at(int64_t i) const { return {re + i, im + i}; }
};

// to[p apart_to] = sum_i f[p][i] from[i apart_from] for R values of p, in whole vectors.
template <int R, class T>
SEQCONV_INLINE void apply(Planes<T> f, Planes<T> from, int64_t apart_from, Planes<T> to,
                          int64_t apart_to) {
  constexpr int kBlock = R < 4 ? R : 4;
  for (int p = 0; p < R; p += kBlock) {
    Vec<T> re[kBlock] = {}, im[kBlock] = {};
    for (int i = 0; i < R; ++i) {
      const Vec<T> x = vec(from.re + i * apart_from), y = vec(from.im + i * apart_from);
      SEQCONV_UNROLL
      for (int q = 0; q < kBlock; ++q) {
        const T a = f.re[(p + q) * R + i], b = f.im[(p + q) * R + i];
        re[q] += a * x;
        re[q] -= b * y;
        im[q] += a * y;
        im[q] += b * x;
      }
    }
    SEQCONV_UNROLL
    for (int q = 0; q < kBlock; ++q) {
      vec(to.re + (p + q) * apart_to) = re[q];
      vec(to.im + (p + q) * apart_to) = im[q];
    }
  }
}

// x <- w x, `count` numbers from a multiple of a vector on.
template <class T>
SEQCONV_INLINE void turn(Planes<T> x, T re, T im, int64_t count) {
  for (int64_t m = 0; m < count; m += kLanes<T>) {
    const Vec<T> a = vec(x.re + m), b = vec(x.im + m);
    vec(x.re + m) = re * a - im * b;
    vec(x.im + m) = re * b + im * a;
  }
}

template <int R, class T>
void complex_pass(Planes<T> f, Planes<const T> twiddles, int64_t s, int64_t b, Planes<T> in,
                  Planes<T> out) {
  for (int64_t j = 0; j < s; ++j) {
    for (int64_t m = 0; m < b; m += kLanes<T>)
      apply<R>(f, in.at(j * b + m), s * b, out.at(j * R * b + m), b);
    for (int p = 1; j && p < R; ++p) {
      const int64_t at = j * R + p;
      turn(out.at(at * b), twiddles.re[at], twiddles.im[at], b);
    }
  }
}

// The input's gradient of a pass from that of its output, which is turned back on the way; and what
// the pass adds to that of its matrix.
template <int R, class T>
void complex_pass_backward(Planes<T> adjoint, Planes<const T> twiddles, int64_t s, int64_t b,
                           Planes<T> in, Planes<T> dout, Planes<T> din, Vec<T>* sums) {
  for (int64_t j = 0; j < s; ++j) {
    for (int p = 1; j && p < R; ++p) {
      const int64_t at = j * R + p;
      turn(dout.at(at * b), twiddles.re[at], -twiddles.im[at], b);
    }
    for (int64_t m = 0; m < b; m += kLanes<T>)
      apply<R>(adjoint, dout.at(j * R * b + m), b, din.at(j * b + m), s * b);
  }
  // sum of dout conj in, some elements at a time in registers
  constexpr int kRows = SEQCONV_VECTOR_BYTES == 64 && R >= 4 ? 4 : 2, kCols = 2;
  for (int p = 0; p < R; p += kRows)
    for (int i = 0; i < R; i += kCols) {
      Vec<T> re[kRows][kCols] = {}, im[kRows][kCols] = {};
      for (int64_t j = 0; j < s; ++j)
        for (int64_t m = 0; m < b; m += kLanes<T>) {
          const Planes<T> g = dout.at((j * R + p) * b + m), z = in.at((i * s + j) * b + m);
          SEQCONV_UNROLL
          for (int c = 0; c < kCols; ++c) {
            const Vec<T> x = vec(z.re + c * s * b), y = vec(z.im + c * s * b);
            SEQCONV_UNROLL
            for (int r = 0; r < kRows; ++r) {
              const Vec<T> u = vec(g.re + r * b), v = vec(g.im + r * b);
              re[r][c] += u * x;
              re[r][c] += v * y;
              im[r][c] += v * x;
              im[r][c] -= u * y;
            }
          }
        }
      for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < kCols; ++c) {
          Vec<T>* to = sums + 2 * ((p + r) * R + i + c);
          to[0] += re[r][c];
          to[1] += im[r][c];
        }
    }
}

// ---- the first pass: real input, `used` of whose 16 parts are not all zero ----

template <class T>
constexpr int kVectorsOf16 = 16 / kLanes<T>;  // vectors of 16 numbers
template <class T>
constexpr int kColumnsAtOnce = kVectorsOf16<T> > 4 ? 1 : 4 / kVectorsOf16<T>;

// kCount neighbouring j at a time; the adjoint of F is conj(F), [i][p].
template <int kCount, class T>
SEQCONV_INLINE void real_columns(Planes<T> adjoint, const T* x, int64_t s, int used, Planes<T> to) {
  Vec<T> re[kCount][kVectorsOf16<T>] = {}, im[kCount][kVectorsOf16<T>] = {};
  for (int i = 0; i < used; ++i) SEQCONV_UNROLL
  for (int k = 0; k < kVectorsOf16<T>; ++k) {
    const Vec<T> a = vec(adjoint.re + 16 * i + k * kLanes<T>);
    const Vec<T> b = vec(adjoint.im + 16 * i + k * kLanes<T>);
    SEQCONV_UNROLL
    for (int j = 0; j < kCount; ++j) {
      re[j][k] += x[i * s + j] * a;
      im[j][k] -= x[i * s + j] * b;
    }
  }
  for (int j = 0; j < kCount; ++j)
    for (int k = 0; k < kVectorsOf16<T>; ++k) {
      vec(to.re + 16 * j + k * kLanes<T>) = re[j][k];
      vec(to.im + 16 * j + k * kLanes<T>) = im[j][k];
    }
}

// x <- w x, or conj(w) x, number by number.
template <bool kConj, class T>
SEQCONV_INLINE void turn_all(Planes<T> x, Planes<const T> w, int64_t count) {
  for (int64_t m = 0; m < count; m += kLanes<T>) {
    const Vec<T> a = vec(x.re + m), b = vec(x.im + m);
    const Vec<T> re = load_vector(w.re + m);
    Vec<T> im = load_vector(w.im + m);
    if (kConj) im = -im;
    vec(x.re + m) = re * a - im * b;
    vec(x.im + m) = re * b + im * a;
  }
}

template <class T>
void real_pass(Planes<T> adjoint, Planes<const T> twiddles, int64_t s, const T* x, int used,
               Planes<T> out) {
  int64_t j = 0;
  for (; j + kColumnsAtOnce<T> <= s; j += kColumnsAtOnce<T>)
    real_columns<kColumnsAtOnce<T>>(adjoint, x + j, s, used, out.at(16 * j));
  for (; j < s; ++j) real_columns<1>(adjoint, x + j, s, used, out.at(16 * j));
  if (s > 1) turn_all<false>(out, twiddles, 16 * s);
}

// dx in the order [j][i].
template <class T>
void real_pass_backward(Planes<T> plain, Planes<const T> twiddles, int64_t s, const T* x, int used,
                        Planes<T> dout, T* dx, Planes<T> sums) {
  if (s > 1) turn_all<true>(dout, twiddles, 16 * s);
  for (int64_t j = 0; j < s; ++j) {
    Vec<T> sum[kVectorsOf16<T>] = {};
    for (int p = 0; p < 16; ++p) SEQCONV_UNROLL
    for (int k = 0; k < kVectorsOf16<T>; ++k) {
      sum[k] += dout.re[16 * j + p] * vec(plain.re + 16 * p + k * kLanes<T>);
      sum[k] += dout.im[16 * j + p] * vec(plain.im + 16 * p + k * kLanes<T>);
    }
    for (int k = 0; k < kVectorsOf16<T>; ++k) vec(dx + 16 * j + k * kLanes<T>) = sum[k];
  }
  for (int i = 0; i < used; i += kColumnsAtOnce<T>) {
    Vec<T> re[kColumnsAtOnce<T>][kVectorsOf16<T>] = {}, im[kColumnsAtOnce<T>][kVectorsOf16<T>] = {};
    for (int64_t j = 0; j < s; ++j) SEQCONV_UNROLL
    for (int k = 0; k < kVectorsOf16<T>; ++k) {
      const Vec<T> a = vec(dout.re + 16 * j + k * kLanes<T>);
      const Vec<T> b = vec(dout.im + 16 * j + k * kLanes<T>);
      SEQCONV_UNROLL
      for (int c = 0; c < kColumnsAtOnce<T>; ++c) {
        re[c][k] += x[(i + c) * s + j] * a;
        im[c][k] += x[(i + c) * s + j] * b;
      }
    }
    for (int c = 0; c < kColumnsAtOnce<T>; ++c)
      for (int k = 0; k < kVectorsOf16<T>; ++k) {
        vec(sums.re + 16 * (i + c) + k * kLanes<T>) += re[c][k];
        vec(sums.im + 16 * (i + c) + k * kLanes<T>) += im[c][k];
      }
  }
}

}  // namespace seqconv::SEQCONV_ISA
