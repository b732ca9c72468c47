// Units of work of a convolution that is computed step by step (see stream.h).
#pragma once
#include "activations.h"
#include "ends.h"
#include "scratch.h"
#include "stream.h"
#include "transform.h"

namespace seqconv::SEQCONV_ISA {

constexpr int64_t kStepChannels = kGroup;  // of a unit: their values are converted together

// Some channels of one tensor of a step, at one sample and head.
SEQCONV_INLINE Series step_row(const Tensor& t, int64_t b, int64_t c, int64_t h) {
  const int64_t at = b * t.stride[0] + c * t.stride[1] + h * t.stride[2];
  return t ? Series{t.data + at * size_of(t.dtype), t.dtype, t.stride[2]} : Series{};
}

// Where the block of step `clock` begins in a ring of (rings, kBlock) per block.
SEQCONV_INLINE int64_t block_at(const StreamProblem& p, int64_t b, int64_t clock, int64_t rings,
                                int64_t ring) {
  return ((b * (p.period / kBlock) + clock / kBlock) * rings + ring) * kBlock;
}

// v at step s of a block whose sums these are. Adds what x has in the steps after it, and clears
// the sum of s, for the output a period later. Earlier steps' sums stay as they are whatever x is:
// zero times infinity is not zero.
template <class T>
SEQCONV_INLINE T push(T* sums, const T* taps, int64_t s, T x) {
  const T v = sums[s] + taps[kBlock] * x;
  taps += kBlock - s;
  Vec<T> place;
  for (int lane = 0; lane < kLanes<T>; ++lane) place[lane] = static_cast<T>(lane);
  for (int64_t i = s / kLanes<T> * kLanes<T>; i < kBlock; i += kLanes<T>) {
    const Vec<T> old = load_vector(sums + i), last = splat(static_cast<T>(s - i));
    store_vector(sums + i, place > last ? old + x * load_vector(taps + i) : old);
  }
  sums[s] = 0;
  return v;
}

// Step `channels` channels from h on, at most kStepChannels, of sample b.
template <class T>
void stream_unit(const StreamProblem& p, int64_t b, int64_t h, int64_t channels) {
  T x[kStepChannels], gate[kStepChannels];
  alignas(64) T v[kStepChannels];
  int64_t clock[kStepChannels];
  read(step_row(p.u, b, 0, h), 0, channels, x);
  if (p.pre_gate) {
    read(step_row(p.pre_gate, b, 0, h), 0, channels, gate);
    for (int64_t i = 0; i < channels; ++i) x[i] *= gate[i];
  }
  for (int64_t i = 0; i < channels; ++i) {
    clock[i] = i % kTogether ? clock[i - 1] : p.clock_of(b, h + i);
    const int64_t block = block_at(p, b, clock[i], p.channels, h + i);
    reinterpret_cast<T*>(p.inputs)[block + clock[i] % kBlock] = x[i];
    // The sums lie far apart, and come all at once when they are asked for before.
    const T* sums =
        reinterpret_cast<const T*>(p.sums) + block_at(p, b, clock[i], p.heads * p.channels, h + i);
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t j = clock[i] % kBlock / kLine * kLine; j < kBlock; j += kLine)
      __builtin_prefetch(sums + j, 1);
  }
  for (int64_t c = 0; c < p.heads; ++c) {
    for (int64_t i = 0; i < channels; ++i) {
      const int64_t row = c * p.channels + h + i;
      T* sums = reinterpret_cast<T*>(p.sums) + block_at(p, b, clock[i], p.heads * p.channels, row);
      const T* taps = reinterpret_cast<const T*>(p.taps) + row * 2 * kBlock;
      v[i] = push(sums, taps, clock[i] % kBlock, x[i]);
    }
    for (int64_t i = channels; i % kLanes<T>; ++i) v[i] = 0;
    activate(p.activation, channels, v, v);
    if (p.post_gate) {
      read(step_row(p.post_gate, b, c, h), 0, channels, gate);
      for (int64_t i = 0; i < channels; ++i) v[i] *= gate[i];
    }
    write(step_row(p.y, b, c, h), 0, channels, v);
  }
}

constexpr int64_t kAhead = 8;  // blocks of a ring that are asked for before they are needed

// Adds to sums that lie in blocks of kBlock, `apart` scalars apart. Tiles are powers of two of at
// least kBlock points, so that their pieces are whole vectors.
template <class T>
struct AddToBlocks {
  T* sums;
  int64_t apart;
  static void take(const void* context, int64_t t, int64_t n, T* values) {
    const AddToBlocks& to = *static_cast<const AddToBlocks*>(context);
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      T* sum = to.sums + (t + i) / kBlock * to.apart + (t + i) % kBlock;
      __builtin_prefetch(sum + kAhead * to.apart, 1);
      store_vector(sum, load_vector(sum) + load_vector(values + i));
    }
  }
};

template <class T>
size_t tile_scratch(const Plan<T>& plan, int64_t heads) {
  return sizeof(T) * static_cast<size_t>(plan.n + (heads > 1 ? 2 : 1) * plan.spectrum) + 3 * 64;
}

// The tile of n = plan.n points that is due after step `clock` of one row, of all heads. `spectra`
// are those of head 0, and `apart` scalars further of the next head.
template <class T>
void tile_unit(const StreamProblem& p, const Plan<T>& plan, int64_t b, int64_t h, int64_t clock,
               const T* spectra, int64_t apart, char* memory) {
  Scratch scratch(memory);
  T* x = scratch.take<T>(plan.n);
  T* data = scratch.take<T>(plan.spectrum);
  Team alone;
  const int64_t end = clock + 1, step = p.channels * kBlock;
  const T* from =
      reinterpret_cast<const T*>(p.inputs) + block_at(p, b, end - plan.n, p.channels, h);
  for (int64_t i = 0; i < plan.n; i += kBlock, from += step)
    for (int64_t j = 0; j < kBlock; j += kLanes<T>) {
      __builtin_prefetch(from + kAhead * step + j);
      __builtin_prefetch(spectra + 2 * (i + j), 0, 2);
      __builtin_prefetch(spectra + 2 * (i + j) + kLanes<T>, 0, 2);
      store_vector(x + i + j, load_vector(from + j));
    }
  const Source<T> source{{reinterpret_cast<char*>(x), kDtype<T>, 1}, {}, plan.n};
  const T* shared = nullptr;
  if (p.heads > 1) {
    T* once = scratch.take<T>(plan.spectrum);
    enter(plan, alone, once, plan.plain, source);
    Task<T> task(once);
    task.join = false;
    run_task(plan, task, alone);
    shared = once;
  }
  for (int64_t c = 0; c < p.heads; ++c) {
    Task<T> task(data);
    task.source = shared;
    task.split = !shared;
    task.factor = spectra + c * apart;
    if (!shared) enter(plan, alone, data, plan.plain, source);
    run_task(plan, task, alone);
    const int64_t rings = p.heads * p.channels;
    const int64_t to = block_at(p, b, end & (p.period - 1), rings, c * p.channels + h);
    const AddToBlocks<T> add{reinterpret_cast<T*>(p.sums) + to, rings * kBlock};
    leave(plan, alone, data, plan.plain, Sink<T>{{}, plan.n, 0, AddToBlocks<T>::take, &add});
  }
}

// to <- the spectrum of tiles of n = plan.n points, of `count` taps k:
// v[i] = sum_j k[n + i - j] x[j] has k[n], k[n + 1], ... for the past, and before it those for the
// future, k[n - 1], k[n - 2], ..., which is how they lie, from k[1] on.
template <class T>
void tile_spectrum(const Plan<T>& plan, const T* k, int64_t count, T* to) {
  Team alone;
  const Series row{reinterpret_cast<char*>(const_cast<T*>(k)), kDtype<T>, 1};
  const Source<T> past{row, {}, count, plan.n}, future{row, {}, count};
  enter(plan, alone, to, plan.scaled, past, &future, T(-1));
  Task<T> task(to);
  task.join = false;
  run_task(plan, task, alone);
}

template <class T>
constexpr StreamKernel<T> kStreamKernel = {kQuads<T>, stream_unit<T>, tile_scratch<T>, tile_unit<T>,
                                           tile_spectrum<T>};

}  // namespace seqconv::SEQCONV_ISA
