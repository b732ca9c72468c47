// The passes of the learned butterfly on the rows of a unit. Included inside an instruction set's
// namespace, after fftconv_unit.h; butterfly.h has the formula.
//
// A row is two planes, real and imaginary parts. Vectors run over m, but in the first pass, where m
// is 0 only, over the 16 values of p.

template <class T>
struct Planes {
  T *re = nullptr, *im = nullptr;
  Planes at(int64_t i) const { return {re + i, im + i}; }
};

template <class T>
SEQCONV_INLINE Vec<T>& vec(T* at) {
  return *reinterpret_cast<Vec<T>*>(at);
}

// A head's matrix of one radix: as it is, F[p][i], for sums over i; and its adjoint, for sums over
// p.
template <class T>
struct Matrix {
  Planes<T> plain, adjoint;
};
template <class T>
Matrix<T> load_matrix(const T* from, int radix, Scratch& scratch) {
  const int size = radix * radix;
  const auto planes = [&] { return Planes<T>{scratch.take<T>(size), scratch.take<T>(size)}; };
  const Matrix<T> to{planes(), planes()};
  if (!scratch.base) return to;
  for (int e = 0; e < size; ++e) {
    const int turned = e % radix * radix + e / radix;
    to.adjoint.re[turned] = to.plain.re[e] = from[2 * e];
    to.plain.im[e] = from[2 * e + 1];
    to.adjoint.im[turned] = -from[2 * e + 1];
  }
  return to;
}

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
void pass(Planes<T> f, Planes<const T> twiddles, int64_t s, int64_t b, Planes<T> in,
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

// What the sums of the matrices' gradients are kept in.
template <class T>
struct GradientSums {
  Planes<T> first;       // of the first pass: [i][p], numbers
  Vec<T>*common, *last;  // of others: [p][i], real and imaginary, each a vector's lanes
  GradientSums(int64_t last_elements, Scratch& scratch)
      : first{scratch.take<T>(256), scratch.take<T>(256)},
        common(scratch.take<Vec<T>>(512)),
        last(scratch.take<Vec<T>>(2 * last_elements)) {
    if (!scratch.base) return;
    for (int e = 0; e < 256; ++e) first.re[e] = first.im[e] = 0;
    for (int e = 0; e < 512; ++e) common[e] = Vec<T>{};
    for (int64_t e = 0; e < 2 * last_elements; ++e) last[e] = Vec<T>{};
  }
};

// The input's gradient of a pass from that of its output, which is turned back on the way; and what
// the pass adds to that of its matrix.
template <int R, class T>
void pass_backward(Planes<T> adjoint, Planes<const T> twiddles, int64_t s, int64_t b, Planes<T> in,
                   Planes<T> dout, Planes<T> din, Vec<T>* sums) {
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
constexpr int kParts = 16 / kLanes<T>;  // vectors of 16 numbers
template <class T>
constexpr int kAtOnce = kParts<T> > 4 ? 1 : 4 / kParts<T>;

// kCount neighbouring j at a time; `turned` is F transposed, [i][p].
template <int kCount, class T>
SEQCONV_INLINE void first_columns(Planes<T> turned, const T* x, int64_t s, int used, Planes<T> to) {
  Vec<T> re[kCount][kParts<T>] = {}, im[kCount][kParts<T>] = {};
  for (int i = 0; i < used; ++i) SEQCONV_UNROLL
  for (int k = 0; k < kParts<T>; ++k) {
    const Vec<T> a = vec(turned.re + 16 * i + k * kLanes<T>);
    const Vec<T> b = vec(turned.im + 16 * i + k * kLanes<T>);
    SEQCONV_UNROLL
    for (int j = 0; j < kCount; ++j) {
      re[j][k] += x[i * s + j] * a;
      im[j][k] += x[i * s + j] * b;
    }
  }
  for (int j = 0; j < kCount; ++j)
    for (int k = 0; k < kParts<T>; ++k) {
      vec(to.re + 16 * j + k * kLanes<T>) = re[j][k];
      vec(to.im + 16 * j + k * kLanes<T>) = im[j][k];
    }
}

// x <- w x, or conj(w) x, number by number.
template <bool kConj, class T>
SEQCONV_INLINE void turn_all(Planes<T> x, Planes<const T> w, int64_t count) {
  for (int64_t m = 0; m < count; m += kLanes<T>) {
    const Vec<T> a = vec(x.re + m), b = vec(x.im + m);
    typedef typename VectorOf<T>::Unaligned V;
    const Vec<T> re = *reinterpret_cast<const V*>(w.re + m);
    Vec<T> im = *reinterpret_cast<const V*>(w.im + m);
    if (kConj) im = -im;
    vec(x.re + m) = re * a - im * b;
    vec(x.im + m) = re * b + im * a;
  }
}

template <class T>
void first_pass(Planes<T> turned, Planes<const T> twiddles, int64_t s, const T* x, int used,
                Planes<T> out) {
  int64_t j = 0;
  for (; j + kAtOnce<T> <= s; j += kAtOnce<T>)
    first_columns<kAtOnce<T>>(turned, x + j, s, used, out.at(16 * j));
  for (; j < s; ++j) first_columns<1>(turned, x + j, s, used, out.at(16 * j));
  if (s > 1) turn_all<false>(out, twiddles, 16 * s);
}

// dx in the order [j][i].
template <class T>
void first_backward(Planes<T> plain, Planes<const T> twiddles, int64_t s, const T* x, int used,
                    Planes<T> dout, T* dx, Planes<T> sums) {
  if (s > 1) turn_all<true>(dout, twiddles, 16 * s);
  for (int64_t j = 0; j < s; ++j) {
    Vec<T> sum[kParts<T>] = {};
    for (int p = 0; p < 16; ++p) SEQCONV_UNROLL
    for (int k = 0; k < kParts<T>; ++k) {
      sum[k] += dout.re[16 * j + p] * vec(plain.re + 16 * p + k * kLanes<T>);
      sum[k] += dout.im[16 * j + p] * vec(plain.im + 16 * p + k * kLanes<T>);
    }
    for (int k = 0; k < kParts<T>; ++k) vec(dx + 16 * j + k * kLanes<T>) = sum[k];
  }
  for (int i = 0; i < used; i += kAtOnce<T>) {
    Vec<T> re[kAtOnce<T>][kParts<T>] = {}, im[kAtOnce<T>][kParts<T>] = {};
    for (int64_t j = 0; j < s; ++j) SEQCONV_UNROLL
    for (int k = 0; k < kParts<T>; ++k) {
      const Vec<T> a = vec(dout.re + 16 * j + k * kLanes<T>);
      const Vec<T> b = vec(dout.im + 16 * j + k * kLanes<T>);
      SEQCONV_UNROLL
      for (int c = 0; c < kAtOnce<T>; ++c) {
        re[c][k] += x[(i + c) * s + j] * a;
        im[c][k] += x[(i + c) * s + j] * b;
      }
    }
    for (int c = 0; c < kAtOnce<T>; ++c)
      for (int k = 0; k < kParts<T>; ++k) {
        vec(sums.re + 16 * (i + c) + k * kLanes<T>) += re[c][k];
        vec(sums.im + 16 * (i + c) + k * kLanes<T>) += im[c][k];
      }
  }
}

// ---- rows ----

// The memory of a unit, and its passes one after another.
template <class T>
struct Butterfly {
  const ButterflyProblem& p;
  int64_t passes = 1, last;
  int used;                     // of the first pass's 16 parts of a row
  Matrix<T> common, end;        // of 16 points; of the last pass, if they are fewer
  Planes<T> turned;             // `common` transposed
  T* x;                         // a row, and its gradient
  Planes<T> steps[kMaxStages];  // what every pass but the first begins with
  Planes<T> result, other;

  Butterfly(const ButterflyProblem& problem, int64_t head, bool backward, Scratch& scratch)
      : p(problem), last(p.last()) {
    for (int64_t rest = p.n / 16; rest > 1; rest = rest > 16 ? rest / 16 : 1) ++passes;
    const int64_t part = p.n / 16, length = p.length;
    used = static_cast<int>((length + part - 1) / part);
    const T* matrices = reinterpret_cast<const T*>(p.matrices) + 2 * head * p.elements();
    common = load_matrix(matrices, 16, scratch);
    if (last > 1) end = load_matrix(matrices + 512, static_cast<int>(last), scratch);
    turned = {scratch.take<T>(256), scratch.take<T>(256)};
    for (int e = 0; scratch.base && e < 256; ++e) {
      turned.re[e] = common.adjoint.re[e];
      turned.im[e] = -common.adjoint.im[e];
    }
    x = scratch.take<T>(p.n);
    const auto planes = [&] { return Planes<T>{scratch.take<T>(p.n), scratch.take<T>(p.n)}; };
    result = planes();
    other = planes();
    // Where nothing needs them any more passes take turns with two rows.
    for (int64_t d = passes - 1; d >= 1; --d)
      steps[d] = backward ? planes() : (passes - d) % 2 ? other : result;
  }

  Planes<T> output(int64_t d) const { return d + 1 < passes ? steps[d + 1] : result; }

  template <class Op>
  void each_pass(const Op& op) const {  // op(pass, s, b, twiddles), all but the first
    const T* w = reinterpret_cast<const T*>(p.twiddles) + 2 * p.n;
    int64_t b = 16;
    for (int64_t d = 1; d < passes; ++d) {
      const int64_t radix = d + 1 < passes || last == 1 ? 16 : last, s = p.n / b / radix;
      if (s == 1) return op(d, radix, s, b, Planes<const T>{});
      op(d, radix, s, b, Planes<const T>{w, w + s * radix});
      w += 2 * s * radix;
      b *= radix;
    }
  }
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
    first_pass(turned, first_twiddles(), p.n / 16, x, used, output(0));
    each_pass([&](int64_t d, int64_t radix, int64_t s, int64_t at, Planes<const T> w) {
      const Planes<T> in = steps[d], out = output(d);
      if (radix == 16) pass<16>(common.plain, w, s, at, in, out);
      if (radix == 8) pass<8>(end.plain, w, s, at, in, out);
      if (radix == 4) pass<4>(end.plain, w, s, at, in, out);
      if (radix == 2) pass<2>(end.plain, w, s, at, in, out);
    });
  }

  // After forward() of the same row: from its gradient in `result`.
  void backward(int64_t b, int64_t c, const GradientSums<T>& sums) {
    struct Step {
      int64_t radix, s, b;
      Planes<const T> w;
    } step[kMaxStages];
    each_pass([&](int64_t d, int64_t radix, int64_t s, int64_t at, Planes<const T> w) {
      step[d] = {radix, s, at, w};
    });
    Planes<T> from = result, to = other;
    for (int64_t d = passes - 1; d >= 1; --d) {
      const Step& i = step[d];
      const Planes<T> f = i.radix == 16 ? common.adjoint : end.adjoint;
      Vec<T>* add = i.radix == 16 ? sums.common : sums.last;
      if (i.radix == 16) pass_backward<16>(f, i.w, i.s, i.b, steps[d], from, to, add);
      if (i.radix == 8) pass_backward<8>(f, i.w, i.s, i.b, steps[d], from, to, add);
      if (i.radix == 4) pass_backward<4>(f, i.w, i.s, i.b, steps[d], from, to, add);
      if (i.radix == 2) pass_backward<2>(f, i.w, i.s, i.b, steps[d], from, to, add);
      const Planes<T> swap = from;
      from = to;
      to = swap;
    }
    T* dx = to.re;
    first_backward(common.plain, first_twiddles(), p.n / 16, x, used, from, dx, sums.first);
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
  Scratch scratch{nullptr};
  const Butterfly<T> memory(p, 0, backward, scratch);
  if (backward) GradientSums<T>(p.last() * p.last(), scratch);
  return scratch.used;
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
  Scratch scratch{memory};
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
  Scratch scratch{memory};
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
  const auto total = [](const Vec<T>& x) {
    double sum = 0;
    for (int lane = 0; lane < kLanes<T>; ++lane) sum += static_cast<double>(x[lane]);
    return sum;
  };
  for (int e = 0; e < 256; ++e) {
    const int turned = e % 16 * 16 + e / 16;
    sums[2 * e] = total(kept.common[2 * e]) + static_cast<double>(kept.first.re[turned]);
    sums[2 * e + 1] = total(kept.common[2 * e + 1]) + static_cast<double>(kept.first.im[turned]);
  }
  for (int64_t i = 0; last > 1 && i < 2 * last; ++i) sums[512 + i] = total(kept.last[i]);
}

template <class T>
constexpr ButterflyKernel kButterflyKernel = {butterfly_scratch<T>, butterfly_forward_unit<T>,
                                              butterfly_backward_unit<T>};
