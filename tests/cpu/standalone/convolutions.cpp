// Convolutions and their gradients against direct sums in double.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "checks.h"
#include "cpu/exact.h"
#include "cpu/fftconv.h"

using seqconv::Problem;
using seqconv::Tensor;

namespace {

template <class T>
struct Run {
  int64_t batch = 2, channels = 3, length, taps, taps_rev;
  std::vector<T> u, k, k_rev, skip, dy, y, du, dk, dk_rev, dskip;
  double worst = 0;

  Tensor signal(std::vector<T>& x) const {
    return standalone::tensor(x, channels * length, length, 1);
  }
  Tensor kernel(std::vector<T>& x, int64_t count) const {
    return standalone::tensor(x, 0, count, 1);
  }
  void compare(const std::vector<T>& value, const std::vector<double>& wanted) {
    worst = std::fmax(worst, standalone::distance(value, wanted));
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
    p.skip = standalone::tensor(skip, 0, 1, 0);
    p.y = signal(y);
    p.dy = signal(dy);
    p.du = signal(du);
    p.dk = kernel(dk, taps);
    p.dk_rev = kernel(dk_rev, taps_rev);
    p.dskip = standalone::tensor(dskip, 0, 1, 0);
    if (seqconv::forward(p) != seqconv::Status::kOk) return HUGE_VAL;
    if (seqconv::backward(p) != seqconv::Status::kOk) return HUGE_VAL;

    std::vector<double> y64(y.size()), du64(y.size()), dk64(k.size()), dk_rev64(k_rev.size());
    std::vector<double> dskip64(skip.size());
    for (int64_t row = 0; row < batch * channels; ++row) {
      const int64_t c = row % channels;
      for (int64_t t = 0; t < length; ++t) {
        const auto at = static_cast<size_t>(row * length + t);
        dskip64[static_cast<size_t>(c)] += static_cast<double>(dy[at]) * static_cast<double>(u[at]);
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
    const auto compare_all = [&] {
      compare(y, y64);
      compare(du, du64);
      compare(dk, dk64);
      compare(dskip, dskip64);
    };
    compare_all();
    if (taps_rev) {
      compare(dk_rev, dk_rev64);
      return worst;
    }
    for (auto* x : {&y, &du, &dk, &dskip}) std::fill(x->begin(), x->end(), static_cast<T>(NAN));
    if (seqconv::exact_forward(p) != seqconv::Status::kOk) return HUGE_VAL;
    if (seqconv::exact_backward(p) != seqconv::Status::kOk) return HUGE_VAL;
    compare_all();
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
}  // namespace

bool standalone::convolutions() {
  bool fine = true;
  for (int64_t length : {1, 20, 33, 64, 100, 255, 256, 1000, 1792, 2048}) {
    for (int64_t taps : {length, length / 12 + 1}) {
      for (int64_t taps_rev : {int64_t{0}, taps - 1}) {
        fine = check<float>(length, taps, taps_rev, 6e-7) && fine;
        fine = check<double>(length, taps, taps_rev, 1e-14) && fine;
      }
    }
  }
  return fine;
}
