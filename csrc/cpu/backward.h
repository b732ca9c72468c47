// The gradient of a unit. Part of fftconv_unit.h.

// *sum += sum_t a[t] b[t]; short runs in T, then double, in an order that depends on the length
// only.
template <class T>
void add_dot(const Work<T>& w, const Source<T>& a, const Source<T>& b, double* sum) {
  constexpr int64_t kRun = 512;
  const int64_t length = w.p.length;
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
        const T *p = a.find(t, n), *q = b.find(t, n);
        if (!p || !q) {
          n = n < kChunk ? n : kChunk;
          p = a.window(t, n, staging[0]);
          q = b.window(t, n, staging[1]);
        }
        w.pieces[i] += dot(p, q, n);
      }
    }
  });
  once(w.team, [&] {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += w.pieces[i];
    *sum += total;
  });
}

struct Wanted {
  bool dx, dk, dskip;
  explicit Wanted(const Problem& p)
      : dx(p.du || p.dpre_gate), dk(p.dk || p.dk_rev), dskip(static_cast<bool>(p.dskip)) {}
};

// Everything that one row adds to the gradients; the first row of a sum starts it.
template <class T>
void backward_row(Work<T>& w, const Wanted& wanted, int64_t b, int64_t g, bool first) {
  const Problem& p = w.p;
  const Transform<T>& plan = w.plan;
  const Source<T> in = w.input(b, g);
  const bool direct = w.method.direct;
  // The spectrum of the input is made together with the first gradient's, unless v needs it before.
  const bool early = w.gated && !direct && !w.blocked;
  if (early) {
    enter(plan, w.team, w.x, plan.plain, in);
    Task<T> task(w.x);
    task.join = false;
    Ahead ahead;
    if (w.fetches()) {
      task.ahead = &ahead;
      for (int64_t c = 0; c < p.heads; ++c) {
        ahead.will_read(w.lines(w.dy, b, g, false, c));
        ahead.will_read(w.lines(w.post, b, g, false, c));
        ahead.will_write(w.lines(w.dpost, b, g, false, c));
      }
    }
    run_task(plan, task, w.team);
  }

  // The gradient of v, per head, is dy, or made from v and kept.
  const auto gradient = [&](int64_t c) -> Source<T> {
    return {w.gated ? w.own_row(w.dv + c * p.length) : w.row(w.dy, b, c, g), {}, p.length};
  };
  for (int64_t c = 0; c < p.heads; ++c) {
    if (w.gated) {
      const EpilogueGradient<T> epilogue{p.activation, w.row(w.post, b, c, g), w.row(w.dy, b, c, g),
                                         w.row(w.dpost, b, c, g), w.dv + c * p.length};
      const Sink<T> sink{{}, p.length, 0, EpilogueGradient<T>::take, &epilogue};
      convolve<T>(w, g, c, in, early ? w.x : nullptr, sink, nullptr);
    }
    if (direct && (wanted.dk || wanted.dskip)) direct_dots(w, in, gradient(c), w.dots(g, c) + 1);
  }

  const InputGradient<T> epilogue{w.row(w.u, b, 0, g), w.row(w.pre, b, 0, g), w.row(w.du, b, 0, g),
                                  w.row(w.dpre, b, 0, g)};
  const Sink<T> dx{w.row(w.du, b, 0, g), p.length, 0,
                   epilogue.gated() ? InputGradient<T>::take : nullptr, &epilogue};

  if (direct) {
    if (!wanted.dx) return;
    alignas(64) T window[kDirectWindow], staging[kDirectChunk];
    for (int64_t t = 0; t < p.length; t += kDirectChunk) {
      for (int64_t c = 0; c < p.heads; ++c) {
        const T* dv = gradient(c).window(t - w.reach, kDirectChunk + w.width - 1, window);
        direct_chunk<true, T>(w.kernel(g, c), w.width, dv, staging, c > 0);
      }
      dx.take_all(t, p.length - t < kDirectChunk ? p.length - t : kDirectChunk, staging);
    }
    return;
  }
  const bool transforms = wanted.dx || wanted.dk;
  // Just before the row is transformed, while it is in cache.
  const auto add_skip = [&](int64_t c) {
    if (wanted.dskip) add_dot(w, in, gradient(c), w.dots(g, c));
  };
  for (int64_t c = 0; !transforms && c < p.heads; ++c) add_skip(c);
  for (int64_t j = 0; transforms && j < w.method.blocks; ++j) {
    const bool with_x = wanted.dk && !early;
    if (with_x) w.enter_block(w.x, in, j);
    const bool single = p.heads == 1;
    for (int64_t c = 0; c < p.heads; ++c) {
      if (j == 0) add_skip(c);
      w.enter_gradient(w.a, gradient(c), j);
      Task<T> task(w.a);
      if (wanted.dk) {
        task.x = w.x;
        task.split_x = with_x && c == 0;
        task.keep_x = !single;
        task.dk = w.dk(g, c);
        task.add_dk = !first || j > 0;
      }
      task.join = single && wanted.dx;
      Ahead ahead;
      task.ahead = w.fetches() || w.fetches_blocks() ? &ahead : nullptr;
      if (w.fetches() && c + 1 < p.heads && !w.gated)
        ahead.will_read(w.lines(w.dy, b, g, false, c + 1));
      if (w.fetches() && (p.kernel_per_sample || b + 1 == w.unit.batch_end))
        ahead.will_write(w.lines(w.row(p.dk, b, c, g)));
      if (w.fetches() && c + 1 == p.heads) {
        ahead.will_read(w.next_kernel(b, g));
        ahead.will_read(w.lines(w.u, b, g, true));
        ahead.will_read(w.lines(w.pre, b, g, true));
        if (!w.gated) ahead.will_read(w.lines(w.dy, b, g, true));
        ahead.will_write(w.lines(w.du, b, g, false));
        ahead.will_write(w.lines(w.dpre, b, g, false));
      }
      if (w.fetches_blocks()) {
        ahead.will_read(w.lines(in.row, (j + 1) * plan.n));
        ahead.will_read(w.lines(in.gate, (j + 1) * plan.n));
        ahead.will_read(w.lines(gradient(c).row, (j + 2) * plan.n));
        ahead.will_write(w.lines(dx.row, j * plan.n));
      }
      if (single) {
        task.factor = w.kernel(g, c);
        task.conjugate = true;
      } else if (wanted.dx) {
        task.other = w.kernel(g, c);
        task.sum = w.sum;
        task.add_sum = c > 0;
      }
      run_task(plan, task, w.team);
    }
    if (!wanted.dx) continue;
    if (!single) {
      Task<T> task(w.a);
      task.split = false;
      task.source = w.sum;
      run_task(plan, task, w.team);
    }
    leave(plan, w.team, w.a, plan.plain, dx.at(j * plan.n));
  }
}

// Turns the sums of channel g into gradients of the kernels (of sample b).
template <class T>
void store_kernel_gradients(Work<T>& w, int64_t b, int64_t g) {
  const Problem& p = w.p;
  const Transform<T>& plan = w.plan;
  for (int64_t c = 0; c < p.heads; ++c) {
    const Sink<T> combined{w.own_row(w.kk), w.width};
    if (w.method.direct) {
      for (int64_t j = 0; j < w.width; ++j) w.kk[j] = static_cast<T>(w.dots(g, c)[1 + j]);
    } else {
      Task<T> task(w.dk(g, c));
      task.split = false;
      run_task(plan, task, w.team);
      if (w.blocked) {
        leave(plan, w.team, task.data, plan.scaled, combined);
      } else {
        if (p.dk) {
          const Sink<T> fore{w.row(p.dk, b, c, g), p.taps};
          leave(plan, w.team, task.data, plan.scaled, fore);
        }
        if (p.dk_rev && w.reach) {
          Sink<T> back{w.row(p.dk_rev, b, c, g), w.reach, w.reach - plan.n};
          back.row.base += (w.reach - 1) * back.row.stride * size_of(back.row.dtype);
          back.row.stride = -back.row.stride;
          leave(plan, w.team, task.data, plan.scaled_times_minus_i, back);
        }
        continue;
      }
    }
    once(w.team, [&] { w.template move_taps<false>(p.dk, p.dk_rev, b, c, g, w.kk); });
  }
}

template <class T>
void store_sums(Work<T>& w, const Wanted& wanted, int64_t g) {
  const Problem& p = w.p;
  if (wanted.dk && !p.kernel_per_sample) store_kernel_gradients(w, 0, g);
  if (!wanted.dskip) return;
  once(w.team, [&] {
    double total = 0;
    for (int64_t c = 0; c < p.heads; ++c) {
      const double value = *w.dots(g, c);
      total = p.skip_per_head ? value : total + value;
      const T rounded = static_cast<T>(total);
      if (p.skip_per_head || c + 1 == p.heads) write(w.row(p.dskip, 0, c, g), 0, 1, &rounded);
    }
  });
}

template <class T>
void backward_unit(const Problem& p, const Method& method, const Transform<T>& plan,
                   const Unit& unit, char* memory) {
  Scratch scratch{memory};
  Work<T> w(p, method, plan, unit, true, scratch);
  const Wanted wanted(p);
  w.clear_dots(true);
  if (!p.kernel_per_sample && !unit.knows_kernels) w.load_kernels(0);
  for (int64_t b = unit.batch; b < unit.batch_end; ++b) {
    if (p.kernel_per_sample) w.load_kernels(b);
    w.template move<true>(w.u, b, 1);
    w.template move<true>(w.pre, b, 1);
    w.template move<true>(w.post, b, p.heads);
    w.template move<true>(w.dy, b, p.heads);
    for (int64_t g = 0; g < unit.channels; ++g) {
      backward_row(w, wanted, b, g, p.kernel_per_sample || b == unit.batch);
      if (wanted.dk && p.kernel_per_sample) store_kernel_gradients(w, b, g);
    }
    if (p.kernel_per_sample) {
      w.move_skip_sums();
      w.clear_dots(false);
    }
    w.template move<false>(w.du, b, 1);
    w.template move<false>(w.dpre, b, 1);
    w.template move<false>(w.dpost, b, p.heads);
  }
  end_streams();
  if (!p.kernel_per_sample) w.move_skip_sums();
  if (!unit.partial)
    for (int64_t g = 0; g < unit.channels; ++g) store_sums(w, wanted, g);
}

template <class T>
size_t partial_bytes(const Problem& p, const Method& method, const Transform<T>& plan) {
  Scratch none{nullptr}, partial{nullptr};
  Team team;
  const Unit unit{0, 1, 0, 0, &team, nullptr};
  const Work<T> w(p, method, plan, unit, true, none);
  Sums<T>(p, plan, w.dot_count, 1, partial);
  return partial.used;
}

constexpr int64_t kSumPiece = 1 << 14;

// The partial sums lie one after another from unit.partial on; they end up in the first.
template <class T>
void reduce(const Problem& p, const Method& method, const Transform<T>& plan, const Unit& unit,
            char* memory, int64_t parts) {
  Scratch scratch{memory};
  Work<T> w(p, method, plan, unit, true, scratch);
  const Wanted wanted(p);
  const size_t apart = partial_bytes<T>(p, method, plan);
  for (int64_t i = 1; i < parts; ++i) {
    Scratch partial{unit.partial + static_cast<size_t>(i) * apart};
    const Sums<T> more(p, plan, w.dot_count, 1, partial);
    // Spectra that are not wanted were not written.
    const int64_t spectra = wanted.dk ? p.heads * plan.spectrum : 0;
    spread(w.team, (spectra + kSumPiece - 1) / kSumPiece, [&](int64_t begin, int64_t end) {
      const int64_t stop = end * kSumPiece < spectra ? end * kSumPiece : spectra;
      for (int64_t s = begin * kSumPiece; s < stop; ++s) w.sums.dk[s] += more.dk[s];
    });
    once(w.team, [&] {
      for (int64_t s = 0; s < p.heads * w.dot_count; ++s) w.sums.dots[s] += more.dots[s];
    });
  }
  store_sums(w, wanted, 0);
}
