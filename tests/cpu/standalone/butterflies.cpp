// Learned butterflies, and the real part of a product of their spectra.
#include <cmath>
#include <complex>
#include <cstdio>
#include <random>
#include <vector>

#include "checks.h"
#include "cpu/butterfly.h"
#include "cpu/real_part.h"

namespace {

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
  const double worst =
      standalone::largest({std::sqrt(error / norm), std::fabs(dot(x, dx) - wanted) / size,
                           std::fabs(dot(matrices, dmatrices) - passes * wanted) / size});
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
      standalone::largest({std::sqrt(error / norm), std::fabs(dot(u, du) - energy) / energy,
                           std::fabs(dot(k, dk) - energy) / energy});
  const bool fine = ok && worst < limit;
  std::printf("%s real part, %5ld points: %.1e%s\n", sizeof(T) == 4 ? "float " : "double",
              static_cast<long>(n), worst, fine ? "" : "  WRONG");
  return fine;
}
}  // namespace

bool standalone::butterflies() {
  bool fine = true;
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
  return fine;
}
