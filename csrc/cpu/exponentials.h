// exp of complex numbers in double, a vector of them at a time: libm takes them one by one.
#pragma once
#include "vectors.h"

namespace seqconv::SEQCONV_ISA {

typedef int64_t Bits __attribute__((vector_size(sizeof(Vec<double>)), may_alias));
SEQCONV_INLINE const Bits& bits_of(const Vec<double>& x) {
  return reinterpret_cast<const Bits&>(x);
}
SEQCONV_INLINE const Vec<double>& of_bits(const Bits& x) {
  return reinterpret_cast<const Vec<double>&>(x);
}

// Adding it rounds to an integer, which the lowest bits then hold.
constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
constexpr double kFarPhase = 1 << 20;          // from here on libm reduces the phase

// exp(x) with a relative error of about 2e-16; 0 below -708.
SEQCONV_INLINE Vec<double> exp_of_lanes(Vec<double> x) {
  const Vec<double> shifted = x * 1.44269504088896338700 + splat(kMagic);
  const Vec<double> n = shifted - splat(kMagic);
  const Vec<double> r = x - n * 6.93147180369123816490e-01 - n * 1.90821492927058770002e-10;
  Vec<double> p = splat(1.0 / 6227020800.0);  // 1 / 13!
  constexpr double kTaylor13[] = {1.0,
                                  1.0,
                                  1.0 / 2,
                                  1.0 / 6,
                                  1.0 / 24,
                                  1.0 / 120,
                                  1.0 / 720,
                                  1.0 / 5040,
                                  1.0 / 40320,
                                  1.0 / 362880,
                                  1.0 / 3628800,
                                  1.0 / 39916800,
                                  1.0 / 479001600};
  SEQCONV_UNROLL
  for (int i = 12; i >= 0; --i) p = p * r + splat(kTaylor13[i]);
  p *= of_bits((bits_of(shifted) << 52) + (int64_t{1023} << 52));
  p = x < -708.0 ? Vec<double>{} : p;
  return x > 709.0 ? splat(__builtin_inf()) : p;
}

// Sine and cosine of |x| < kFarPhase, with an absolute error of about 2e-16 and that of x.
SEQCONV_INLINE void sine_cosine(Vec<double> x, Vec<double>& sine, Vec<double>& cosine) {
  const Vec<double> shifted = x * 0.63661977236758134308 + splat(kMagic);
  const Vec<double> n = shifted - splat(kMagic);
  // pi / 2 in three parts, of which 33 bits each make exact products.
  Vec<double> r = x - n * 1.57079632673412561417e+00;
  r = r - n * 6.07710050630396597660e-11 - n * 2.02226624879595063154e-21;
  const Vec<double> square = r * r;
  constexpr double kSine[] = {
      -1.0 / 6,        1.0 / 120,          -1.0 / 5040,           1.0 / 362880,
      -1.0 / 39916800, 1.0 / 6227020800.0, -1.0 / 1307674368000.0};
  constexpr double kCosine[] = {
      -1.0 / 2,       1.0 / 24,        -1.0 / 720,           1.0 / 40320,
      -1.0 / 3628800, 1.0 / 479001600, -1.0 / 87178291200.0, 1.0 / 20922789888000.0};
  Vec<double> s = splat(kSine[6]), c = splat(kCosine[7]);
  SEQCONV_UNROLL
  for (int i = 5; i >= 0; --i) s = s * square + splat(kSine[i]);
  SEQCONV_UNROLL
  for (int i = 6; i >= 0; --i) c = c * square + splat(kCosine[i]);
  s = r + r * (s * square);
  c = 1.0 + c * square;
  const Bits turns = bits_of(shifted);
  const Bits swapped = (turns & 1) != 0;
  sine = of_bits(bits_of(swapped ? c : s) ^ (turns & 2) << 62);
  cosine = of_bits(bits_of(swapped ? s : c) ^ ((turns + 1) & 2) << 62);
}

// As many pairs as lanes.
template <bool kFar>
SEQCONV_INLINE void exponentials_of_lanes(const double* from, double times, double* to) {
  constexpr int kPairs = kLanes<double>;
  const Vec<double> low = load_vector(from), high = load_vector(from + kPairs);
  const Vec<double> phase = shuffle<Unzip<1>, double>(low, high) * times;
  Vec<double> sine, cosine;
  if constexpr (kFar) {
    for (int lane = 0; lane < kPairs; ++lane) {
      sine[lane] = sin(phase[lane]);
      cosine[lane] = cos(phase[lane]);
    }
  } else {
    sine_cosine(phase, sine, cosine);
  }
  const Vec<double> size = exp_of_lanes(shuffle<Unzip<0>, double>(low, high) * times);
  const Vec<double> re = size * cosine, im = size * sine;
  store_vector(to, shuffle<Zip<0>, double>(re, im));
  store_vector(to + kPairs, shuffle<Zip<1>, double>(re, im));
}

template <bool kFar>
void exponentials_of_all(int64_t count, const double* from, double times, double* to) {
  constexpr int64_t kPairs = kLanes<double>;
  int64_t i = 0;
  for (; i + kPairs <= count; i += kPairs)
    exponentials_of_lanes<kFar>(from + 2 * i, times, to + 2 * i);
  if (i == count) return;
  double rest[2 * kPairs] = {};
  for (int64_t j = 2 * i; j < 2 * count; ++j) rest[j - 2 * i] = from[j];
  exponentials_of_lanes<kFar>(rest, times, rest);
  for (int64_t j = 2 * i; j < 2 * count; ++j) to[j] = rest[j - 2 * i];
}

// to[i] = exp(from[i] times), i < count, pairs of doubles.
inline void exponentials(int64_t count, const double* from, double times, double* to) {
  bool near = true;
  for (int64_t i = 0; i < count; ++i) {
    const double phase = from[2 * i + 1] * times;
    near &= phase < kFarPhase && phase > -kFarPhase;
  }
  near ? exponentials_of_all<false>(count, from, times, to)
       : exponentials_of_all<true>(count, from, times, to);
}

}  // namespace seqconv::SEQCONV_ISA
