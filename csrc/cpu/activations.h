// The activations and their derivatives.
#pragma once
#include "fftconv.h"
#include "vectors.h"

namespace seqconv::SEQCONV_ISA {

constexpr float kTaylor[7] = {1.0f, 1.0f, 1.0f / 2, 1.0f / 6, 1.0f / 24, 1.0f / 120, 1.0f / 720};

// |x - n ln 2| <= ln(2) / 2 and a Taylor polynomial whose tail is below 2^-25. NaN stays NaN.
SEQCONV_INLINE Vec<float> exp_of(Vec<float> x) {
  typedef uint32_t Int __attribute__((vector_size(sizeof(Vec<float>)), may_alias));
  const Vec<float> magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> shifted = x * 1.44269504088896341f + magic;
  const Vec<float> n = shifted - magic;
  const Vec<float> r = x - n * 0.693359375f - n * -2.12194440e-4f;  // ln 2 in two parts
  Vec<float> p = splat(1.0f / 5040);
  for (int i = 6; i >= 0; --i) p = p * r + kTaylor[i];
  const Int power = (reinterpret_cast<const Int&>(shifted) << 23) + (127u << 23);
  p *= reinterpret_cast<const Vec<float>&>(power);
  p = x < -87.0f ? Vec<float>{} : p;
  return x > 88.0f ? splat(__builtin_inff()) : p;
}

constexpr float kErfc[10] = {
    2.820869264e-01f, 2.823478961e-01f,  2.434860648e-01f, 2.001805763e-01f,  -1.737233758e-02f,
    2.573629220e-01f, -4.585286083e-01f, 2.605507075e-01f, -4.790700084e-02f, -2.207192189e-03f};

// Standard normal distribution function and density. erfc(z) exp(z^2) (1 + z / 2) is close to a
// polynomial in t = 1 / (1 + z / 2); this one, fitted for z < 18, has a relative error of 6e-8.
// Beyond, exp underflows.
SEQCONV_INLINE void normal(Vec<float> v, Vec<float>& cdf, Vec<float>& density) {
  const Vec<float> size = v < 0.0f ? -v : v;
  const Vec<float> t = 1.0f / (1.0f + size * 0.353553390593273762f);
  Vec<float> p = splat(kErfc[9]);
  for (int i = 8; i >= 0; --i) p = p * t + kErfc[i];
  const Vec<float> bell = exp_of(v * v * -0.5f);
  const Vec<float> tail = bell * (size > 25.0f ? Vec<float>{} : p * t * 0.5f);
  cdf = v < 0.0f ? tail : 1.0f - tail;
  density = bell * 0.398942280401432678f;
}

// The same through libm: double problems are checks, not production.
SEQCONV_INLINE Vec<double> exp_of(Vec<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = exp(x[lane]);
  return x;
}
SEQCONV_INLINE void normal(Vec<double> v, Vec<double>& cdf, Vec<double>& density) {
  for (int lane = 0; lane < kLanes<double>; ++lane) {
    cdf[lane] = 0.5 * erfc(-v[lane] * 0.707106781186547524401);
    density[lane] = 0.398942280401432677940 * exp(-0.5 * v[lane] * v[lane]);
  }
}

// activation(v), and its derivative in slope.
template <class T>
SEQCONV_INLINE Vec<T> activate(Activation activation, Vec<T> v, Vec<T>& slope) {
  const Vec<T> one = splat(T(1)), zero = {};
  Vec<T> cdf, density;
  switch (activation) {
    case Activation::kNone:
      slope = one;
      return v;
    case Activation::kGelu:
      normal(v, cdf, density);
      slope = cdf + v * density;
      return v * cdf;
    case Activation::kSilu:
      cdf = one / (one + exp_of(-v));
      slope = cdf + v * cdf * (one - cdf);
      return v * cdf;
    case Activation::kRelu:
      slope = v <= zero ? zero : one;
      return v < zero ? zero : v;
  }
  __builtin_unreachable();
}

}  // namespace seqconv::SEQCONV_ISA
