// The gradient of a unit.
#pragma once
#include "forward.h"

namespace seqconv::SEQCONV_ISA {

// What follows the convolution when its gradient is wanted, kChunk values at a time:
// dv = dy * post_gate * activation'(v + bias), dpost_gate = dy * activation(v + bias)
template <class T>
struct EpilogueGradient {
  Activation activation;
  Series post_gate, dy, dpost_gate;
  T* dv;
  T bias;

  static void take(const void* context, int64_t t, int64_t n, T* v) {
    const EpilogueGradient& e = *static_cast<const EpilogueGradient*>(context);
    T staging[2][kChunk];
    const T* grad = read_window(e.dy, t, n, staging[0]);
    const bool active = e.activation != Activation::kNone;
    add_bias(e.bias, n, v);
    T* dv = e.dv + t;
    chain_activation(e.activation, n, v, grad, dv);
    if (e.post_gate)
      multiply(active ? dv : grad, read_window(e.post_gate, t, n, staging[1]), n, dv);
    else if (!active)
      copy(grad, n, dv);
    if (!e.dpost_gate) return;
    activate(e.activation, n, v, v);  // the gate's gradient may take the gate's place
    write_product(e.dpost_gate, t, n, grad, v);
  }
};

// What follows the gradient of x: du = dx * pre_gate, dpre_gate = dx * u
template <class T>
struct InputGradient {
  Series u, pre_gate, du, dpre;
  bool gated() const { return dpre || pre_gate; }

  static void take(const void* context, int64_t t, int64_t n, T* dx) {
    const InputGradient& e = *static_cast<const InputGradient*>(context);
    T staging[kChunk];
    if (e.du && e.pre_gate)
      write_product(e.du, t, n, dx, read_window(e.pre_gate, t, n, staging));
    else if (e.du)
      write(e.du, t, n, dx);
    // Last, because it may take the gate's place.
    if (e.dpre) write_product(e.dpre, t, n, dx, read_window(e.u, t, n, staging));
  }
};

// *sum += sum_t a[t] b[t], or sum_t a[t] where b is null; short runs in T, then double, in an order
// that depends on the length only.
template <class T>
void add_dot(const Work<T>& w, const Source<T>& a, const Source<T>* b, double* sum) {
  constexpr int64_t kRun = 512;
  const int64_t length = a.length;
  const int64_t piece =
      length < kDotPieces * kRun ? length : (length + kDotPieces - 1) / kDotPieces;
  const int64_t count = (length + piece - 1) / piece;
  spread(w.team, count, [&](int64_t begin, int64_t end) {
    alignas(64) T staging[2][kChunk];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t stop = (i + 1) * piece < length ? (i + 1) * piece : length;
      w.pieces[i] = 0;
      for (int64_t t = i * piece, n; t < stop; t += n) {
        n = stop - t < kRun ? stop - t : kRun;
        const T *p = a.find(t, n), *q = b ? b->find(t, n) : nullptr;
        if (!p || (b && !q)) {
          n = n < kChunk ? n : kChunk;
          p = a.window(t, n, staging[0]);
          if (b) q = b->window(t, n, staging[1]);
        }
        w.pieces[i] += b ? dot(p, q, n) : total(p, n);
      }
    }
  });
  once(w.team, [&] {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += w.pieces[i];
    *sum += total;
  });
}

// What one row, channel g of sample b, adds to the gradients; the first row of a sum starts it.
template <class T>
struct RowGradient {
  Work<T>& w;
  const int64_t b, g;
  const bool first;
  // The spectrum of the input is made together with the first gradient's, unless v needs it before.
  const bool early = w.gated && !w.method.direct && !w.blocked;
  const Source<T> in = w.input(b, g);
  const InputGradient<T> epilogue = {w.row(w.u, b, 0, g), w.row(w.pre, b, 0, g),
                                     w.row(w.du, b, 0, g), w.row(w.dpre, b, 0, g)};
  const Sink<T> dx = {w.row(w.du, b, 0, g), in.length, 0,
                      epilogue.gated() ? InputGradient<T>::take : nullptr, &epilogue};

  void add() {
    if (early) make_input_spectrum();
    if (w.gated) make_gradients();
    for (int64_t c = 0; w.wants_dbias && c < w.p.heads; ++c)
      add_dot<T>(w, gradient(c), nullptr, w.dots(g, c) + kBias);
    if (w.method.direct) return add_direct();
    const bool transforms = w.wants_dx || w.wants_dk;
    for (int64_t c = 0; !transforms && c < w.p.heads; ++c) add_skip(c);
    for (int64_t j = 0; transforms && j < w.blocks(b); ++j) {
      if (w.wants_dk && !early) w.enter_block(w.x, in, j);
      for (int64_t c = 0; c < w.p.heads; ++c) {
        if (j == 0) add_skip(c);  // just before the row is transformed, while it is in cache
        add_block(j, c);
      }
      if (w.wants_dx) leave_block(j);
    }
  }

  // The gradient of v is dy, or made from v and kept.
  Source<T> gradient(int64_t c) const {
    return {w.gated ? w.own_row(w.dv + c * w.p.length) : w.row(w.dy, b, c, g), {}, in.length};
  }

  void make_input_spectrum() {
    w.enter_block(w.x, in, 0);
    Ahead ahead;
    for (int64_t c = 0; w.fetches() && c < w.p.heads; ++c) {
      ahead.will_read(w.lines(w.dy, b, g, false, c));
      ahead.will_read(w.lines(w.post, b, g, false, c));
      ahead.will_write(w.lines(w.dpost, b, g, false, c));
    }
    w.finish_spectrum(w.x, ahead);
  }

  void make_gradients() {
    for (int64_t c = 0; c < w.p.heads; ++c) {
      const EpilogueGradient<T> epilogue{
          w.p.activation,        w.row(w.post, b, c, g),
          w.row(w.dy, b, c, g),  w.row(w.dpost, b, c, g),
          w.dv + c * w.p.length, value_of<T>(w.kernel_row(w.p.bias, 0, c, g))};
      const Sink<T> sink{{}, in.length, 0, EpilogueGradient<T>::take, &epilogue};
      convolve<T>(w, b, g, c, in, early ? w.x : nullptr, sink, Ahead{});
    }
  }

  void add_direct() {
    const Problem& p = w.p;
    for (int64_t c = 0; (w.wants_dk || w.wants_dskip) && c < p.heads; ++c)
      direct_dots(w, in, gradient(c), w.dots(g, c) + kScalars);
    if (!w.wants_dx) return;
    alignas(64) T window[kDirectWindow], staging[kDirectChunk];
    for (int64_t t = 0; t < in.length; t += kDirectChunk) {
      for (int64_t c = 0; c < p.heads; ++c) {
        const T* dv = gradient(c).window(t - w.reach, kDirectChunk + w.width - 1, window);
        direct_chunk<true, T>(w.kernel(g, c), w.width, dv, staging, c > 0);
      }
      dx.take_all(t, in.length - t < kDirectChunk ? in.length - t : kDirectChunk, staging);
    }
  }

  void add_skip(int64_t c) {
    const Source<T> dv = gradient(c);
    if (w.wants_dskip) add_dot(w, in, &dv, w.dots(g, c) + kSkip);
  }

  // From block j of the gradient of v of head c to that of the kernel and towards that of x.
  void add_block(int64_t j, int64_t c) {
    const bool single = w.p.heads == 1;
    w.enter_gradient(w.a, gradient(c), j);
    Task<T> task(w.a);
    if (w.wants_dk) {
      task.x = w.x;
      task.split_x = !early && c == 0;
      task.keep_x = !single;
      task.dk = w.dk(g, c);
      task.add_dk = !first || j > 0;
    }
    task.join = single && w.wants_dx;
    if (single) {
      task.factor = w.kernel(g, c);
      task.conjugate = true;
    } else if (w.wants_dx) {
      task.other = w.kernel(g, c);
      task.sum = w.sum;
      task.add_sum = c > 0;
    }
    Ahead ahead;
    if (w.fetches()) fetch_after_head(c, ahead);
    if (w.fetches_blocks()) fetch_after_block(j, c, ahead);
    task.ahead = &ahead;
    run_task(w.plan, task, w.team);
  }

  void fetch_after_head(int64_t c, Ahead& ahead) const {
    const Problem& p = w.p;
    if (c + 1 < p.heads && !w.gated) ahead.will_read(w.lines(w.dy, b, g, false, c + 1));
    if (p.kernel_per_sample || b + 1 == w.unit.batch_end)
      ahead.will_write(w.lines(w.kernel_row(p.dk, b, c, g)));
    if (c + 1 < p.heads) return;
    ahead.will_read(w.next_kernel(b, g));
    ahead.will_read(w.lines(w.u, b, g, true));
    ahead.will_read(w.lines(w.pre, b, g, true));
    if (!w.gated) ahead.will_read(w.lines(w.dy, b, g, true));
    ahead.will_write(w.lines(w.du, b, g, false));
    ahead.will_write(w.lines(w.dpre, b, g, false));
  }

  void fetch_after_block(int64_t j, int64_t c, Ahead& ahead) const {
    ahead.will_read(w.lines(in.row, (j + 1) * w.plan.n));
    ahead.will_read(w.lines(in.gate, (j + 1) * w.plan.n));
    ahead.will_read(w.lines(gradient(c).row, (j + 2) * w.plan.n));
    ahead.will_write(w.lines(dx.row, j * w.plan.n));
  }

  void leave_block(int64_t j) {
    if (w.p.heads > 1) {
      Task<T> task(w.a);
      task.split = false;
      task.source = w.sum;
      run_task(w.plan, task, w.team);
    }
    leave(w.plan, w.team, w.a, w.plan.plain, dx.at(j * w.plan.n));
  }
};

// The sums of channel g at `place` of every head, or those of all heads in one.
template <class T>
void store_scalar(Work<T>& w, const Tensor& grad, bool per_head, int64_t place, int64_t g) {
  double total = 0;
  for (int64_t c = 0; grad && c < w.p.heads; ++c) {
    const double value = w.dots(g, c)[place];
    total = per_head ? value : total + value;
    if (!per_head && c + 1 < w.p.heads) continue;
    const Series to = w.kernel_row(grad, 0, c, g);
    T rounded = static_cast<T>(total);
    if (w.p.adds) add_row(to, 0, 1, &rounded);
    write(to, 0, 1, &rounded);
  }
}

template <class T>
void store_sums(Work<T>& w, int64_t g) {
  const Problem& p = w.p;
  if (w.wants_dk && !p.kernel_per_sample) store_kernel_gradients(w, 0, g);
  once(w.team, [&] {
    store_scalar(w, p.dskip, p.skip_per_head, kSkip, g);
    store_scalar(w, p.dbias, p.bias_per_head, kBias, g);
  });
}

template <class T>
void backward_unit(const Problem& p, const Method& method, const Plan<T>& plan, const Unit& unit,
                   char* memory) {
  Scratch scratch(memory);
  Work<T> w(p, method, plan, unit, true, scratch);
  w.clear_dots(true);
  if (!p.kernel_per_sample && !unit.knows_kernels) load_kernels(w, 0);
  if (w.by_lines) {
    DirectLines<T> lines(w);
    for (int64_t b = unit.batch; b < unit.batch_end; ++b) lines.backward(b);
    lines.store_sums();
  }
  for (int64_t b = unit.batch; b < unit.batch_end && !w.by_lines; ++b) {
    if (p.kernel_per_sample) load_kernels(w, b);
    read_panels(w, b);
    for (int64_t g = 0; g < unit.channels; ++g) {
      RowGradient<T>{w, b, g, p.kernel_per_sample || b == unit.batch}.add();
      if (w.wants_dk && p.kernel_per_sample) store_kernel_gradients(w, b, g);
    }
    if (p.kernel_per_sample) {
      w.move_skip_sums();
      w.clear_dots(false);
    }
    write_panels(w, b);
  }
  end_streams();
  if (!p.kernel_per_sample) w.move_skip_sums();
  if (!unit.partial)
    for (int64_t g = 0; g < unit.channels; ++g) store_sums(w, g);
}

template <class T>
size_t partial_bytes(const Problem& p, const Method& method, const Plan<T>& plan) {
  Scratch scratch, partial;
  Team team;
  const Unit unit{0, 1, 0, 0, &team, nullptr};
  const Work<T> w(p, method, plan, unit, true, scratch);
  Sums<T>(p, plan, w.dot_count, 1, partial);
  return partial.used();
}

constexpr int64_t kSumPiece = 1 << 14;

// The partial sums lie one after another from unit.partial on; they end up in the first.
template <class T>
void reduce(const Problem& p, const Method& method, const Plan<T>& plan, const Unit& unit,
            char* memory, int64_t parts) {
  Scratch scratch(memory);
  Work<T> w(p, method, plan, unit, true, scratch);
  const size_t apart = partial_bytes<T>(p, method, plan);
  for (int64_t i = 1; i < parts; ++i) {
    Scratch partial(unit.partial + static_cast<size_t>(i) * apart);
    const Sums<T> more(p, plan, w.dot_count, 1, partial);
    // Spectra that are not wanted were not written.
    const int64_t spectra = w.wants_dk ? p.heads * plan.spectrum : 0;
    spread(w.team, spectra, kSumPiece, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) w.sums.dk[s] += more.dk[s];
    });
    once(w.team, [&] {
      for (int64_t s = 0; s < p.heads * w.dot_count; ++s) w.sums.dots[s] += more.dots[s];
    });
  }
  store_sums(w, 0);
}

}  // namespace seqconv::SEQCONV_ISA
