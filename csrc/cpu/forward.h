// The convolution of a unit. Part of fftconv_unit.h.

// v of channel g and head c of sample b, to sink; `spectrum` is that of the input, if known.
template <class T>
void convolve(Work<T>& w, int64_t g, int64_t c, const Source<T>& in, const T* spectrum,
              const Sink<T>& sink, const Ahead* ahead) {
  if (w.method.direct) return direct_forward(w, w.kernel(g, c), in, sink);
  for (int64_t j = 0; j < w.method.blocks; ++j) {
    Task<T> task(w.a);
    task.source = spectrum;
    task.split = !spectrum;
    task.factor = w.kernel(g, c);
    task.ahead = ahead;
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

template <class T>
void forward_unit(const Problem& p, const Method& method, const Transform<T>& plan,
                  const Unit& unit, char* memory) {
  Scratch scratch{memory};
  Work<T> w(p, method, plan, unit, false, scratch);
  if (!p.kernel_per_sample) w.load_kernels(0);
  for (int64_t b = unit.batch; b < unit.batch_end; ++b) {
    if (p.kernel_per_sample) w.load_kernels(b);
    w.template move<true>(w.u, b, 1);
    w.template move<true>(w.pre, b, 1);
    w.template move<true>(w.post, b, p.heads);
    for (int64_t g = 0; g < unit.channels; ++g) {
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
      const bool shared = p.heads > 1 && !method.direct && !w.blocked;
      if (shared) {
        w.enter_input(w.x, in, 0);
        Task<T> task(w.x);
        task.join = false;
        if (w.fetches()) task.ahead = &ahead;
        run_task(plan, task, w.team);
      }
      for (int64_t c = 0; c < p.heads; ++c) {
        const T* spectrum = shared ? w.x : nullptr;
        const Ahead* fetched = w.fetches() ? &ahead : nullptr;
        if (w.gated) {
          const Epilogue<T> epilogue{p.activation, w.row(w.post, b, c, g), w.row(w.y, b, c, g)};
          const Sink<T> sink{{}, p.length, 0, Epilogue<T>::take, &epilogue};
          convolve(w, g, c, in, spectrum, sink, fetched);
        } else {
          convolve(w, g, c, in, spectrum, {w.row(w.y, b, c, g), p.length}, fetched);
        }
      }
    }
    w.template move<false>(w.y, b, p.heads);
  }
  end_streams();
}
