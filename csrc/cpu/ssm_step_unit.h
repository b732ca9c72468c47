// A step of some rows of a state space model. It reads and writes every state once, and reads the
// tables of a channel once for a few samples: more bytes than that are what a step would cost.
#pragma once
#include "activations.h"
#include "dtypes.h"
#include "ssm_step.h"
#include "vectors.h"

namespace seqconv::SEQCONV_ISA {

// Of complex numbers side by side: the real part twice, the imaginary part twice, both exchanged.
struct RealTwice {
  static constexpr int at(int l, int) { return l & ~1; }
};
struct ImaginaryTwice {
  static constexpr int at(int l, int) { return l | 1; }
};
struct Exchanged {
  static constexpr int at(int l, int) { return l ^ 1; }
};

// 1 and -1 in turn: the signs of the real part of a product.
SEQCONV_INLINE Vec<double> signs() {
  Vec<double> x;
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = lane % 2 ? -1.0 : 1.0;
  return x;
}

// t[row, channel]
SEQCONV_INLINE double load_scalar(const Tensor& t, int64_t row, int64_t channel) {
  const int64_t at = row * t.stride[0] + channel * t.stride[1];
  double value = 0;
  dispatch(t.dtype, [&](auto tag) {
    using S = typename decltype(tag)::Type;
    value = static_cast<double>(widen(reinterpret_cast<const S*>(t.data)[at]));
  });
  return value;
}

// Steps the states of one channel of kSamples samples, `apart` doubles from each other, and sums up
// the output of the first head.
template <int kSamples>
SEQCONV_INLINE void advance(const SsmStepProblem& p, int64_t channel, double* state, int64_t apart,
                            const double* x, double* sums) {
  const int64_t count = 2 * p.modes, row = channel * count;
  const double *power = p.power + row, *input = p.input + row, *output = p.output + row;
  const Vec<double> sign = signs();
  Vec<double> sum[kSamples] = {};
  int64_t i = 0;
  for (; i + kLanes<double> <= count; i += kLanes<double>) {
    const Vec<double> z = load_vector(power + i), b = load_vector(input + i);
    const Vec<double> c = load_vector(output + i);
    const Vec<double> re = shuffle<RealTwice, double>(z, z);
    const Vec<double> im = shuffle<ImaginaryTwice, double>(z, z) * -sign;
    SEQCONV_UNROLL
    for (int s = 0; s < kSamples; ++s) {
      const Vec<double> old = load_vector(state + s * apart + i);
      const Vec<double> other = shuffle<Exchanged, double>(old, old);
      const Vec<double> now = re * old + (im * other + b * x[s]);
      store_vector(state + s * apart + i, now);
      sum[s] += c * now;
    }
  }
  SEQCONV_UNROLL
  for (int s = 0; s < kSamples; ++s) sums[s] = sum_by_halves<double>(sum[s] * sign);
  for (; i < count; i += 2) {
    SEQCONV_UNROLL
    for (int s = 0; s < kSamples; ++s) {
      double* at = state + s * apart + i;
      const double re = power[i] * at[0] + (input[i] * x[s] - power[i + 1] * at[1]);
      const double im = power[i] * at[1] + (input[i + 1] * x[s] + power[i + 1] * at[0]);
      at[0] = re;
      at[1] = im;
      sums[s] += output[i] * re - output[i + 1] * im;
    }
  }
}

// sum_n Re(output state) of another head, whose states are in the cache.
SEQCONV_INLINE double read_out(const double* output, const double* state, int64_t count) {
  Vec<double> sum = {};
  int64_t i = 0;
  for (; i + kLanes<double> <= count; i += kLanes<double>)
    sum += load_vector(output + i) * load_vector(state + i);
  double total = sum_by_halves<double>(sum * signs());
  for (; i < count; i += 2) total += output[i] * state[i] - output[i + 1] * state[i + 1];
  return total;
}

// `count` channels, as many as a vector of T has lanes or fewer, from `channel` on.
template <class T, int kSamples>
void step_block(const SsmStepProblem& p, int64_t batch, int64_t channel, int64_t count) {
  const int64_t row = 2 * p.modes, apart = p.channels * row;
  double* states = p.state + batch * apart + channel * row;
  double x[kLanes<T>][kSamples];
  for (int64_t j = 0; j < count; ++j)
    for (int s = 0; s < kSamples; ++s) x[j][s] = load_scalar(p.x, batch + s, channel + j);
  for (int64_t head = 0; head < p.heads; ++head) {
    T v[kSamples][kLanes<T>] = {};
    for (int64_t j = 0; j < count; ++j) {
      double sums[kSamples];
      if (head == 0) {
        advance<kSamples>(p, channel + j, states + j * row, apart, x[j], sums);
      } else {
        const double* output = p.output + (head * p.channels + channel + j) * row;
        for (int s = 0; s < kSamples; ++s)
          sums[s] = read_out(output, states + s * apart + j * row, row);
      }
      const double skip = load_scalar(p.skip, head, channel + j);
      for (int s = 0; s < kSamples; ++s) v[s][j] = static_cast<T>(sums[s] + skip * x[j][s]);
    }
    for (int s = 0; s < kSamples; ++s) {
      activate(p.activation, kLanes<T>, v[s], v[s]);
      dispatch(p.x.dtype, [&](auto tag) {
        using S = typename decltype(tag)::Type;
        S* y = reinterpret_cast<S*>(p.y) + ((batch + s) * p.heads + head) * p.channels + channel;
        for (int64_t j = 0; j < count; ++j) narrow(v[s][j], y[j]);
      });
    }
  }
}

template <class T, int kSamples>
SEQCONV_INLINE void step_samples(const SsmStepProblem& p, const SsmStepUnit& unit, int64_t batch) {
  for (int64_t h = unit.begin; h < unit.end; h += kLanes<T>) {
    const int64_t left = unit.end - h;
    step_block<T, kSamples>(p, batch, h, left < kLanes<T> ? left : kLanes<T>);
  }
}

constexpr int kTogether = 4;  // samples that one reading of the tables serves

template <class T>
void ssm_step_unit(const SsmStepProblem& p, const SsmStepUnit& unit) {
  int64_t b = unit.batch;
  for (; b + kTogether <= unit.batch_end; b += kTogether) step_samples<T, kTogether>(p, unit, b);
  for (; b < unit.batch_end; ++b) step_samples<T, 1>(p, unit, b);
}

}  // namespace seqconv::SEQCONV_ISA
