// The first and the last pass of the transform, between rows of tensors and its nodes.
#pragma once
#include "plan.h"
#include "radix.h"
#include "rows.h"
#include "spread.h"

namespace seqconv::SEQCONV_ISA {

constexpr int64_t kPiece = 64;      // vectors of a child that one of a team takes at a time
constexpr int64_t kSmall = 2048;    // points of a transform whose row is copied whole, if at all
constexpr int64_t kCrowded = 8192;  // points of a transform whose ends are far apart

// The ends of the transform, where a row meets its nodes: R times kEndQuads segments, split R by R
// by a butterfly and the rest into lanes. kParts neighbouring results are parts of one vector.
template <int R, class T>
struct End {
  static constexpr int kQ = kEndQuads<T>, kParts = kQuads<T> / kQ, kSegments = R * kQ;
  // Where result j lies, children being `apart` scalars apart.
  static int64_t place(int j, int64_t apart) { return j / kParts * apart + j % kParts * 4 * kQ; }
  static Complex<T, kQ> weight(const T* table, int r, int s) {
    return load<T, kQ>(table + (r * kQ + s) * 8 * kQ, 4 * kQ);
  }
  // a[r]: what the segments of a real sequence at x add to child r before its butterfly. Of two
  // segments the second's weight is the first's times exp(i pi / 4), or minus that in the second
  // quad.
  static void put(Complex<T, kQ>& a, const T* table, const T* x, int r, int64_t stride) {
    const Complex<T, kQ> w = weight(table, r, 0);
    const Vec<T, kQ> value = repeat<T, kQ>(x + r * stride);
    a = {value * w.re, value * w.im};
    if constexpr (kQ == 2) {
      const Complex<T, kQ> z = weight(table, r, 1);
      const Vec<T, kQ> other = repeat<T, kQ>(x + (r + R) * stride);
      a = {a.re + other * z.re, a.im + other * z.im};
    }
  }
  // The same of i turn times the sequence at y, added.
  static void add(Complex<T, kQ>& a, const T* table, const T* y, T turn, int r, int64_t stride) {
    for (int s = 0; s < kQ; ++s) {
      const Complex<T, kQ> w = weight(table, r, s);
      const Vec<T, kQ> value = turn * repeat<T, kQ>(y + (r + s * R) * stride);
      a = {a.re - value * w.im, a.im + value * w.re};
    }
  }
  // So many streams a power of two apart would evict each other's lines half used.
  static bool crowded(const Plan<T>& plan) { return kSegments > 8 && plan.n >= kCrowded; }
};

// The first pass: children [begin, end) vectors of every child of the root, of the sequence re, or
// re + turn i im, times the constant folded into `weights`.
template <int R, bool kComplex, class T>
void first_pass(const Plan<T>& plan, const T* weights, const Source<T>& re, const Source<T>& im,
                T turn, T* data, int64_t begin, int64_t end) {
  using E = End<R, T>;
  constexpr int kQ = E::kQ;
  const int64_t apart = 4 * plan.vectors;  // positions from segment to segment
  const int64_t child = plan.vectors * kStep<T>;
  T* to = data + begin * kStep<T>;
  alignas(64) T staging[kComplex ? 2 : 1][E::kSegments][kChunk];
  const bool crowded = E::crowded(plan);
  // Vectors up to `direct` have all their segments in memory.
  const int64_t span = (E::kSegments - 1) * apart;
  int64_t direct = crowded ? 0 : re.fours(span);
  if (kComplex && im.fours(span) < direct) direct = im.fours(span);
  const T* whole_re = direct ? contiguous<T>(re.row) + re.shift : nullptr;
  const T* whole_im = kComplex && direct ? contiguous<T>(im.row) + im.shift : whole_re;
  // A short row is cheaper to copy at once than segment by segment.
  alignas(64) T spare[kComplex ? 2 : 1][kSmall];
  if (plan.n <= kSmall && direct < plan.vectors && end - begin == plan.vectors) {
    re.fill(0, plan.n, spare[0]);
    if (kComplex) im.fill(0, plan.n, spare[kComplex]);
    whole_re = spare[0];
    whole_im = spare[kComplex];
    direct = end;
  }
  while (begin < end) {
    const T *x = staging[0][0], *y = staging[kComplex][0];
    int64_t stop = end < direct ? end : direct, stride = kChunk;
    if (begin < direct) {
      x = whole_re + 4 * begin;
      y = whole_im + 4 * begin;
      stride = apart;
    } else {
      stop = end < begin + kChunk / 4 ? end : begin + kChunk / 4;
      for (int g = 0; g < E::kSegments; ++g) {
        const int64_t t = g * apart + 4 * begin, n = 4 * (stop - begin);
        re.fill(t, n, staging[0][g]);
        if (kComplex) im.fill(t, n, staging[kComplex][g]);
      }
    }
    for (int64_t i = 0; i < stop - begin; ++i) {
      Complex<T, kQ> a[R];
      SEQCONV_UNROLL
      for (int r = 0; r < R; ++r) {
        E::put(a[r], weights, x + 4 * i, r, stride);
        if constexpr (kComplex) E::add(a[r], weights, y + 4 * i, turn, r, stride);
      }
      dft<R>(a);
      SEQCONV_UNROLL
      for (int r = 0; r < R; ++r) store(to + E::place(r, child), a[r]);
      to += kStep<T>;
    }
    begin = stop;
  }
}

// The last pass: real parts of the inverse times the constant folded into `weights`.
template <int R, class T>
void last_pass(const Plan<T>& plan, const T* data, const T* weights, const Sink<T>& sink,
               int64_t begin, int64_t end) {
  using E = End<R, T>;
  constexpr int kQ = E::kQ;
  const int64_t apart = 4 * plan.vectors, child = plan.vectors * kStep<T>;
  const T* from = data + begin * kStep<T>;
  alignas(64) T staging[E::kSegments][kChunk];
  int64_t direct = E::crowded(plan) ? 0 : sink.fours((E::kSegments - 1) * apart);
  T* whole = direct ? contiguous<T>(sink.row) + sink.shift : nullptr;
  alignas(64) T spare[kSmall];
  const bool spared = plan.n <= kSmall && direct < plan.vectors && end - begin == plan.vectors;
  if (spared) {
    whole = spare;
    direct = end;
  }
  while (begin < end) {
    const bool staged = begin >= direct;
    T* y = staged ? staging[0] : whole + 4 * begin;
    const int64_t stride = staged ? kChunk : apart;
    int64_t stop = end < direct ? end : direct;
    if (staged) stop = end < begin + kChunk / 4 ? end : begin + kChunk / 4;
    for (int64_t i = 0; i < stop - begin; ++i) {
      Complex<T, kQ> a[R];
      SEQCONV_UNROLL
      for (int r = 0; r < R; ++r)
        a[r ? R - r : 0] = load<T, kQ>(from + E::place(r, child));  // as in join_node
      from += kStep<T>;
      dft<R>(a);
      SEQCONV_UNROLL
      for (int r = 0; r < R; ++r) {
        Vec<T, kQ> e[kQ];
        SEQCONV_UNROLL
        for (int s = 0; s < kQ; ++s) {
          const Complex<T, kQ> c = E::weight(weights, r, s);
          e[s] = a[r].re * c.re + a[r].im * c.im;
        }
        store_quad_sums<T, kQ>(e, y + r * stride + 4 * i, R * stride);
      }
    }
    for (int g = 0; g < E::kSegments && staged; ++g)
      sink.take(g * apart + 4 * begin, 4 * (stop - begin), staging[g]);
    begin = stop;
  }
  if (spared) sink.take_all(0, plan.n, spare);
}

// op(Number<R>{}, begin, end) by the team, for vectors [begin, end) of a child; R: of the ends.
template <class T, class Op>
void spread_end(const Plan<T>& plan, Team& team, const Op& op) {
  with_radix<2, 3, 4, 5, 7>(plan.radix, [&](auto radix) {
    constexpr int R = decltype(radix)::value * kQuads<T> / kEndQuads<T>;
    spread(team, plan.vectors, kPiece,
           [&](int64_t begin, int64_t end) { op(Number<R>{}, begin, end); });
  });
}

// data <- first pass of re (+ turn i im), times the constant folded into `weights`.
template <class T>
void enter(const Plan<T>& plan, Team& team, T* data, const T* weights, const Source<T>& re,
           const Source<T>* im = nullptr, T turn = 1) {
  spread_end(plan, team, [&](auto radix, int64_t begin, int64_t end) {
    constexpr int R = decltype(radix)::value;
    // Transposing works on whole groups of four nodes.
    const int64_t rest = plan.radix * plan.vectors * kStep<T>;
    for (int64_t i = rest; begin == 0 && i < plan.spectrum; ++i) data[i] = 0;
    if (im)
      first_pass<R, true, T>(plan, weights, re, *im, turn, data, begin, end);
    else
      first_pass<R, false, T>(plan, weights, re, re, turn, data, begin, end);
  });
}

// sink <- last pass of data.
template <class T>
void leave(const Plan<T>& plan, Team& team, const T* data, const T* weights, const Sink<T>& sink) {
  spread_end(plan, team, [&](auto radix, int64_t begin, int64_t end) {
    last_pass<decltype(radix)::value, T>(plan, data, weights, sink, begin, end);
  });
}

}  // namespace seqconv::SEQCONV_ISA
