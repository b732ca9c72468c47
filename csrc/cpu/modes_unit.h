// The modes of a set, as many at a time as a vector has lanes; see modes.h for the problem.
#pragma once
#include "exponentials.h"
#include "modes.h"
#include "radix.h"

namespace seqconv::SEQCONV_ISA {

constexpr int kAtOnce = kLanes<double>;
using Reals = Vec<double>;
using Pairs = Complex<double>;

constexpr double kFloor = 1e-4;  // of Positive::kRelu
constexpr double kLinear = 20;   // from here on softplus is its argument, as torch has it
constexpr double kNear = 0.05;   // |a| below which quotients by a are power series
constexpr int kTerms = 10;       // of those
constexpr double kTurn = 6.28318530717958647693;

SEQCONV_INLINE Pairs conj(Pairs x) { return {x.re, -x.im}; }
SEQCONV_INLINE Pairs over(Pairs x, Pairs y) {
  const Reals inverse = 1.0 / (y.re * y.re + y.im * y.im);
  const Pairs product = x * conj(y);
  return {product.re * inverse, product.im * inverse};
}
SEQCONV_INLINE Pairs scaled(Pairs x, Reals by) { return {x.re * by, x.im * by}; }
// What the gradient of x y adds to that of a real y.
SEQCONV_INLINE Reals real_dot(Pairs x, Pairs gradient) {
  return x.re * gradient.re + x.im * gradient.im;
}
SEQCONV_INLINE Reals size_of(Reals x) { return x < 0.0 ? -x : x; }

template <class F>
SEQCONV_INLINE Reals each_lane(Reals x, const F& f) {
  for (int lane = 0; lane < kAtOnce; ++lane) x[lane] = f(x[lane]);
  return x;
}
SEQCONV_INLINE Reals sigmoid_of_lanes(Reals x) { return 1.0 / (1.0 + exp_of_lanes(-x)); }
SEQCONV_INLINE Reals softplus(Reals x) {
  const Reals soft = each_lane(exp_of_lanes(x), [](double e) { return log1p(e); });
  return x > kLinear ? x : soft;
}
SEQCONV_INLINE Pairs exponential(Pairs z) {
  Pairs turn;
  bool far = false;
  for (int lane = 0; lane < kAtOnce; ++lane)
    far |= !(z.im[lane] < kFarPhase && z.im[lane] > -kFarPhase);
  if (far) {
    turn.re = each_lane(z.im, [](double x) { return cos(x); });
    turn.im = each_lane(z.im, [](double x) { return sin(x); });
  } else {
    sine_cosine(z.im, turn.im, turn.re);
  }
  return scaled(turn, exp_of_lanes(z.re));
}

// Lanes beyond the last mode hold a number that no function minds.
struct Range {
  int64_t first;
  int count;
};
SEQCONV_INLINE Reals load(const Numbers& t, Range at) {
  if (t.dtype == Dtype::kFloat64 && at.count == kAtOnce)
    return load_vector(reinterpret_cast<const double*>(t.data) + at.first);
  Reals x = splat(0.5);
  if (t.dtype == Dtype::kFloat32 && at.count == kAtOnce) {
    using Narrow = VectorOf<float, kAtOnce / 4>;
    const float* from = reinterpret_cast<const float*>(t.data) + at.first;
    return __builtin_convertvector(*reinterpret_cast<const typename Narrow::Unaligned*>(from),
                                   Reals);
  }
  for (int lane = 0; lane < at.count; ++lane) x[lane] = t[at.first + lane];
  return x;
}
SEQCONV_INLINE Pairs load_pairs(const Numbers& t, Range at, bool real) {
  if (real) return {load(t, at), Reals{}};
  const int64_t first = 2 * at.first;
  const int low = 2 * at.count < kAtOnce ? 2 * at.count : kAtOnce;
  const Reals a = load(t, Range{first, low});
  const Reals b = load(t, Range{first + kAtOnce, 2 * at.count - low});
  return {shuffle<Unzip<0>, double>(a, b), shuffle<Unzip<1>, double>(a, b)};
}
SEQCONV_INLINE void store(double* to, Range at, Reals x) {
  if (at.count == kAtOnce) return store_vector(to + at.first, x);
  for (int lane = 0; lane < at.count; ++lane) to[at.first + lane] = x[lane];
}
SEQCONV_INLINE void store_pairs(double* to, Range at, bool real, Pairs x) {
  if (real) return store(to, at, x.re);
  const int64_t first = 2 * at.first;
  const int low = 2 * at.count < kAtOnce ? 2 * at.count : kAtOnce;
  store(to, Range{first, low}, shuffle<Zip<0>, double>(x.re, x.im));
  store(to, Range{first + kAtOnce, 2 * at.count - low}, shuffle<Zip<1>, double>(x.re, x.im));
}
SEQCONV_INLINE Numbers doubles(double* data) {
  return {reinterpret_cast<char*>(data), Dtype::kFloat64};
}

// A positive number of x, and its derivative.
SEQCONV_INLINE Reals transformed(Positive kind, Reals x, Reals& slope) {
  Reals value = x;
  slope = splat(1.0);
  switch (kind) {
    case Positive::kExp:
      return slope = exp_of_lanes(x);
    case Positive::kRelu:
      slope = x > 0.0 ? splat(1.0) : Reals{};
      value = x > 0.0 ? x + kFloor : x;
      return x <= 0.0 ? splat(kFloor) : value;  // NaN stays
    case Positive::kSoftplus:
      slope = x > kLinear ? splat(1.0) : sigmoid_of_lanes(x);
      return softplus(x);
    case Positive::kSigmoid:
      value = sigmoid_of_lanes(x);
      slope = value * (1.0 - value);
      return value;
    case Positive::kNone:
      break;
  }
  return value;
}

// A function of a, and its derivative.
struct Differentiable {
  Pairs value, slope;
};
// (exp(a) - 1) / a
SEQCONV_INLINE Differentiable expm1_over(Pairs a, Pairs exponential) {
  const Pairs one{splat(1.0), {}};
  Pairs series = one, series_slope{};  // 1 + a/2 (1 + a/3 (...))
  SEQCONV_UNROLL
  for (int n = kTerms; n >= 2; --n) {
    series_slope = scaled(series + series_slope * a, splat(1.0 / n));
    series = one + scaled(series * a, splat(1.0 / n));
  }
  const Pairs value = over(exponential - one, a), slope = over(exponential - value, a);
  const auto near = (size_of(a.re) < kNear) & (size_of(a.im) < kNear);
  return {{near ? series.re : value.re, near ? series.im : value.im},
          {near ? series_slope.re : slope.re, near ? series_slope.im : slope.im}};
}
// log((1 + a/2) / (1 - a/2)), whose real part would cancel as it stands
SEQCONV_INLINE Differentiable bilinear_log(Pairs a) {
  const Reals below = (1.0 - a.re * 0.5) * (1.0 - a.re * 0.5) + a.im * a.im * 0.25;
  const Reals ratio = 2.0 * a.re / below, least = splat(-1 + 1e-16);
  Pairs log{ratio < least ? least : ratio, a.im};
  const Reals along = 1.0 - (a.re * a.re + a.im * a.im) * 0.25;
  log.re = each_lane(log.re, [](double x) { return 0.5 * log1p(x); });
  for (int lane = 0; lane < kAtOnce; ++lane) log.im[lane] = atan2(a.im[lane], along[lane]);
  // The slope's square is bounded as the ratio is: at a = -2 there is none.
  const Pairs below_slope{1.0 - (a.re * a.re - a.im * a.im) * 0.25, a.re * a.im * -0.5};
  const Reals square = below_slope.re * below_slope.re + below_slope.im * below_slope.im;
  const Reals inverse = 1.0 / (square < 1.6e-15 ? splat(1.6e-15) : square);
  return {log, scaled(conj(below_slope), inverse)};
}

// dt and its derivative, with the rate.
struct Step {
  Reals dt, slope;
  Step(const ModesProblem& p, Reals x) {
    const Reals q = p.sinh ? each_lane(x, [](double v) { return sinh(v); }) : x;
    dt = p.rate * (p.softplus ? softplus(q) : exp_of_lanes(q));
    slope = dt;
    if (p.softplus) slope = p.rate * (q > kLinear ? splat(1.0) : sigmoid_of_lanes(q));
    if (p.sinh) slope *= each_lane(x, [](double v) { return cosh(v); });
  }
};

// Everything about the modes `here` of a channel that the weights of heads share.
struct Modes {
  Range here, in_set;  // of one number for each mode of every channel, and of every set
  Step step;
  Pairs A, a, a_slope;           // slopes of a: of dt A
  Reals real_slope, imag_slope;  // of inv_A_real and inv_A_imag
  Pairs b_over_dt, b_slope;      // b over dt, and its slope
  Pairs b_by_dt;                 // derivative of b, of dt alone
  Pairs B, weight;               // factor b B
  Reals passes;                  // the band limit: 1, or 0 where it does not

  Modes(const ModesProblem& p, int64_t channel, int64_t n, const Step* tied)
      : here(range(p, channel, n)),
        in_set(range(p, channel % p.sets, n)),
        step(tied ? *tied : Step(p, load(p.inv_dt, here))) {
    A.re = -transformed(p.real_transform, load(p.inv_A_real, in_set), real_slope);
    real_slope = -real_slope;
    A.im = imag_slope = Reals{};
    if (!p.real) A.im = transformed(p.imag_transform, load(p.inv_A_imag, in_set), imag_slope);
    const Pairs z = scaled(A, step.dt), one{splat(1.0), {}};
    if (p.bilinear) {
      const Differentiable log = bilinear_log(z);
      a = log.value;
      a_slope = log.slope;
      b_over_dt = over(one, one - scaled(z, splat(0.5)));
      b_by_dt = b_over_dt * b_over_dt;
      b_slope = scaled(b_by_dt, splat(0.5));
    } else {
      b_by_dt = exponential(z);
      const Differentiable quotient = expm1_over(z, b_by_dt);
      a = z;
      a_slope = one;
      b_over_dt = quotient.value;
      b_slope = quotient.slope;
    }
    passes = splat(1.0);
    if (p.band < __builtin_inf())
      passes = step.dt / p.rate * size_of(A.im) / kTurn < p.band ? passes : Reals{};
    B = load_pairs(p.B, in_set, p.real);
    weight = scaled(b_over_dt * B, p.factor * step.dt);
  }

  static Range range(const ModesProblem& p, int64_t row, int64_t n) {
    return {row * p.modes + n, static_cast<int>(p.modes - n < kAtOnce ? p.modes - n : kAtOnce)};
  }
  Range of_head(const ModesProblem& p, int64_t c) const {
    return {c * p.channels * p.modes + here.first, here.count};
  }
  // x, or 0 whatever x is.
  Pairs passed(Pairs x) const {
    return {passes > 0.0 ? x.re : Reals{}, passes > 0.0 ? x.im : Reals{}};
  }
};

// op(modes, channel) for the modes of a set's channels.
template <class Op>
SEQCONV_INLINE void for_each_group(const ModesProblem& p, int64_t set, const Op& op) {
  for (int64_t h = set; h < p.channels; h += p.sets) {
    const Step tied(p, splat(p.tied ? p.inv_dt[h] : 0.0));
    for (int64_t n = 0; n < p.modes; n += kAtOnce)
      op(Modes(p, h, n, p.tied ? &tied : nullptr), h, n);
  }
}

inline void modes_forward_unit(const ModesProblem& p, int64_t set) {
  for_each_group(p, set, [&](const Modes& m, int64_t, int64_t) {
    store_pairs(p.a, m.here, false, m.a);
    for (int64_t c = 0; c < p.heads; ++c) {
      const Range at = m.of_head(p, c);
      store_pairs(p.w, at, false, m.passed(m.weight * load_pairs(p.C, at, p.real)));
    }
  });
}

// With gradients as pairs, that of x in z = x y is the gradient of z times conj(y).
inline void modes_backward_unit(const ModesProblem& p, int64_t set) {
  for_each_group(p, set, [&](const Modes& m, int64_t h, int64_t n) {
    Pairs dweight{};  // of b B
    for (int64_t c = 0; c < p.heads; ++c) {
      const Range at = m.of_head(p, c);
      const Pairs dw = load_pairs(doubles(p.w), at, false);
      store_pairs(p.dC, at, p.real, m.passed(dw * conj(m.weight)));
      const Pairs from_head = m.passed(dw * conj(load_pairs(p.C, at, p.real)));
      dweight = dweight + scaled(from_head, splat(p.factor));
    }
    const Pairs da_dz = load_pairs(doubles(p.a), m.here, false) * conj(m.a_slope);
    const Pairs db = dweight * conj(m.B);
    const Pairs dz = da_dz + scaled(db * conj(m.b_slope), m.step.dt);
    Pairs dB = dweight * conj(scaled(m.b_over_dt, m.step.dt));
    Reals dreal = m.step.dt * dz.re * m.real_slope, dimag = m.step.dt * dz.im * m.imag_slope;
    if (h != set) {  // not the first of the channels that share the set
      dB = dB + load_pairs(doubles(p.dB), m.in_set, p.real);
      dreal += load(doubles(p.dinv_A_real), m.in_set);
      if (!p.real) dimag += load(doubles(p.dinv_A_imag), m.in_set);
    }
    store_pairs(p.dB, m.in_set, p.real, dB);
    store(p.dinv_A_real, m.in_set, dreal);
    if (!p.real) store(p.dinv_A_imag, m.in_set, dimag);
    const Reals dstep = (real_dot(m.b_by_dt, db) + real_dot(m.A, da_dz)) * m.step.slope;
    if (!p.tied) return store(p.dinv_dt, m.here, dstep);
    double sum = n ? p.dinv_dt[h] : 0;
    for (int lane = 0; lane < m.here.count; ++lane) sum += dstep[lane];
    p.dinv_dt[h] = sum;
  });
}

}  // namespace seqconv::SEQCONV_ISA
