// One unit of work of the exactly causal convolution and of its gradient (see exact.h).
#pragma once
#include "backward.h"
#include "stream_unit.h"

namespace seqconv::SEQCONV_ISA {

// ---- what a level does with a block ----

// to <- the spectrum of n = plan.n inputs.
template <class T>
void split_block(const Plan<T>& plan, const T* x, T* to) {
  Team alone;
  const Source<T> source{{reinterpret_cast<char*>(const_cast<T*>(x)), kDtype<T>, 1}, {}, plan.n};
  enter(plan, alone, to, plan.plain, source);
  Task<T> task(to);
  task.join = false;
  run_task(plan, task, alone);
}

template <class T>
SEQCONV_INLINE void add_product(Complex<T>& sum, Complex<T> a, Complex<T> b) {
  sum = {sum.re + a.re * b.re, sum.im + a.re * b.im};
  sum = {sum.re - a.im * b.im, sum.im + a.im * b.re};
}

// to <- the spectra of block b's outputs, and with kPair of block b + 1's behind them: sums of the
// products of earlier blocks' spectra, the last of which `ring` holds, with the kernel's `reach`.
template <bool kPair, class T>
void sum_products(const Plan<T>& plan, const T* ring, int64_t reach, int64_t b, const T* kernels,
                  T* to) {
  constexpr int kAtOnce = 2;
  const int64_t size = plan.spectrum, slots = reach + 1, count = b < reach ? b : reach;
  for (int64_t i = 0; i < size; i += kAtOnce * kStep<T>) {
    // The d-th block before b meets the kernel's d-th spectrum; before b + 1 it is the next.
    const T *x = ring + (kPair ? b : b - 1) % slots * size + i, *k = kernels + i;
    Complex<T> sum[kAtOnce] = {}, next[kAtOnce] = {}, w[kAtOnce];
    const auto step = [&](bool here, bool there) {
      Complex<T> a[kAtOnce];
      SEQCONV_UNROLL
      for (int v = 0; v < kAtOnce; ++v) {
        a[v] = load<T>(x + v * kStep<T>);
        if (here) add_product(sum[v], a[v], w[v]);
        if (there) {
          w[v] = load<T>(k + v * kStep<T>);
          add_product(next[v], a[v], w[v]);
        }
      }
      x += x == ring + i ? reach * size : -size;
      k += size;
    };
    if constexpr (kPair) {
      step(false, true);
      for (int64_t d = 1; d < count; ++d) step(true, true);
      b < reach ? step(true, true) : step(true, false);
    } else {
      for (int64_t d = 0; d < count; ++d) step(false, true);
    }
    SEQCONV_UNROLL
    for (int v = 0; v < kAtOnce; ++v) {
      store(to + i + v * kStep<T>, kPair ? sum[v] : next[v]);
      if (kPair) store(to + size + i + v * kStep<T>, next[v]);
    }
  }
}

template <class T>
void add_to(const void* context, int64_t t, int64_t n, T* values) {
  T* to = *static_cast<T* const*>(context) + t;
  fill(n, to, false, [=](const auto& at) { return at(to) + at(values); });
}

// Adds what earlier blocks give to the outputs of block b, which begin at v, and of the next if any
// of its outputs is among the `room`. `data` is for two spectra.
template <class T>
void join_blocks(const Plan<T>& plan, const T* ring, int64_t reach, int64_t b, const T* kernels,
                 T* data, T* v, int64_t room) {
  Team alone;
  const bool pair = room > plan.n;
  pair ? sum_products<true>(plan, ring, reach, b, kernels, data)
       : sum_products<false>(plan, ring, reach, b, kernels, data);
  for (int i = 0; i < 1 + pair; ++i, data += plan.spectrum, v += plan.n, room -= plan.n) {
    Task<T> task(data);
    task.split = false;
    run_task(plan, task, alone);
    const int64_t length = room < plan.n ? room : plan.n;
    leave(plan, alone, data, plan.plain, Sink<T>{{}, length, 0, add_to<T>, &v});
  }
}

// v <- the sums over pairs of an input and an output in the same block of kExactBlock, of so many
// blocks; near: kExactBlock zeros, then as many taps.
constexpr int64_t kBlocksAtOnce = 8, kExactChunk = kBlocksAtOnce * kExactBlock;
template <class T>
void direct_blocks(const T* near, const T* x, T* v, bool add) {
  constexpr int64_t kVectors = kExactBlock / kLanes<T>;
  Vec<T> place;
  for (int lane = 0; lane < kLanes<T>; ++lane) place[lane] = static_cast<T>(lane);
  for (int64_t i = 0; i < kVectors; ++i) {
    Vec<T> sum[kBlocksAtOnce];
    T* to = v + i * kLanes<T>;
    SEQCONV_UNROLL
    for (int q = 0; q < kBlocksAtOnce; ++q)
      sum[q] = add ? load_vector(to + q * kExactBlock) : Vec<T>{};
    const T* window = near + kExactBlock + i * kLanes<T>;
    int64_t j = 0;
    for (; j < i * kLanes<T>; ++j) {
      const Vec<T> taps = load_vector(window - j);
      SEQCONV_UNROLL
      for (int q = 0; q < kBlocksAtOnce; ++q) sum[q] += taps * splat(x[q * kExactBlock + j]);
    }
    // Earlier outputs stay as they are whatever an input is: zero times infinity is not zero.
    for (int64_t lane = 0; lane < kLanes<T>; ++lane, ++j) {
      const Vec<T> taps = load_vector(window - j), first = splat(static_cast<T>(lane));
      SEQCONV_UNROLL
      for (int q = 0; q < kBlocksAtOnce; ++q)
        sum[q] = place >= first ? sum[q] + taps * splat(x[q * kExactBlock + j]) : sum[q];
    }
    SEQCONV_UNROLL
    for (int q = 0; q < kBlocksAtOnce; ++q) store_vector(to + q * kExactBlock, sum[q]);
  }
}

// ---- gradients, which are 0 where no gradient comes from, whatever is there ----

// out[i] = g[i] factor[i], i < n
template <class T>
void chain(const T* g, const T* factor, int64_t n, T* out) {
  fill(n, out, false, [=](const auto& at) {
    const auto grad = at(g);
    const decltype(at(g)) zero = {};
    return grad == zero ? zero : grad * at(factor);
  });
}
template <class T>
void write_chained(const Series& to, int64_t t, int64_t n, const T* g, const T* factor) {
  T product[kChunk];
  chain(g, factor, n, product);
  write(to, t, n, product);
}

// As EpilogueGradient and InputGradient.
template <class T>
void chain_output(const void* context, int64_t t, int64_t n, T* v) {
  const auto& e = *static_cast<const EpilogueGradient<T>*>(context);
  alignas(64) T slopes[kChunk], staging[kChunk];
  const T* grad = read_window(e.dy, t, n, staging);
  const bool active = e.activation != Activation::kNone;
  add_bias(e.bias, n, v);
  with_activation<T>(e.activation, [&](auto a) {
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const Vec<T> at = load_vector(v + i);
      store_vector(v + i, a.value(at));
      store_vector(slopes + i, a.slope(at));
    }
  });
  if (e.dpost_gate) write_chained(e.dpost_gate, t, n, grad, v);
  T gate[kChunk], *dv = e.dv + t;
  if (e.post_gate) chain(grad, read_window(e.post_gate, t, n, gate), n, dv);
  if (active) chain<T>(e.post_gate ? dv : grad, slopes, n, dv);
}
template <class T>
void chain_input(const void* context, int64_t t, int64_t n, T* dx) {
  const auto& e = *static_cast<const InputGradient<T>*>(context);
  T staging[kChunk];
  if (e.dpre) write_chained(e.dpre, t, n, dx, read_window(e.u, t, n, staging));
  if (e.du && e.pre_gate)
    write_chained(e.du, t, n, dx, read_window(e.pre_gate, t, n, staging));
  else if (e.du)
    write(e.du, t, n, dx);
}

// ---- a unit ----

template <class T>
struct ExactWork {
  const Problem& p;
  const ExactLevels<T>& levels;
  const ExactUnit& unit;
  int64_t width;  // of the direct sum, if that is all
  int64_t held;   // taps that reach an output or take part in its rounding
  int64_t kernel_size = 0, ring_size = 0, longest = 0;
  T *zeros, *v, *taps, *near, *kernels, *rings, *data;

  ExactWork(const Problem& problem, const ExactLevels<T>& of, const ExactUnit& u, Scratch& scratch)
      : p(problem), levels(of), unit(u) {
    const int64_t padded = (p.length + kExactChunk - 1) / kExactChunk * kExactChunk;
    width = p.taps ? min_of(p.taps, kDirectTaps) : p.skip ? 1 : 0;
    held = kExactBlock;
    for (int l = 0; l < levels.count; ++l) {
      const ExactLevel<T>& level = levels.level[l];
      held = (level.reach + 1) * level.plan->n;
      longest = level.plan->spectrum;
      kernel_size += level.reach * longest;
      ring_size += (level.reach + 1) * longest;
    }
    zeros = scratch.take<T>(kDirectTaps + padded);
    v = scratch.take<T>(padded);
    taps = scratch.take<T>(held);
    near = scratch.take<T>(unit.heads * 2 * kExactBlock);
    kernels = scratch.take<T>(unit.heads * kernel_size);
    rings = scratch.take<T>(ring_size);
    data = scratch.take<T>(2 * longest);
    if (scratch.counts()) return;
    for (int64_t i = 0; i < kDirectTaps; ++i) zeros[i] = 0;
    for (int64_t i = p.length; i < padded; ++i) x()[i] = 0;
  }

  static int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

  // The input: zeros lie before it, and behind it where a chunk of direct sums is not full.
  T* x() const { return zeros + kDirectTaps; }

  Series row(const Tensor& t, int64_t b, int64_t c) const {
    const int64_t at = b * t.stride[0] + c * t.stride[1] + unit.channel * t.stride[2];
    return t ? Series{t.data + at * size_of(t.dtype), t.dtype, t.stride[3]} : Series{};
  }

  // The same of a result, which is streamed if it is too large to be found in cache.
  Series result(const Tensor& t, int64_t b, int64_t c) const {
    Series found = row(t, b, c);
    const int64_t bytes = p.batch * p.channels * p.length * size_of(t.dtype);
    found.streamed =
        kStreams && contiguous<T>(found) && p.length >= kStreamLength && bytes >= kStreamBytes;
    return found;
  }

  // The kernel of head c of the unit: its first taps, with the skip, and spectra for the others.
  void load_kernel(int64_t b, int64_t c) {
    const int64_t head = unit.head + c, count = min_of(p.taps, held);
    if (count) read(row(p.k, b, head), 0, count, taps);
    for (int64_t j = count; j < held; ++j) taps[j] = 0;
    // Taps that meet no output only take part in the rounding, so that it does not depend on
    // length.
    for (int64_t j = p.length; j < count; ++j) taps[j] = taps[j] - taps[j] == 0 ? taps[j] : T(0);
    T skip = 0;
    if (p.skip) read(row(p.skip, 0, head), 0, 1, &skip);
    T* first = near + c * 2 * kExactBlock;
    for (int64_t j = 0; j < kExactBlock; ++j) {
      first[j] = 0;
      first[kExactBlock + j] = taps[j];
    }
    first[kExactBlock] += skip;
    T* to = kernels + c * kernel_size;
    for (int l = 0; l < levels.count; ++l) {
      const ExactLevel<T>& level = levels.level[l];
      for (int64_t d = 0; d < level.reach; ++d, to += level.plan->spectrum)
        level.spectrum(*level.plan, taps + d * level.plan->n, 2 * level.plan->n, to);
    }
  }

  // v (+)= the convolution of x with the kernel of head c.
  void convolve(int64_t c, bool add) {
    const T* first = near + c * 2 * kExactBlock;
    if (p.taps <= kDirectTaps) {
      for (int64_t t = 0; t < p.length; t += kDirectChunk)
        direct_chunk<false, T>(first + kExactBlock, width, x() + t + 1 - width, v + t, add);
      return;
    }
    for (int64_t t = 0; t < p.length; t += kExactChunk) direct_blocks(first, x() + t, v + t, add);
    if (levels.count) run(levels.count - 1, 0, kernels + (c + 1) * kernel_size, rings + ring_size);
  }

  // Adds what level l and those below give to the outputs of a group, which begins at `first`. The
  // level's spectra end where these do.
  void run(int l, int64_t first, const T* kernels_end, T* ring_end) {
    const ExactLevel<T>& level = levels.level[l];
    const int64_t n = level.plan->n, size = level.plan->spectrum;
    const T* of_kernel = kernels_end - level.reach * size;
    T* ring = ring_end - (level.reach + 1) * size;
    const int64_t blocks = min_of(level.blocks, (p.length - first + n - 1) / n);
    for (int64_t b = 0, t = first; b < blocks; ++b, t += n) {
      if (l > 0) run(l - 1, t, of_kernel, ring);
      // Outputs of two blocks, from the second on, share what is loaded.
      const bool second = b > 0 && b % 2 == 0, alone = b % 2 && b + 1 == blocks;
      if (second || alone) {
        const int64_t start = second ? t - n : t, end = min_of(p.length, t + n);
        level.join(*level.plan, ring, level.reach, second ? b - 1 : b, of_kernel, data, v + start,
                   end - start);
      }
      if (b + 1 < blocks) level.split(*level.plan, x() + t, ring + b % (level.reach + 1) * size);
    }
  }
};

template <class T>
size_t exact_scratch(const Problem& p, const ExactLevels<T>& levels, const ExactUnit& unit) {
  Scratch scratch;
  const ExactWork<T> w(p, levels, unit, scratch);
  return scratch.used();
}

// op(b) for the unit's samples, with the kernels loaded.
template <class T, class Op>
void for_each_sample(ExactWork<T>& w, const Op& op) {
  for (int64_t b = w.unit.batch; b < w.unit.batch_end; ++b) {
    if (w.p.kernel_per_sample || b == w.unit.batch)
      for (int64_t c = 0; c < w.unit.heads; ++c) w.load_kernel(b, c);
    op(b);
  }
}

template <class T>
void exact_forward_unit(const Problem& p, const ExactLevels<T>& levels, const ExactUnit& unit,
                        char* memory) {
  Scratch scratch(memory);
  ExactWork<T> w(p, levels, unit, scratch);
  for_each_sample(w, [&](int64_t b) {
    Source<T>{w.row(p.u, b, 0), w.row(p.pre_gate, b, 0), p.length}.fill(0, p.length, w.x());
    for (int64_t c = 0; c < unit.heads; ++c) {
      const int64_t head = unit.head + c;
      w.convolve(c, false);
      const Epilogue<T> end{p.activation, w.row(p.post_gate, b, head), w.result(p.y, b, head),
                            value_of<T>(w.row(p.bias, 0, head))};
      Sink<T>{{}, p.length, 0, Epilogue<T>::take, &end}.take_all(0, p.length, w.v);
    }
  });
  end_streams();
}

template <class T>
void reverse(T* x, int64_t n) {
  for (int64_t i = 0, j = n - 1; i < j; ++i, --j) {
    const T value = x[i];
    x[i] = x[j];
    x[j] = value;
  }
}

// All heads of a channel. dv, (batch, heads, channels, length), is where the gradient of v is kept;
// without gates and activation it is dy. The transposed convolution is the same one, backwards.
template <class T>
void exact_backward_unit(const Problem& p, const Tensor& dv, const ExactLevels<T>& levels,
                         const ExactUnit& unit, char* memory) {
  Scratch scratch(memory);
  ExactWork<T> w(p, levels, unit, scratch);
  for_each_sample(w, [&](int64_t b) {
    if (dv.data != p.dy.data) {
      Source<T>{w.row(p.u, b, 0), w.row(p.pre_gate, b, 0), p.length}.fill(0, p.length, w.x());
      for (int64_t c = 0; c < unit.heads; ++c) {
        w.convolve(c, false);
        const EpilogueGradient<T> end{p.activation,
                                      w.row(p.post_gate, b, c),
                                      w.row(p.dy, b, c),
                                      w.result(p.dpost_gate, b, c),
                                      contiguous<T>(w.row(dv, b, c)),
                                      value_of<T>(w.row(p.bias, 0, c))};
        Sink<T>{{}, p.length, 0, chain_output<T>, &end}.take_all(0, p.length, w.v);
      }
    }
    if (!p.du && !p.dpre_gate) return;
    for (int64_t c = 0; c < unit.heads; ++c) {
      read(w.row(dv, b, c), 0, p.length, w.x());
      reverse(w.x(), p.length);
      w.convolve(c, c > 0);
    }
    reverse(w.v, p.length);
    const InputGradient<T> start{w.row(p.u, b, 0), w.row(p.pre_gate, b, 0), w.result(p.du, b, 0),
                                 w.result(p.dpre_gate, b, 0)};
    Sink<T>{{}, p.length, 0, chain_input<T>, &start}.take_all(0, p.length, w.v);
  });
  end_streams();
}

template <class T>
constexpr ExactKernel<T> kExactKernel = {
    kQuads<T>,        split_block<T>,        join_blocks<T>,        tile_spectrum<T>,
    exact_scratch<T>, exact_forward_unit<T>, exact_backward_unit<T>};

}  // namespace seqconv::SEQCONV_ISA
