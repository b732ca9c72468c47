// Short kernels as the sums they are, without transforms.
#pragma once
#include "work.h"

namespace seqconv::SEQCONV_ISA {

constexpr int64_t kDirectChunk = 256;

// out[i] (+)= sum_j kk[j] x[i + width - 1 - j], or, flipped, sum_j kk[j] x[i + j]; i <
// kDirectChunk.
template <bool kFlipped, class T>
void direct_chunk(const T* kk, int64_t width, const T* x, T* out, bool add) {
  constexpr int kAtOnce = 4;
  for (int64_t i = 0; i < kDirectChunk; i += kAtOnce * kLanes<T>) {
    Vec<T> acc[kAtOnce];
    SEQCONV_UNROLL
    for (int v = 0; v < kAtOnce; ++v)
      acc[v] = add ? load_vector(out + i + v * kLanes<T>) : Vec<T>{};
    for (int64_t j = 0; j < width; ++j) {
      const Vec<T> tap = splat(kk[j]);
      const T* from = x + i + (kFlipped ? j : width - 1 - j);
      SEQCONV_UNROLL
      for (int v = 0; v < kAtOnce; ++v) acc[v] += tap * load_vector(from + v * kLanes<T>);
    }
    SEQCONV_UNROLL
    for (int v = 0; v < kAtOnce; ++v) store_vector(out + i + v * kLanes<T>, acc[v]);
  }
}

// sum_i a[i] b[i], i < n
template <class T>
double dot(const T* a, const T* b, int64_t n) {
  const auto product = [=](int64_t i) { return load_vector(a + i) * load_vector(b + i); };
  Vec<T> acc[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes<T> <= n; i += 4 * kLanes<T>) {
    SEQCONV_UNROLL
    for (int v = 0; v < 4; ++v) acc[v] += product(i + v * kLanes<T>);
  }
  for (; i + kLanes<T> <= n; i += kLanes<T>) acc[0] += product(i);
  T rest = 0;
  for (; i < n; ++i) rest += a[i] * b[i];
  return static_cast<double>(rest) + sum_by_halves<T>((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// sum_i a[i], i < n
template <class T>
double total(const T* a, int64_t n) {
  Vec<T> acc[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes<T> <= n; i += 4 * kLanes<T>) {
    SEQCONV_UNROLL
    for (int v = 0; v < 4; ++v) acc[v] += load_vector(a + i + v * kLanes<T>);
  }
  for (; i + kLanes<T> <= n; i += kLanes<T>) acc[0] += load_vector(a + i);
  T rest = 0;
  for (; i < n; ++i) rest += a[i];
  return static_cast<double>(rest) + sum_by_halves<T>((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

constexpr int64_t kDirectWindow = kDirectChunk + kDirectTaps;

template <class T>
void direct_forward(const Work<T>& w, const T* kk, const Source<T>& in, const Sink<T>& sink) {
  alignas(64) T window[kDirectWindow], staging[kDirectChunk];
  for (int64_t t = 0; t < in.length; t += kDirectChunk) {
    const int64_t n = in.length - t < kDirectChunk ? in.length - t : kDirectChunk;
    const T* x = in.window(t + w.reach + 1 - w.width, kDirectChunk + w.width - 1, window);
    T* direct = sink.find(t, kDirectChunk);
    direct_chunk<false, T>(kk, w.width, x, direct ? direct : staging, false);
    if (!direct) sink.take_all(t, n, staging);
  }
}

// dots[j] += sum_t dv[t] x[t + reach - j]
template <class T>
void direct_dots(const Work<T>& w, const Source<T>& in, const Source<T>& grad, double* dots) {
  alignas(64) T window[kDirectWindow], staging[kDirectChunk];
  for (int64_t t = 0; t < in.length; t += kDirectChunk) {
    const int64_t n = in.length - t < kDirectChunk ? in.length - t : kDirectChunk;
    const T* x = in.window(t + w.reach + 1 - w.width, kDirectChunk + w.width - 1, window);
    const T* dv = grad.window(t, n, staging);
    for (int64_t j = 0; j < w.width; ++j) dots[j] += dot(dv, x + w.width - 1 - j, n);
  }
}

}  // namespace seqconv::SEQCONV_ISA
