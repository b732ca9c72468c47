#include "modes.h"

#include <cmath>
#include <complex>

#include "isa.h"
#include "parallel.h"

namespace seqconv {
namespace {

using Complex = std::complex<double>;
constexpr double kFloor = 1e-4;  // of Positive::kRelu
constexpr double kLinear = 20;   // from here on softplus is its argument, as torch has it
constexpr double kNear = 0.05;   // |a| below which quotients by a are power series
constexpr double kInverse[] = {0,       1,       1.0 / 2, 1.0 / 3, 1.0 / 4, 1.0 / 5,
                               1.0 / 6, 1.0 / 7, 1.0 / 8, 1.0 / 9, 1.0 / 10};
constexpr int kTerms = 10;         // of those
constexpr int64_t kSerial = 2048;  // modes: below, one thread does it all

// The compiler's operators look for infinities, and take three times as long.
Complex times(Complex x, Complex y) {
  return {x.real() * y.real() - x.imag() * y.imag(), x.real() * y.imag() + x.imag() * y.real()};
}
Complex over(Complex x, Complex y) {
  const double inverse = 1 / (y.real() * y.real() + y.imag() * y.imag());
  return inverse * times(x, std::conj(y));
}
// What the gradient of x y adds to that of a real y.
double real_dot(Complex x, Complex gradient) {
  return x.real() * gradient.real() + x.imag() * gradient.imag();
}

double softplus(double x) { return x > kLinear ? x : std::log1p(std::exp(x)); }
double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

double transformed(Positive kind, double x) {
  switch (kind) {
    case Positive::kExp:
      return std::exp(x);
    case Positive::kRelu:
      return x > 0 ? x + kFloor : x <= 0 ? kFloor : x;  // NaN stays
    case Positive::kSoftplus:
      return softplus(x);
    case Positive::kSigmoid:
      return sigmoid(x);
    case Positive::kNone:
      break;
  }
  return x;
}
// Of `value`, which is transformed(kind, x).
double slope(Positive kind, double x, double value) {
  switch (kind) {
    case Positive::kExp:
      return value;
    case Positive::kRelu:
      return x > 0;
    case Positive::kSoftplus:
      return x > kLinear ? 1 : sigmoid(x);
    case Positive::kSigmoid:
      return value * (1 - value);
    case Positive::kNone:
      break;
  }
  return 1;
}

// A function of a, and its derivative.
struct Differentiable {
  Complex value, slope;
};
// (exp(a) - 1) / a
Differentiable expm1_over(Complex a, Complex exponential) {
  if (std::abs(a.real()) < kNear && std::abs(a.imag()) < kNear) {
    Differentiable sum{1, 0};  // 1 + a/2 (1 + a/3 (...))
    for (int n = kTerms; n >= 2; --n) {
      sum.slope = (sum.value + times(sum.slope, a)) * kInverse[n];
      sum.value = 1.0 + times(sum.value, a) * kInverse[n];
    }
    return sum;
  }
  const Complex value = over(exponential - 1.0, a);
  return {value, over(exponential - value, a)};
}
// log((1 + a/2) / (1 - a/2)), whose real part would cancel as it stands
Differentiable bilinear_log(Complex a) {
  const double x = a.real(), y = a.imag();
  const double below = (1 - x / 2) * (1 - x / 2) + y * y / 4, least = -1 + 1e-16;
  const double ratio = 2 * x / below;
  const double size = 0.5 * std::log1p(ratio < least ? least : ratio);
  return {{size, std::atan2(y, 1 - (x * x + y * y) / 4)}, over(1.0, 1.0 - times(a, a) / 4.0)};
}

// A mode of a set, which several channels may have.
struct Pole {
  Complex A;
  double real_slope, imag_slope;  // of inv_A_real and inv_A_imag
};
// Everything about one mode of one channel that the weights of heads share.
struct Mode {
  double dt, dt_slope;         // of inv_dt
  Complex a, a_slope;          // slopes: of dt A
  Complex b_over_dt, b_slope;  // b over dt, and its slope
  Complex b_by_dt;             // derivative of b, of dt alone
  bool passes;                 // the band limit
};

// dt and its derivative, with the rate.
struct Step {
  double dt, slope;
  Step(const ModesProblem& p, int64_t at) {
    const double x = p.inv_dt[at], q = p.sinh ? std::sinh(x) : x;
    dt = p.rate * (p.softplus ? softplus(q) : std::exp(q));
    slope = p.softplus ? p.rate * (q > kLinear ? 1 : sigmoid(q)) : dt;
    if (p.sinh) slope *= std::cosh(x);
  }
};

Complex pair(const Numbers& t, int64_t at, bool real) {
  return real ? Complex(t[at], 0) : Complex(t[2 * at], t[2 * at + 1]);
}
void set_pair(double* t, int64_t at, bool real, Complex value) {
  if (real) {
    t[at] = value.real();
  } else {
    t[2 * at] = value.real();
    t[2 * at + 1] = value.imag();
  }
}

Pole pole_of(const ModesProblem& p, int64_t in_set) {
  const double re = p.inv_A_real[in_set], size = transformed(p.real_transform, re);
  Pole pole{-size, -slope(p.real_transform, re, size), 0};
  if (p.real) return pole;
  const double im = p.inv_A_imag[in_set], imag = transformed(p.imag_transform, im);
  pole.A.imag(imag);
  pole.imag_slope = slope(p.imag_transform, im, imag);
  return pole;
}

// z is dt A, whose exponential is needed unless bilinear.
Mode mode_of(const ModesProblem& p, const Step& step, const Pole& pole, Complex z,
             Complex exponential) {
  Mode m;
  m.dt = step.dt;
  m.dt_slope = step.slope;
  if (p.bilinear) {
    const Differentiable log = bilinear_log(z);
    m.a = log.value;
    m.a_slope = log.slope;
    m.b_over_dt = over(1.0, 1.0 - z / 2.0);
    m.b_by_dt = times(m.b_over_dt, m.b_over_dt);
    m.b_slope = m.b_by_dt / 2.0;
  } else {
    const Differentiable quotient = expm1_over(z, exponential);
    m.a = z;
    m.a_slope = 1;
    m.b_over_dt = quotient.value;
    m.b_slope = quotient.slope;
    m.b_by_dt = exponential;
  }
  const double turn = step.dt / p.rate * std::abs(pole.A.imag()) / (2 * M_PI);
  m.passes = std::isinf(p.band) || turn < p.band;
  return m;
}

// op(set, room) for every set, by several threads, with room for a channel's modes. A set's
// channels are one thread's, because gradients are added up over them.
struct Room {
  Pole* poles;
  Step* steps;
  Complex *z, *exponentials;
};
template <class Op>
Status for_each_set(const ModesProblem& p, const Op& op) {
  const int threads = p.channels * p.modes < kSerial ? 1 : threads_for(p.threads);
  const size_t count = static_cast<size_t>(p.modes);
  const size_t bytes = count * (sizeof(Pole) + sizeof(Step) + 2 * sizeof(Complex));
  return share_out(p.sets, threads, bytes, [&](int64_t set, char* memory, bool) {
    Room room;
    room.z = reinterpret_cast<Complex*>(memory);
    room.exponentials = room.z + p.modes;
    room.poles = reinterpret_cast<Pole*>(room.exponentials + p.modes);
    room.steps = reinterpret_cast<Step*>(room.poles + p.modes);
    op(set, room);
  });
}

// op(channel, n, pole, mode) for the modes of a set's channels, in their order.
template <class Op>
void for_each_mode(const ModesProblem& p, int64_t set, const Room& room, const Op& op) {
  for (int64_t n = 0; n < p.modes; ++n) room.poles[n] = pole_of(p, set * p.modes + n);
  for (int64_t h = set; h < p.channels; h += p.sets) {
    for (int64_t n = 0; n < p.modes; ++n) {
      room.steps[n] = p.tied && n ? room.steps[0] : Step(p, p.tied ? h : h * p.modes + n);
      room.z[n] = room.steps[n].dt * room.poles[n].A;
    }
    if (!p.bilinear)
      kernels().exponentials(p.modes, reinterpret_cast<const double*>(room.z), 1,
                             reinterpret_cast<double*>(room.exponentials));
    for (int64_t n = 0; n < p.modes; ++n)
      op(h, n, room.poles[n],
         mode_of(p, room.steps[n], room.poles[n], room.z[n], room.exponentials[n]));
  }
}

}  // namespace

Status modes_forward(const ModesProblem& p) {
  return for_each_set(p, [&](int64_t set, const Room& room) {
    for_each_mode(p, set, room, [&](int64_t h, int64_t n, const Pole&, const Mode& m) {
      const int64_t at = h * p.modes + n;
      p.a[2 * at] = m.a.real();
      p.a[2 * at + 1] = m.a.imag();
      const Complex B = pair(p.B, set * p.modes + n, p.real);
      const Complex weight = p.factor * m.dt * times(m.b_over_dt, B);
      for (int64_t c = 0; c < p.heads; ++c) {
        const int64_t i = c * p.channels * p.modes + at;
        const Complex w = m.passes ? times(weight, pair(p.C, i, p.real)) : 0.0;
        p.w[2 * i] = w.real();
        p.w[2 * i + 1] = w.imag();
      }
    });
  });
}

// With gradients as pairs, that of x in z = x y is the gradient of z times conj(y).
Status modes_backward(const ModesProblem& p) {
  return for_each_set(p, [&](int64_t set, const Room& room) {
    double dstep = 0;
    for_each_mode(p, set, room, [&](int64_t h, int64_t n, const Pole& pole, const Mode& m) {
      const int64_t at = h * p.modes + n, in_set = set * p.modes + n;
      const Complex B = pair(p.B, set * p.modes + n, p.real);
      const Complex weight = p.factor * m.dt * times(m.b_over_dt, B);
      Complex dweight = 0;  // of b B
      for (int64_t c = 0; c < p.heads; ++c) {
        const int64_t i = c * p.channels * p.modes + at;
        const Complex dw(p.w[2 * i], p.w[2 * i + 1]);
        set_pair(p.dC, i, p.real, m.passes ? times(dw, std::conj(weight)) : 0.0);
        if (m.passes) dweight += p.factor * times(dw, std::conj(pair(p.C, i, p.real)));
      }
      const Complex dB = times(dweight, std::conj(m.dt * m.b_over_dt));
      const Complex db = times(dweight, std::conj(B));
      const Complex da(p.a[2 * at], p.a[2 * at + 1]);
      const Complex da_dz = times(da, std::conj(m.a_slope));
      const Complex dz = da_dz + m.dt * times(db, std::conj(m.b_slope));
      const double ddt = real_dot(m.b_by_dt, db) + real_dot(pole.A, da_dz);
      if (h == set) {  // the first of the channels that share the set
        set_pair(p.dB, in_set, p.real, 0);
        p.dinv_A_real[in_set] = 0;
        if (!p.real) p.dinv_A_imag[in_set] = 0;
      }
      p.dB[p.real ? in_set : 2 * in_set] += dB.real();
      if (!p.real) p.dB[2 * in_set + 1] += dB.imag();
      p.dinv_A_real[in_set] += m.dt * dz.real() * pole.real_slope;
      if (!p.real) p.dinv_A_imag[in_set] += m.dt * dz.imag() * pole.imag_slope;
      dstep = (p.tied && n > 0 ? dstep : 0) + ddt * m.dt_slope;
      p.dinv_dt[p.tied ? h : at] = dstep;
    });
  });
}

}  // namespace seqconv
