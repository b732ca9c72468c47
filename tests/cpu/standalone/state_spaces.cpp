// State space models: kernels, steps and gradients against their definitions.
#include <cmath>
#include <complex>
#include <cstdio>
#include <random>
#include <vector>

#include "checks.h"
#include "cpu/ssm.h"
#include "cpu/ssm_step.h"

namespace {

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
  using standalone::distance;
  const double gradients = std::fmax(distance(da, da64), distance(dw, dw64));
  const double worst = std::fmax(distance(k, k64), gradients);
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
  p.x = standalone::tensor(x, channels, 0, 0);
  p.skip = standalone::tensor(skip, channels, 0, 0);
  p.x.stride[1] = p.skip.stride[1] = 1;
  p.y = reinterpret_cast<char*>(y.data());
  const bool ok = seqconv::ssm_step(p) == seqconv::Status::kOk;
  const double* wanted = doubles(state64);
  const double error = standalone::distance(y, y64);
  const double of_state =
      standalone::distance(std::vector<double>(doubles(state), doubles(state) + 2 * state.size()),
                           std::vector<double>(wanted, wanted + 2 * state.size()));
  const bool fine = ok && error < limit && of_state < 1e-15;
  std::printf("%s ssm step, batch %ld, %3ld modes: %.1e, state %.1e%s\n",
              sizeof(T) == 4 ? "float " : "double", static_cast<long>(batch),
              static_cast<long>(modes), error, of_state, fine ? "" : "  WRONG");
  return fine;
}
}  // namespace

bool standalone::state_spaces() {
  bool fine = true;
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
  return fine;
}
