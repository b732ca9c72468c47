// The activations and their derivatives.
#pragma once
#include "fftconv.h"
#include "rows.h"

namespace seqconv::SEQCONV_ISA {

// exp(-x) for |x| <= ln(2) / 2, with a relative error of 2e-9.
constexpr float kExp[7] = {1.0f,
                           -1.0000000323e+00f,
                           4.9999994192e-01f,
                           -1.6666430800e-01f,
                           4.1668004725e-02f,
                           -8.3741956131e-03f,
                           1.3843606715e-03f};

// exp(-x), 0 <= x <= 87; of larger x some number, or NaN.
SEQCONV_INLINE Vec<float> exp_of_minus(Vec<float> x) {
  typedef uint32_t Int __attribute__((vector_size(sizeof(Vec<float>)), may_alias));
  const Vec<float> magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> shifted = x * -1.44269504088896341f + magic;
  const Vec<float> n = shifted - magic;
  const Vec<float> r = x + n * 0.693359375f + n * -2.12194440e-4f;  // ln 2 in two parts
  Vec<float> p = splat(kExp[6]);
  for (int i = 5; i >= 0; --i) p = p * r + kExp[i];
  const Int bits = reinterpret_cast<const Int&>(p) + (reinterpret_cast<const Int&>(shifted) << 23);
  return reinterpret_cast<const Vec<float>&>(bits);
}

// 1 / (1 + exp(-x)), of which the exponential is taken where it is at most 1. NaN stays NaN.
SEQCONV_INLINE Vec<float> sigmoid(Vec<float> x) {
  const Vec<float> size = x < 0.0f ? -x : x;
  Vec<float> small = exp_of_minus(size);
  small = size > 87.0f ? Vec<float>{} : small;
  return (x < 0.0f ? small : splat(1.0f)) * (1.0f / (1.0f + small));
}
SEQCONV_INLINE Vec<double> sigmoid(Vec<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = 1 / (1 + exp(-x[lane]));
  return x;
}

// With a = |v|, T(a) = exp(-a^2 / 2) t p(t), t = 1 / (1 + kBend a), is the normal distribution
// beyond a; p was fitted for a <= 13.2, with a relative error of 8.6e-8.
constexpr float kBend = 0.303f;
constexpr float kTail[8] = {1.208313956e-01f,  1.218461738e-01f,  1.016109587e-01f,
                            1.254286863e-01f,  -4.696855970e-02f, 1.971147334e-01f,
                            -1.566356538e-01f, 3.677226239e-02f};
constexpr float kFarTail = 13.1f;  // T there is 1e-39

// gelu(v) = v Phi(v) = max(v, 0) - a T(a)
struct Gelu {
  SEQCONV_INLINE Vec<float> bell(Vec<float> v) { return exp_of_minus(v * v * 0.5f); }
  SEQCONV_INLINE Vec<float> tail(Vec<float> size) {  // T / bell
    const Vec<float> t = 1.0f / (1.0f + size * kBend);
    Vec<float> p = splat(kTail[7]);
    for (int i = 6; i >= 0; --i) p = p * t + kTail[i];
    return p * t;
  }
  // max(v, 0) as a product, so that the value of -inf is NaN, as torch's.
  SEQCONV_INLINE Vec<float> value(Vec<float> v) {
    const Vec<float> size = v < 0.0f ? -v : v, product = bell(v) * tail(size) * size;
    return v * (v < 0.0f ? Vec<float>{} : splat(1.0f)) - (size > kFarTail ? Vec<float>{} : product);
  }
  SEQCONV_INLINE Vec<float> slope(Vec<float> v) {
    const Vec<float> size = v < 0.0f ? -v : v;
    Vec<float> low = bell(v) * (tail(size) - size * 0.398942280401432678f);
    low = size > kFarTail ? Vec<float>{} : low;
    return v < 0.0f ? low : 1.0f - low;
  }

  // Through libm: double problems are checks, not production.
  SEQCONV_INLINE Vec<double> normal(Vec<double> v) {
    for (int i = 0; i < kLanes<double>; ++i) v[i] = 0.5 * erfc(-v[i] * 0.707106781186547524401);
    return v;
  }
  SEQCONV_INLINE Vec<double> value(Vec<double> v) { return v * normal(v); }
  SEQCONV_INLINE Vec<double> slope(Vec<double> v) {
    Vec<double> density = -0.5 * v * v;
    for (int i = 0; i < kLanes<double>; ++i) density[i] = exp(density[i]);
    return normal(v) + v * density * 0.398942280401432677940;
  }
};

template <class T>
struct Silu {
  SEQCONV_INLINE Vec<T> value(Vec<T> v) { return v * sigmoid(v); }
  SEQCONV_INLINE Vec<T> slope(Vec<T> v) {
    const Vec<T> gate = sigmoid(v);
    return gate + v * gate * (T(1) - gate);
  }
};

template <class T>
struct Relu {
  SEQCONV_INLINE Vec<T> value(Vec<T> v) { return v < T(0) ? Vec<T>{} : v; }
  SEQCONV_INLINE Vec<T> slope(Vec<T> v) { return v <= T(0) ? Vec<T>{} : splat(T(1)); }
};

// op(A{}), A: the activation's functions; of none nothing.
template <class T, class Op>
SEQCONV_INLINE void with_activation(Activation activation, const Op& op) {
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kGelu:
      return op(Gelu{});
    case Activation::kSilu:
      return op(Silu<T>{});
    case Activation::kRelu:
      return op(Relu<T>{});
  }
}

// out[i ...] = value(i), a vector, for i < n; the last vector may end beyond n.
template <class T, class Value>
SEQCONV_INLINE void fill_by_vectors(int64_t n, T* out, bool streamed, const Value& value) {
  const bool past = kStreams && streamed && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) {
    const Vec<T> x = value(i);
    past ? stream<T>(out + i, x) : store_vector(out + i, x);
  }
  if (i == n) return;
  const Vec<T> x = value(i);
  for (int lane = 0; i + lane < n; ++lane) out[i + lane] = x[lane];
}
// out[i] = activation(v[i]), i < n; whole vectors of v are read. The bits do not depend on where a
// value stands among them, which is why none is taken by itself.
template <class T>
SEQCONV_INLINE void activate(Activation activation, int64_t n, const T* v, T* out,
                             bool streamed = false) {
  with_activation<T>(activation, [=](auto a) {
    fill_by_vectors(n, out, streamed, [=](int64_t i) { return a.value(load_vector(v + i)); });
  });
}
// out[i] = grad[i] activation'(v[i]), the same
template <class T>
SEQCONV_INLINE void chain_activation(Activation activation, int64_t n, const T* v, const T* grad,
                                     T* out) {
  with_activation<T>(activation, [=](auto a) {
    const int64_t whole = n / kLanes<T> * kLanes<T>;
    for (int64_t i = 0; i < whole; i += kLanes<T>)
      store_vector(out + i, load_vector(grad + i) * a.slope(load_vector(v + i)));
    if (whole == n) return;
    const Vec<T> slope = a.slope(load_vector(v + whole));
    for (int lane = 0; whole + lane < n; ++lane)
      out[whole + lane] = grad[whole + lane] * slope[lane];
  });
}

}  // namespace seqconv::SEQCONV_ISA
