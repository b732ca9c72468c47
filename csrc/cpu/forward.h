// The convolution of a unit.
#pragma once
#include "activations.h"
#include "direct_lines.h"
#include "panels.h"
#include "taps.h"

namespace seqconv::SEQCONV_ISA {

// v[i] += bias, i < n, whole vectors of it.
template <class T>
SEQCONV_INLINE void add_bias(T bias, int64_t n, T* v) {
  for (int64_t i = 0; bias != 0 && i < n; i += kLanes<T>) vec(v + i) += splat(bias);
}

// What follows the convolution, kChunk values at a time: y = post_gate * activation(v + bias)
template <class T>
struct Epilogue {
  Activation activation;
  Series post_gate, y;
  T bias;

  static void take(const void* context, int64_t t, int64_t n, T* v) {
    const Epilogue& e = *static_cast<const Epilogue*>(context);
    add_bias(e.bias, n, v);
    const bool active = e.activation != Activation::kNone;
    T* y = e.post_gate || !active ? nullptr : contiguous<T>(e.y);
    if (y) return activate(e.activation, n, v, y + t, e.y.streamed);
    activate(e.activation, n, v, v);
    if (!e.post_gate) return write(e.y, t, n, v);
    T gate[kChunk];
    write_product(e.y, t, n, v, read_window(e.post_gate, t, n, gate));
  }
};

// v of channel g and head c of sample b, to sink; `spectrum` is that of the input, if known.
template <class T>
void convolve(Work<T>& w, int64_t b, int64_t g, int64_t c, const Source<T>& in, const T* spectrum,
              const Sink<T>& sink, const Ahead& ahead) {
  if (w.method.direct) return direct_forward(w, w.kernel(g, c), in, sink);
  for (int64_t j = 0; j < w.blocks(b); ++j) {
    Task<T> task(w.a);
    task.source = spectrum;
    task.split = !spectrum;
    task.factor = w.kernel(g, c);
    task.ahead = &ahead;
    Ahead block;
    if (w.fetches_blocks()) {
      block.will_read(w.lines(in.row, (j + 1) * w.plan.n));
      block.will_read(w.lines(in.gate, (j + 1) * w.plan.n));
      block.will_write(w.lines(sink.row, j * w.plan.n));
      task.ahead = &block;
    }
    if (task.split) w.enter_input(w.a, in, j);
    run_task(w.plan, task, w.team);
    leave(w.plan, w.team, w.a, w.plan.plain, sink.at(j * w.plan.n));
  }
}

// Channel g of sample b, all heads.
template <class T>
void forward_row(Work<T>& w, int64_t b, int64_t g) {
  const Problem& p = w.p;
  const Source<T> in = w.input(b, g);
  // What the only split of the input fetches: the next input, and the rows of every head.
  Ahead ahead;
  if (w.fetches()) {
    ahead.will_read(w.lines(w.u, b, g, true));
    ahead.will_read(w.lines(w.pre, b, g, true));
    ahead.will_read(w.next_kernel(b, g));
    for (int64_t c = 0; c < p.heads; ++c) {
      ahead.will_read(w.lines(w.post, b, g, false, c));
      ahead.will_write(w.lines(w.y, b, g, false, c));
    }
  }
  const bool shared = p.heads > 1 && !w.method.direct && !w.blocked;
  if (shared) {
    w.enter_input(w.x, in, 0);
    w.finish_spectrum(w.x, ahead);
  }
  for (int64_t c = 0; c < p.heads; ++c) {
    const T* spectrum = shared ? w.x : nullptr;
    if (w.gated) {
      const Epilogue<T> epilogue{p.activation, w.row(w.post, b, c, g), w.row(w.y, b, c, g),
                                 value_of<T>(w.kernel_row(p.bias, 0, c, g))};
      const Sink<T> sink{{}, in.length, 0, Epilogue<T>::take, &epilogue};
      convolve(w, b, g, c, in, spectrum, sink, ahead);
    } else {
      convolve(w, b, g, c, in, spectrum, {w.row(w.y, b, c, g), in.length}, ahead);
    }
  }
}

template <class T>
void forward_unit(const Problem& p, const Method& method, const Plan<T>& plan, const Unit& unit,
                  char* memory) {
  Scratch scratch(memory);
  Work<T> w(p, method, plan, unit, false, scratch);
  if (!p.kernel_per_sample) load_kernels(w, 0);
  if (w.by_lines) {
    DirectLines<T> lines(w);
    for (int64_t b = unit.batch; b < unit.batch_end; ++b) lines.forward(b);
    return end_streams();
  }
  for (int64_t b = unit.batch; b < unit.batch_end; ++b) {
    if (p.kernel_per_sample) load_kernels(w, b);
    read_panels(w, b);
    for (int64_t g = 0; g < unit.channels; ++g) forward_row(w, b, g);
    write_panels(w, b);
  }
  end_streams();
}

}  // namespace seqconv::SEQCONV_ISA
