// The tables of powers whose products are sums of exponentials; see ssm.h for the problem.
//
// With l = columns q + r an output row q is a product of rows: k[q,r] = sum_m left[q,m] right[m,r],
// where m counts real and imaginary parts, right[m,r] holds exp(a r) and left[q,m] holds w exp(a
// columns q). The tables are made in double, by multiplications from a few exp(a l), and rounded
// once: the phase of exp(a l), millions of turns for long rows, keeps its digits. Per output that
// is 2 modes multiply-adds, and for the tables about (columns + length / columns) / length of a few
// more.
#pragma once
#include "exponentials.h"
#include "radix.h"
#include "scratch.h"
#include "ssm.h"

namespace seqconv::SEQCONV_ISA {

// A product's tile: kTile rows by three vectors of columns. Doubles make tables kTile at a time.
constexpr int kTile = kLanes<double>;
template <class T>
constexpr int kColumns = 3 * kLanes<T>;
constexpr int64_t kTableScalars = 1 << 15;  // of `right`; and half of that, of a block of `left`

struct Phasor {
  double re, im;
};
SEQCONV_INLINE Phasor multiply(Phasor x, Phasor y) {
  return {x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re};
}
SEQCONV_INLINE Phasor power(Phasor x, int64_t exponent) {
  Phasor y{1, 0};
  for (; exponent; exponent >>= 1, x = multiply(x, x))
    if (exponent & 1) y = multiply(y, x);
  return y;
}

// kTile of them.
using Phasors = Complex<double>;
SEQCONV_INLINE Phasors multiply(const Phasors& x, Phasor y) {
  return {x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re};
}
SEQCONV_INLINE void set_lane(Phasors& x, int lane, Phasor value) {
  x.re[lane] = value.re;
  x.im[lane] = value.im;
}
// x y^0, x y^1, ..., and y^kTile in `step`: bit by bit of the exponents, all lanes at a time.
SEQCONV_INLINE Phasors progression(Phasor x, Phasor y, Phasor& step) {
  Bits lanes;
  for (int i = 0; i < kTile; ++i) lanes[i] = i;
  Phasors out{splat(x.re), splat(x.im)};
  step = y;
  SEQCONV_UNROLL
  for (int bit = 1; bit < kTile; bit *= 2, step = multiply(step, step)) {
    const Bits has = (lanes & bit) != 0;
    const Phasors factor{has ? splat(step.re) : splat(1.0), has ? splat(step.im) : splat(0.0)};
    out = out * factor;
  }
  return out;
}

template <class T>
SEQCONV_INLINE void store_rounded(T* to, const Vec<double>& x) {
  using Rounded = VectorOf<T, kTile / 4>;
  *reinterpret_cast<typename Rounded::Unaligned*>(to) =
      __builtin_convertvector(x, typename Rounded::Type);
}

// A channel's tables. Blocks of rows are made one after another, each from a fresh exp(a l).
template <class T>
struct SsmTables {
  int64_t modes, groups;     // groups of kTile modes, the last one padded
  int64_t columns, rows;     // per panel row; rows of the whole kernel
  int64_t block, table_row;  // rows of a block; scalars of one row of a table
  const double* a;
  Phasor* powers;  // exp(a columns)
  Phasor* others;  // of every mode: exp(a), or exp(a columns q) of a block's first row
  T *right, *left;

  SsmTables(const SsmProblem& p, int64_t channel, bool backward, Scratch& scratch)
      : modes(p.modes), groups((modes + kTile - 1) / kTile), table_row(2 * kTile * groups) {
    // Making both tables costs least where they are equal.
    double square = static_cast<double>(p.length);
    if (!backward) square *= static_cast<double>(p.heads);
    int64_t most = kTableScalars / table_row, wanted = kColumns<T>;
    while (wanted + kColumns<T> <= most && static_cast<double>(wanted * wanted) < square)
      wanted += kColumns<T>;
    columns = wanted;
    rows = (p.length + columns - 1) / columns;
    block = kTableScalars / 2 / table_row / kTile * kTile;
    block = block < kTile ? kTile : block;
    const int64_t whole = (rows + kTile - 1) / kTile * kTile;
    block = block > whole ? whole : block;
    a = p.a + 2 * channel * modes;
    powers = scratch.take<Phasor>(modes);
    others = scratch.take<Phasor>(modes);
    right = scratch.take<T>(table_row * columns);
    left = scratch.take<T>((backward ? 2 : 1) * table_row * block);
  }

  int64_t blocks() const { return (rows + block - 1) / block; }
  int64_t first_row(int64_t i) const { return i * block; }  // of block i
  int64_t count(int64_t i) const {                          // of its rows: fewer in the last one
    const int64_t rest = rows - i * block;
    return rest < block ? rest : block;
  }

  // right[panel][m][kColumns], m = 2 n for the real part of exp(a_n r), 2 n + 1 for the imaginary.
  // Notes exp(a columns) on the way.
  void make_right() const {
    constexpr int kVectors = kColumns<T> / kTile;
    make_powers(1, others);
    make_powers(columns, powers);
    for (int64_t n = 0; n < modes; ++n) {
      const Phasor z = others[n];
      Phasors x[kVectors];
      Phasor step;
      x[0] = progression({1, 0}, z, step);
      const Phasor far = power(step, kVectors);
      for (int i = 1; i < kVectors; ++i) x[i] = multiply(x[i - 1], step);
      T* to = right + 2 * n * kColumns<T>;
      for (int64_t r = 0; r < columns; r += kColumns<T>, to += table_row * kColumns<T>) {
        SEQCONV_UNROLL
        for (int i = 0; i < kVectors; ++i) {
          store_rounded(to + i * kTile, x[i].re);
          store_rounded(to + kColumns<T> + i * kTile, x[i].im);
          x[i] = multiply(x[i], far);
        }
      }
    }
  }

  // to[n] = exp(a steps) of every mode.
  void make_powers(int64_t steps, Phasor* to) const {
    exponentials(modes, a, static_cast<double>(steps), reinterpret_cast<double*>(to));
  }

  // left[tile][m][kTile rows] for the rows of block i: the real part of w exp(a columns q), and
  // minus the imaginary one.
  void make_left(const double* w, int64_t i) const {
    make_powers(first_row(i) * columns, others);
    for (int64_t n = 0; n < modes; ++n) {
      Phasor step;
      Phasors x = progression(multiply(Phasor{w[2 * n], w[2 * n + 1]}, others[n]), powers[n], step);
      T* to = left + 2 * n * kTile;
      for (int64_t q = 0; q < count(i); q += kTile, to += table_row * kTile) {
        store_rounded(to, x.re);
        store_rounded(to + kTile, -x.im);
        x = multiply(x, step);
      }
    }
  }

  // left[group][part][q][kTile modes] for the gradient, of block i: real and imaginary part of
  // exp(a columns q), then the same times q.
  void make_left_for_sums(int64_t i) const {
    make_powers(first_row(i) * columns, others);
    for (int64_t group = 0; group < groups; ++group) {
      Phasors x{}, step{};
      for (int lane = 0; lane < kTile && group * kTile + lane < modes; ++lane) {
        set_lane(x, lane, others[group * kTile + lane]);
        set_lane(step, lane, powers[group * kTile + lane]);
      }
      T* to = left + group * 4 * kTile * block;
      for (int64_t q = 0; q < count(i); ++q, to += kTile) {
        const double number = static_cast<double>(first_row(i) + q);
        store_rounded(to, x.re);
        store_rounded(to + kTile * block, x.im);
        store_rounded(to + 2 * kTile * block, x.re * number);
        store_rounded(to + 3 * kTile * block, x.im * number);
        x = x * step;
      }
    }
  }
};

}  // namespace seqconv::SEQCONV_ISA
