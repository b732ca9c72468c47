// The CPU kernels without Python or torch, against direct sums in double: for
// machines that are reached by a cross compiler and an emulator only. Prints
// the worst relative errors.
#include <cmath>
#include <complex>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/butterfly.h"
#include "cpu/exact.h"
#include "cpu/fftconv.h"
#include "cpu/isa.h"
#include "cpu/real_part.h"
#include "cpu/ssm.h"
#include "cpu/ssm_step.h"

using seqconv::Dtype;
using seqconv::Problem;
using seqconv::Tensor;

namespace {

template <class T>
struct Run {
  int64_t batch = 2, channels = 3, length, taps, taps_rev;
  std::vector<T> u, k, k_rev, skip, dy, y, du, dk, dk_rev, dskip;
  double worst = 0;

  Tensor signal(std::vector<T>& x) const { return tensor(x, channels * length, length, 1); }
  Tensor kernel(std::vector<T>& x, int64_t count) const { return tensor(x, 0, count, 1); }
  static Tensor tensor(std::vector<T>& x, int64_t b, int64_t c, int64_t t) {
    Tensor result;
    if (x.empty()) return result;
    result.data = reinterpret_cast<char*>(x.data());
    result.dtype = sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kFloat64;
    const int64_t stride[] = {b, 0, c, t};
    std::memcpy(result.stride, stride, sizeof stride);
    return result;
  }

  void compare(const std::vector<T>& value, const std::vector<double>& wanted) {
    double error = 0, norm = 0;
    for (size_t i = 0; i < wanted.size(); ++i) {
      error += std::pow(static_cast<double>(value[i]) - wanted[i], 2);
      norm += wanted[i] * wanted[i];
    }
    worst = std::fmax(worst, std::sqrt(error / std::fmax(norm, 1e-300)));
  }

  double operator()() {
    std::mt19937 random(1);
    std::normal_distribution<double> normal;
    const auto fill = [&](std::vector<T>& x, int64_t count) {
      x.resize(static_cast<size_t>(count));
      for (T& value : x) value = static_cast<T>(normal(random));
    };
    const int64_t rows = batch * channels * length;
    for (auto* x : {&u, &dy, &y, &du}) fill(*x, rows);
    for (auto* x : {&k, &dk}) fill(*x, channels * taps);
    for (auto* x : {&k_rev, &dk_rev}) fill(*x, channels * taps_rev);
    for (auto* x : {&skip, &dskip}) fill(*x, channels);
    Problem p{};
    p.batch = batch;
    p.heads = 1;
    p.channels = channels;
    p.length = length;
    p.taps = taps;
    p.taps_rev = taps_rev;
    p.compute_double = sizeof(T) == 8;
    p.threads = 1;
    p.u = signal(u);
    p.k = kernel(k, taps);
    p.k_rev = kernel(k_rev, taps_rev);
    p.skip = tensor(skip, 0, 1, 0);
    p.y = signal(y);
    p.dy = signal(dy);
    p.du = signal(du);
    p.dk = kernel(dk, taps);
    p.dk_rev = kernel(dk_rev, taps_rev);
    p.dskip = tensor(dskip, 0, 1, 0);
    if (seqconv::forward(p) != seqconv::Status::kOk) return HUGE_VAL;
    if (seqconv::backward(p) != seqconv::Status::kOk) return HUGE_VAL;

    std::vector<double> y64(y.size()), du64(y.size()), dk64(k.size()), dk_rev64(k_rev.size());
    for (int64_t row = 0; row < batch * channels; ++row) {
      const int64_t c = row % channels;
      for (int64_t t = 0; t < length; ++t) {
        for (int64_t s = 0; s < length; ++s) {
          const int64_t lag = t - s;
          if (lag >= taps || -lag > taps_rev) continue;
          const auto to = static_cast<size_t>(row * length + t);
          const auto from = static_cast<size_t>(row * length + s);
          const auto tap = static_cast<size_t>(lag >= 0 ? c * taps + lag : c * taps_rev - lag - 1);
          double weight = static_cast<double>(lag >= 0 ? k[tap] : k_rev[tap]);
          if (lag == 0) weight += static_cast<double>(skip[static_cast<size_t>(c)]);
          y64[to] += weight * static_cast<double>(u[from]);
          du64[from] += weight * static_cast<double>(dy[to]);
          (lag >= 0 ? dk64 : dk_rev64)[tap] +=
              static_cast<double>(dy[to]) * static_cast<double>(u[from]);
        }
      }
    }
    compare(y, y64);
    compare(du, du64);
    compare(dk, dk64);
    if (taps_rev) {
      compare(dk_rev, dk_rev64);
      return worst;
    }
    if (seqconv::exact_forward(p) != seqconv::Status::kOk) return HUGE_VAL;
    if (seqconv::exact_backward(p) != seqconv::Status::kOk) return HUGE_VAL;
    compare(y, y64);
    compare(du, du64);
    compare(dk, dk64);
    return worst;
  }
};

template <class T>
bool check(int64_t length, int64_t taps, int64_t taps_rev, double limit) {
  Run<T> run{};
  run.length = length;
  run.taps = taps;
  run.taps_rev = taps_rev;
  const double worst = run();
  const bool fine = worst < limit;
  std::printf("%s length %5ld taps %5ld + %5ld: %.1e%s\n", sizeof(T) == 4 ? "float " : "double",
              static_cast<long>(length), static_cast<long>(taps), static_cast<long>(taps_rev),
              worst, fine ? "" : "  WRONG");
  return fine;
}

// A state space model's kernel and its gradient against their definition.
template <class T>
bool check_ssm(int64_t heads, int64_t modes, int64_t length, double limit) {
  using Complex = std::complex<double>;
  const int64_t channels = 2;
  std::mt19937 random(2);
  std::normal_distribution<double> normal;
  std::vector<double> a(static_cast<size_t>(2 * channels * modes)), da(a.size());
  std::vector<double> w(static_cast<size_t>(2 * heads * channels * modes)), dw(w.size());
  std::vector<T> k(static_cast<size_t>(heads * channels * length)), dk(k.size());
  for (size_t i = 0; i < a.size(); i += 2) {
    a[i] = -1e-3 * std::fabs(normal(random));
    a[i + 1] = normal(random);
  }
  for (double& x : w) x = normal(random);
  for (T& x : dk) x = static_cast<T>(normal(random));
  seqconv::SsmProblem p{};
  p.heads = heads;
  p.channels = channels;
  p.modes = modes;
  p.length = length;
  p.single = sizeof(T) == 4;
  p.threads = 1;
  p.a = a.data();
  p.w = w.data();
  p.k = reinterpret_cast<char*>(k.data());
  p.dk = reinterpret_cast<const char*>(dk.data());
  p.dk_stride[0] = channels * length;
  p.dk_stride[1] = length;
  p.dk_stride[2] = 1;
  p.da = da.data();
  p.dw = dw.data();
  const bool ok = seqconv::ssm_forward(p) == seqconv::Status::kOk &&
                  seqconv::ssm_backward(p) == seqconv::Status::kOk;
  std::vector<double> k64(k.size()), da64(a.size()), dw64(w.size());
  for (int64_t row = 0; row < heads * channels; ++row) {
    for (int64_t n = 0; n < modes; ++n) {
      const auto from = static_cast<size_t>(2 * (row % channels * modes + n));
      const auto to = static_cast<size_t>(2 * (row * modes + n));
      const Complex rate(a[from], a[from + 1]), weight(w[to], w[to + 1]);
      Complex zero, one;
      for (int64_t l = 0; l < length; ++l) {
        const auto at = static_cast<size_t>(row * length + l);
        const Complex e = std::exp(rate * static_cast<double>(l));
        k64[at] += (weight * e).real();
        zero += static_cast<double>(dk[at]) * e;
        one += static_cast<double>(l) * static_cast<double>(dk[at]) * e;
      }
      dw64[to] = zero.real();
      dw64[to + 1] = -zero.imag();
      da64[from] += (weight * one).real();
      da64[from + 1] -= (weight * one).imag();
    }
  }
  Run<T> run{};
  run.compare(k, k64);
  const auto distance = [](const std::vector<double>& x, const std::vector<double>& y) {
    double error = 0, norm = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      error += (x[i] - y[i]) * (x[i] - y[i]);
      norm += y[i] * y[i];
    }
    return std::sqrt(error / std::fmax(norm, 1e-300));
  };
  const double worst = std::fmax(run.worst, std::fmax(distance(da, da64), distance(dw, dw64)));
  const bool fine = ok && worst < limit;
  std::printf("%s ssm, %ld heads, %3ld modes, length %5ld: %.1e%s\n",
              sizeof(T) == 4 ? "float " : "double", static_cast<long>(heads),
              static_cast<long>(modes), static_cast<long>(length), worst, fine ? "" : "  WRONG");
  return fine;
}

// A step of a state space model, and the state after it, against their definition.
template <class T>
bool check_ssm_step(int64_t batch, int64_t modes, double limit) {
  using Complex = std::complex<double>;
  const int64_t heads = 2, channels = 19;
  std::mt19937 random(3);
  std::normal_distribution<double> normal;
  const auto complex = [&](int64_t count) {
    std::vector<Complex> x(static_cast<size_t>(count));
    for (Complex& value : x) value = {normal(random), normal(random)};
    return x;
  };
  const auto real = [&](int64_t count) {
    std::vector<T> x(static_cast<size_t>(count));
    for (T& value : x) value = static_cast<T>(normal(random));
    return x;
  };
  std::vector<Complex> state = complex(batch * channels * modes), power = complex(channels * modes);
  const std::vector<Complex> input = complex(channels * modes);
  const std::vector<Complex> output = complex(heads * channels * modes);
  std::vector<T> x = real(batch * channels), skip = real(heads * channels);
  std::vector<T> y(static_cast<size_t>(batch * heads * channels));
  std::vector<Complex> state64 = state;
  std::vector<double> y64(y.size());
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < heads * channels; ++i) {
      const int64_t h = i % channels;
      const double now = static_cast<double>(x[static_cast<size_t>(b * channels + h)]);
      double v = static_cast<double>(skip[static_cast<size_t>(i)]) * now;
      for (int64_t n = 0; n < modes; ++n) {
        const auto at = static_cast<size_t>((b * channels + h) * modes + n);
        const auto table = static_cast<size_t>(h * modes + n);
        if (i < channels) state64[at] = power[table] * state64[at] + input[table] * now;
        v += (output[static_cast<size_t>(i * modes + n)] * state64[at]).real();
      }
      y64[static_cast<size_t>(b * heads * channels + i)] = std::fmax(v, 0.0);
    }
  }
  const auto doubles = [](const std::vector<Complex>& z) {
    return reinterpret_cast<const double*>(z.data());
  };
  seqconv::SsmStepProblem p{};
  p.batch = batch;
  p.heads = heads;
  p.channels = channels;
  p.modes = modes;
  p.activation = seqconv::Activation::kRelu;
  p.threads = 1;
  p.state = reinterpret_cast<double*>(state.data());
  p.power = doubles(power);
  p.input = doubles(input);
  p.output = doubles(output);
  p.x = Run<T>::tensor(x, channels, 0, 0);
  p.skip = Run<T>::tensor(skip, channels, 0, 0);
  p.x.stride[1] = p.skip.stride[1] = 1;
  p.y = reinterpret_cast<char*>(y.data());
  const bool ok = seqconv::ssm_step(p) == seqconv::Status::kOk;
  Run<T> run{};
  run.compare(y, y64);
  Run<double> states{};
  const double* wanted = doubles(state64);
  states.compare(std::vector<double>(doubles(state), doubles(state) + 2 * state.size()),
                 std::vector<double>(wanted, wanted + 2 * state.size()));
  const bool fine = ok && run.worst < limit && states.worst < 1e-15;
  std::printf("%s ssm step, batch %ld, %3ld modes: %.1e, state %.1e%s\n",
              sizeof(T) == 4 ? "float " : "double", static_cast<long>(batch),
              static_cast<long>(modes), run.worst, states.worst, fine ? "" : "  WRONG");
  return fine;
}

// The learned butterfly against its passes written out. Its gradients by
// identities: z is linear in x and, for every matrix, homogeneous of as many
// degrees as it has passes.
template <class T>
bool check_butterfly(int64_t n, int64_t length, double limit) {
  using Complex = std::complex<double>;
  std::mt19937 random(3);
  std::normal_distribution<double> normal;
  std::vector<int64_t> radices;
  for (int64_t rest = n; rest > 1; rest /= radices.back())
    radices.push_back(rest % 16 == 0 ? 16 : rest);
  seqconv::ButterflyProblem p{};
  p.batch = 3;
  p.channels = 4;
  p.length = length;
  p.heads = 2;
  p.n = n;
  p.compute_double = sizeof(T) == 8;
  p.threads = 1;
  const auto some = [&](int64_t count) {
    std::vector<T> out(static_cast<size_t>(count));
    for (T& value : out) value = static_cast<T>(normal(random));
    return out;
  };
  const int64_t rows = p.batch * p.channels;
  std::vector<T> x = some(rows * length), matrices = some(2 * p.heads * p.elements()),
                 dz = some(2 * rows * n), z(dz.size()), dx(x.size()), dmatrices(matrices.size()),
                 twiddles(1);
  const auto twiddle = [](int64_t p, int64_t j, int64_t radix, int64_t s) {
    return std::polar(1.0, -2 * M_PI * static_cast<double>(p * j) / static_cast<double>(radix * s));
  };
  for (int64_t d = 0, s = n; d + 1 < static_cast<int64_t>(radices.size()); ++d) {
    const int64_t radix = radices[static_cast<size_t>(d)];
    s /= radix;
    if (d == 0) twiddles.clear();
    for (const bool imaginary : {false, true})
      for (int64_t e = 0; e < s * radix; ++e) {
        const Complex w = twiddle(e % radix, e / radix, radix, s);
        twiddles.push_back(static_cast<T>(imaginary ? w.imag() : w.real()));
      }
  }
  const auto tensor = [&](std::vector<T>& of) {
    seqconv::Tensor t;
    t.data = reinterpret_cast<char*>(of.data());
    t.dtype = sizeof(T) == 8 ? seqconv::Dtype::kFloat64 : seqconv::Dtype::kFloat32;
    t.stride[0] = p.channels * length;
    t.stride[2] = length;
    t.stride[3] = 1;
    return t;
  };
  p.x = tensor(x);
  p.dx = tensor(dx);
  p.matrices = reinterpret_cast<const char*>(matrices.data());
  p.twiddles = reinterpret_cast<const char*>(twiddles.data());
  p.z = reinterpret_cast<char*>(z.data());
  p.dz = reinterpret_cast<const char*>(dz.data());
  p.dmatrices = reinterpret_cast<char*>(dmatrices.data());
  const bool ok = seqconv::butterfly_forward(p) == seqconv::Status::kOk &&
                  seqconv::butterfly_backward(p) == seqconv::Status::kOk;
  double error = 0, norm = 0;
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<Complex> now(static_cast<size_t>(n)), next(now.size());
    for (int64_t t = 0; t < length; ++t)
      now[static_cast<size_t>(t)] = static_cast<double>(x[static_cast<size_t>(row * length + t)]);
    int64_t b = 1, s = n;
    for (const int64_t radix : radices) {
      s /= radix;
      const int64_t first = (row % p.channels / 2 * p.elements() +
                             (radix == radices[0] ? 0 : radices[0] * radices[0])) *
                            2;
      for (int64_t j = 0; j < s; ++j)
        for (int64_t q = 0; q < radix; ++q)
          for (int64_t m = 0; m < b; ++m) {
            Complex sum;
            for (int64_t i = 0; i < radix; ++i) {
              const auto at = static_cast<size_t>(first + 2 * (q * radix + i));
              sum += Complex(static_cast<double>(matrices[at]),
                             static_cast<double>(matrices[at + 1])) *
                     now[static_cast<size_t>((i * s + j) * b + m)];
            }
            next[static_cast<size_t>((j * radix + q) * b + m)] = sum * twiddle(q, j, radix, s);
          }
      now.swap(next);
      b *= radix;
    }
    for (int64_t f = 0; f < n; ++f) {
      const auto at = static_cast<size_t>(2 * (row * n + f));
      error += std::norm(now[static_cast<size_t>(f)] -
                         Complex(static_cast<double>(z[at]), static_cast<double>(z[at + 1])));
      norm += std::norm(now[static_cast<size_t>(f)]);
    }
  }
  const auto dot = [](const std::vector<T>& a, const std::vector<T>& b) {
    double sum = 0;
    for (size_t i = 0; i < a.size(); ++i)
      sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
    return sum;
  };
  // near to one in units of the largest that dot(z, dz) can be
  const double wanted = dot(z, dz), size = std::sqrt(dot(z, z) * dot(dz, dz));
  const double passes = static_cast<double>(radices.size());
  const double worst = std::fmax(std::sqrt(error / norm),
                                 std::fmax(std::fabs(dot(x, dx) - wanted),
                                           std::fabs(dot(matrices, dmatrices) - passes * wanted)) /
                                     size);
  const bool fine = ok && worst < limit;
  std::printf("%s butterfly, %5ld points, length %5ld: %.1e%s\n",
              sizeof(T) == 4 ? "float " : "double", static_cast<long>(n), static_cast<long>(length),
              worst, fine ? "" : "  WRONG");
  return fine;
}

// The real part of a product of spectra against its definition; its gradients by an identity: half
// is linear in u and in k. In the sum over a half spectrum, numbers but the first and the last
// stand for two.
template <class T>
bool check_real_part(int64_t n, double limit) {
  using Complex = std::complex<double>;
  std::mt19937 random(4);
  std::normal_distribution<double> normal;
  seqconv::RealPartProblem p{};
  p.batch = 3;
  p.heads = 2;
  p.channels = 2;
  p.n = n;
  p.compute_double = sizeof(T) == 8;
  p.threads = 1;
  p.u_stride = p.k_stride = 2 * n * p.channels;
  std::vector<T> u(static_cast<size_t>(p.batch * p.u_stride)), du(u.size());
  std::vector<T> k(static_cast<size_t>(p.heads * p.k_stride)), dk(k.size());
  std::vector<T> half(static_cast<size_t>(p.batch * p.heads * p.channels * (n + 2)));
  for (std::vector<T>* t : {&u, &k})
    for (T& value : *t) value = static_cast<T>(normal(random));
  p.u = u.data();
  p.k = k.data();
  p.half = half.data();
  p.du = du.data();
  p.dk = dk.data();
  bool ok = seqconv::real_part_forward(p) == seqconv::Status::kOk;
  const auto number = [](const std::vector<T>& t, int64_t i) {
    return Complex(static_cast<double>(t[static_cast<size_t>(2 * i)]),
                   static_cast<double>(t[static_cast<size_t>(2 * i + 1)]));
  };
  double error = 0, norm = 0, energy = 0;
  for (int64_t row = 0; row < p.batch * p.heads * p.channels; ++row) {
    const int64_t d = row % p.channels, c = row / p.channels % p.heads;
    const int64_t b = row / p.channels / p.heads;
    const auto term = [&](int64_t j) {
      return number(u, (b * p.channels + d) * n + j % n) *
             number(k, (c * p.channels + d) * n + j % n);
    };
    for (int64_t j = 0; j <= n / 2; ++j) {
      const Complex wanted = 0.5 * (term(j) + std::conj(term(n - j)));
      const Complex found = number(half, row * (n / 2 + 1) + j);
      error += std::norm(wanted - found);
      norm += std::norm(wanted);
      energy += (j == 0 || j == n / 2 ? 1 : 2) * std::norm(found);
    }
  }
  ok = seqconv::real_part_backward(p) == seqconv::Status::kOk && ok;
  const auto dot = [](const std::vector<T>& a, const std::vector<T>& b) {
    double sum = 0;
    for (size_t i = 0; i < a.size(); ++i)
      sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
    return sum;
  };
  energy /= static_cast<double>(n);
  const double worst =
      std::fmax(std::sqrt(error / norm),
                std::fmax(std::fabs(dot(u, du) - energy), std::fabs(dot(k, dk) - energy)) / energy);
  const bool fine = ok && worst < limit;
  std::printf("%s real part, %5ld points: %.1e%s\n", sizeof(T) == 4 ? "float " : "double",
              static_cast<long>(n), worst, fine ? "" : "  WRONG");
  return fine;
}

}  // namespace

int main() {
  std::printf("instruction set: %s\n", seqconv::isa());
  bool fine = true;
  for (int64_t length : {1, 20, 33, 64, 100, 255, 256, 1000, 1792, 2048}) {
    for (int64_t taps : {length, length / 12 + 1}) {
      for (int64_t taps_rev : {int64_t{0}, taps - 1}) {
        fine = check<float>(length, taps, taps_rev, 6e-7) && fine;
        fine = check<double>(length, taps, taps_rev, 1e-14) && fine;
      }
    }
  }
  for (int64_t length : {2, 13, 100, 3000}) {
    for (int64_t modes : {1, 9, 40}) {
      fine = check_ssm<float>(2, modes, length, 1e-6) && fine;
      fine = check_ssm<double>(2, modes, length, 3e-12) && fine;
    }
  }
  for (int64_t batch : {1, 6}) {
    for (int64_t modes : {1, 5, 32}) {
      fine = check_ssm_step<float>(batch, modes, 2e-7) && fine;
      fine = check_ssm_step<double>(batch, modes, 1e-15) && fine;
    }
  }
  for (int64_t n : {16, 32, 64, 128, 256, 2048}) {
    for (int64_t length : {n, n / 2 + 1, int64_t{1}}) {
      fine = check_butterfly<float>(n, length, 1e-6) && fine;
      fine = check_butterfly<double>(n, length, 1e-14) && fine;
    }
  }
  for (int64_t n : {2, 6, 16, 66, 256, 2048}) {
    fine = check_real_part<float>(n, 1e-6) && fine;
    fine = check_real_part<double>(n, 1e-14) && fine;
  }
  return fine ? 0 : 1;
}
