// The learned butterfly on the rows of a unit, and its gradient.
#pragma once
#include "butterfly_pass.h"
#include "dtypes.h"
#include "isa.h"
#include "radix.h"
#include "scratch.h"

namespace seqconv::SEQCONV_ISA {

template <class T>
Planes<T> take_planes(int64_t size, Scratch& scratch) {
  T* re = scratch.take<T>(size);
  return {re, scratch.take<T>(size)};
}

// A head's matrix of one radix: as it is, F[p][i], for sums over i; and its adjoint, for sums over
// p.
template <class T>
struct RadixMatrix {
  Planes<T> plain, adjoint;
};
template <class T>
RadixMatrix<T> load_matrix(const T* from, int radix, Scratch& scratch) {
  const int size = radix * radix;
  const RadixMatrix<T> to{take_planes<T>(size, scratch), take_planes<T>(size, scratch)};
  if (scratch.counts()) return to;
  for (int e = 0; e < size; ++e) {
    const int turned = e % radix * radix + e / radix;
    to.adjoint.re[turned] = to.plain.re[e] = from[2 * e];
    to.plain.im[e] = from[2 * e + 1];
    to.adjoint.im[turned] = -from[2 * e + 1];
  }
  return to;
}

// What the sums of the matrices' gradients are kept in.
template <class T>
struct GradientSums {
  Planes<T> first;       // of the first pass: [i][p], numbers
  Vec<T>*common, *last;  // of others: [p][i], real and imaginary, each a vector's lanes
  GradientSums(int64_t last_elements, Scratch& scratch)
      : first(take_planes<T>(256, scratch)),
        common(scratch.take<Vec<T>>(512)),
        last(scratch.take<Vec<T>>(2 * last_elements)) {
    if (scratch.counts()) return;
    for (int e = 0; e < 256; ++e) first.re[e] = first.im[e] = 0;
    for (int e = 0; e < 512; ++e) common[e] = Vec<T>{};
    for (int64_t e = 0; e < 2 * last_elements; ++e) last[e] = Vec<T>{};
  }
};

// The memory of a unit, and its passes one after another.
template <class T>
struct Butterfly {
  const ButterflyProblem& p;
  int64_t passes = 0, last;
  int used;                    // of the first pass's 16 parts of a row
  RadixMatrix<T> common, end;  // of 16 points; of the last pass, if they are fewer
  T* x;                        // a row, and its gradient
  Planes<T> result, other;
  // Every pass but the first: (radix, s, b) as in butterfly.h, and what it begins with.
  struct Pass {
    int64_t radix, s, b;
    Planes<const T> twiddles;
    Planes<T> in;
  } pass[kMaxStages];

  Butterfly(const ButterflyProblem& problem, int64_t head, bool backward, Scratch& scratch)
      : p(problem), last(p.last()) {
    const int64_t part = p.n / 16, length = p.length;
    used = static_cast<int>((length + part - 1) / part);
    const T* matrices = reinterpret_cast<const T*>(p.matrices) + 2 * head * p.elements();
    common = load_matrix(matrices, 16, scratch);
    if (last > 1) end = load_matrix(matrices + 512, static_cast<int>(last), scratch);
    x = scratch.take<T>(p.n);
    result = take_planes<T>(p.n, scratch);
    other = take_planes<T>(p.n, scratch);
    const T* w = reinterpret_cast<const T*>(p.twiddles) + 2 * p.n;
    for (int64_t b = 16; b < p.n; b *= pass[passes++].radix) {
      const int64_t radix = p.n / b % 16 == 0 ? 16 : last, s = p.n / b / radix;
      const Planes<const T> twiddles = {w, w + s * radix};
      pass[passes] = {radix, s, b, s > 1 ? twiddles : Planes<const T>{}, {}};
      w += 2 * s * radix;
    }
    // Where nothing needs them any more passes take turns with two rows.
    for (int64_t d = 0; d < passes; ++d)
      pass[d].in = backward ? take_planes<T>(p.n, scratch) : (passes - d) % 2 ? other : result;
  }

  Planes<T> output(int64_t d) const { return d + 1 < passes ? pass[d + 1].in : result; }
  const RadixMatrix<T>& matrix(const Pass& of) const { return of.radix == 16 ? common : end; }
  Planes<const T> first_twiddles() const {
    const T* w = reinterpret_cast<const T*>(p.twiddles);
    return {w, w + p.n};
  }

  char* element(const Tensor& t, int64_t b, int64_t c, int64_t size) const {
    return t.data + (b * t.stride[0] + c * t.stride[2]) * size;
  }

  void forward(int64_t b, int64_t c) {
    dispatch(p.x.dtype, [&](auto tag) {
      using S = typename decltype(tag)::Type;
      const S* from = reinterpret_cast<const S*>(element(p.x, b, c, sizeof(S)));
      for (int64_t t = 0; t < p.length; ++t) x[t] = static_cast<T>(widen(from[t * p.x.stride[3]]));
    });
    for (int64_t t = p.length; t < p.n; ++t) x[t] = 0;
    real_pass(common.adjoint, first_twiddles(), p.n / 16, x, used, output(-1));
    for (int64_t d = 0; d < passes; ++d) {
      const Pass& now = pass[d];
      const Planes<T> f = matrix(now).plain, out = output(d);
      with_radix<16, 8, 4, 2>(now.radix, [&](auto radix) {
        complex_pass<decltype(radix)::value>(f, now.twiddles, now.s, now.b, now.in, out);
      });
    }
  }

  // After forward() of the same row: from its gradient in `result`.
  void backward(int64_t b, int64_t c, const GradientSums<T>& sums) {
    Planes<T> from = result, to = other;
    for (int64_t d = passes - 1; d >= 0; --d) {
      const Pass& now = pass[d];
      const Planes<T> f = matrix(now).adjoint;
      Vec<T>* add = now.radix == 16 ? sums.common : sums.last;
      with_radix<16, 8, 4, 2>(now.radix, [&](auto radix) {
        complex_pass_backward<decltype(radix)::value>(f, now.twiddles, now.s, now.b, now.in, from,
                                                      to, add);
      });
      const Planes<T> swap = from;
      from = to;
      to = swap;
    }
    T* dx = to.re;
    real_pass_backward(common.plain, first_twiddles(), p.n / 16, x, used, from, dx, sums.first);
    dispatch(p.dx.dtype, [&](auto tag) {
      using S = typename decltype(tag)::Type;
      S* out = reinterpret_cast<S*>(element(p.dx, b, c, sizeof(S)));
      const int64_t s = p.n / 16;
      for (int64_t i = 0; i < used; ++i)
        for (int64_t j = 0; j < s && i * s + j < p.length; ++j)
          narrow(dx[16 * j + i], out[(i * s + j) * p.dx.stride[3]]);
    });
  }
};

template <class T>
size_t butterfly_scratch(const ButterflyProblem& p, bool backward) {
  Scratch scratch;
  const Butterfly<T> memory(p, 0, backward, scratch);
  if (backward) GradientSums<T>(p.last() * p.last(), scratch);
  return scratch.used();
}

// op(row, batch, channel) for rows begin .. end of a head.
template <class Op>
SEQCONV_INLINE void each_row(const ButterflyProblem& p, int64_t head, int64_t begin, int64_t end,
                             const Op& op) {
  const int64_t share = p.channels / p.heads;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / share, c = head * share + row % share;
    op(b, c, (b * p.channels + c) * 2 * p.n);
  }
}

template <class T>
void butterfly_forward_unit(const ButterflyProblem& p, int64_t head, int64_t begin, int64_t end,
                            char* memory) {
  Scratch scratch(memory);
  Butterfly<T> butterfly(p, head, false, scratch);
  each_row(p, head, begin, end, [&](int64_t b, int64_t c, int64_t at) {
    butterfly.forward(b, c);
    T* z = reinterpret_cast<T*>(p.z) + at;
    for (int64_t i = 0; i < p.n; ++i) {
      z[2 * i] = butterfly.result.re[i];
      z[2 * i + 1] = butterfly.result.im[i];
    }
  });
}

// Sets `sums`, complex numbers like the matrices of one head.
template <class T>
void butterfly_backward_unit(const ButterflyProblem& p, int64_t head, int64_t begin, int64_t end,
                             double* sums, char* memory) {
  Scratch scratch(memory);
  Butterfly<T> butterfly(p, head, true, scratch);
  const int64_t last = butterfly.last * butterfly.last;
  GradientSums<T> kept(last, scratch);
  each_row(p, head, begin, end, [&](int64_t b, int64_t c, int64_t at) {
    butterfly.forward(b, c);
    const T* dz = reinterpret_cast<const T*>(p.dz) + at;
    for (int64_t i = 0; i < p.n; ++i) {
      butterfly.result.re[i] = dz[2 * i];
      butterfly.result.im[i] = dz[2 * i + 1];
    }
    butterfly.backward(b, c, kept);
  });
  for (int e = 0; e < 256; ++e) {
    const int turned = e % 16 * 16 + e / 16;
    sums[2 * e] = sum_of<T>(kept.common[2 * e]) + static_cast<double>(kept.first.re[turned]);
    sums[2 * e + 1] =
        sum_of<T>(kept.common[2 * e + 1]) + static_cast<double>(kept.first.im[turned]);
  }
  for (int64_t i = 0; last > 1 && i < 2 * last; ++i) sums[512 + i] = sum_of<T>(kept.last[i]);
}

template <class T>
constexpr ButterflyKernel kButterflyKernel = {butterfly_scratch<T>, butterfly_forward_unit<T>,
                                              butterfly_backward_unit<T>};

}  // namespace seqconv::SEQCONV_ISA
