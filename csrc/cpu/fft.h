// The right-angle transform (see plan.h) on vectors of channels, in place. forward() leaves the
// values in the order in which the nodes split, inverse() takes them in that order: nothing ever
// reorders them. Included inside an instruction set's namespace, after simd.h.

template <class T>
struct Complex {
  Vec<T> re, im;
};

template <class T>
SEQCONV_INLINE Complex<T> operator+(Complex<T> a, Complex<T> b) {
  return {a.re + b.re, a.im + b.im};
}
template <class T>
SEQCONV_INLINE Complex<T> operator-(Complex<T> a, Complex<T> b) {
  return {a.re - b.re, a.im - b.im};
}
template <class T>
SEQCONV_INLINE Complex<T> operator*(Complex<T> a, Complex<T> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <class T>
SEQCONV_INLINE Complex<T> operator*(T s, Complex<T> a) {
  return {s * a.re, s * a.im};
}
template <class T>
SEQCONV_INLINE Complex<T> conj(Complex<T> a) {
  return {a.re, -a.im};
}
template <class T>
SEQCONV_INLINE Complex<T> times_i(Complex<T> a) {
  return {-a.im, a.re};
}

// a[j] <- sum_r a[r] exp(2 pi i j r / R)
template <int R, class T>
SEQCONV_INLINE void dft(Complex<T>* a) {
  if constexpr (R == 2) {
    const Complex<T> d = a[0] - a[1];
    a[0] = a[0] + a[1];
    a[1] = d;
  } else if constexpr (R == 3) {
    const Complex<T> s = a[1] + a[2];
    const Complex<T> d = T(0.866025403784438646763723170753) * times_i(a[1] - a[2]);
    const Complex<T> m = a[0] - T(0.5) * s;
    a[0] = a[0] + s;
    a[1] = m + d;
    a[2] = m - d;
  } else if constexpr (R == 4) {
    const Complex<T> s0 = a[0] + a[2], d0 = a[0] - a[2];
    const Complex<T> s1 = a[1] + a[3], d1 = times_i(a[1] - a[3]);
    a[0] = s0 + s1;
    a[1] = d0 + d1;
    a[2] = s0 - s1;
    a[3] = d0 - d1;
  } else {
    static_assert(R == 5);
    constexpr T c1 = T(0.309016994374947424102293417183), c2 = T(-0.809016994374947424102293417183);
    constexpr T s1 = T(0.951056516295153572116439333379), s2 = T(0.587785252292473129168705954639);
    const Complex<T> p = a[1] + a[4], q = a[2] + a[3];
    const Complex<T> d = times_i(a[1] - a[4]), e = times_i(a[2] - a[3]);
    const Complex<T> m1 = a[0] + (c1 * p + c2 * q), m2 = a[0] + (c2 * p + c1 * q);
    const Complex<T> n1 = s1 * d + s2 * e, n2 = s2 * d - s1 * e;
    a[0] = a[0] + (p + q);
    a[1] = m1 + n1;
    a[2] = m2 + n2;
    a[3] = m2 - n2;
    a[4] = m1 - n1;
  }
}

template <int R, class T>
SEQCONV_INLINE void load_twiddles(const T* from, Complex<T>* w) {
  for (int r = 1; r < R; ++r) w[r] = {splat(from[2 * r - 2]), splat(from[2 * r - 1])};
}

// Splits the node of size m at x into R nodes of size m / R.
template <int R, class T>
void split(Complex<T>* x, int64_t m, const T* twiddles) {
  const int64_t q = m / R;
  Complex<T> w[R], a[R];
  load_twiddles<R>(twiddles, w);
  for (int64_t i = 0; i < q; ++i) {
    a[0] = x[i];
    for (int r = 1; r < R; ++r) a[r] = x[i + r * q] * w[r];
    dft<R>(a);
    for (int r = 0; r < R; ++r) x[i + r * q] = a[r];
  }
}

// Undoes split, up to a factor R.
template <int R, class T>
void join(Complex<T>* x, int64_t m, const T* twiddles) {
  const int64_t q = m / R;
  Complex<T> w[R], a[R];
  load_twiddles<R>(twiddles, w);
  for (int64_t i = 0; i < q; ++i) {
    for (int r = 0; r < R; ++r) a[r ? R - r : 0] = x[i + r * q];  // reversed roots: the inverse DFT
    dft<R>(a);
    x[i] = a[0];
    for (int r = 1; r < R; ++r) x[i + r * q] = a[r] * conj(w[r]);
  }
}

template <bool kForward, class T>
SEQCONV_INLINE void pass(const Transform<T>& plan, int stage, int64_t node, Complex<T>* x,
                         int64_t m) {
  const int radix = plan.stage[stage].radix;
  const T* w = plan.twiddles + plan.stage[stage].twiddle + 2 * (radix - 1) * node;
  switch (radix) {
    case 2:
      return kForward ? split<2>(x, m, w) : join<2>(x, m, w);
    case 3:
      return kForward ? split<3>(x, m, w) : join<3>(x, m, w);
    case 4:
      return kForward ? split<4>(x, m, w) : join<4>(x, m, w);
    default:
      return kForward ? split<5>(x, m, w) : join<5>(x, m, w);
  }
}

// Depth first: a node that fits in cache is finished before its neighbour starts.
template <bool kForward, class T>
void transform(const Transform<T>& plan, Complex<T>* x, int64_t m, int stage = 0,
               int64_t node = 0) {
  if (stage == plan.stages) return;
  const int radix = plan.stage[stage].radix;
  if (kForward) pass<true>(plan, stage, node, x, m);
  if (m > radix)
    for (int r = 0; r < radix; ++r)
      transform<kForward>(plan, x + r * (m / radix), m / radix, stage + 1, node * radix + r);
  if (!kForward) pass<false>(plan, stage, node, x, m);
}
