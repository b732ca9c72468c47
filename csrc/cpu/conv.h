// One unit of work of the convolution and of its gradient: some samples of a channel, or of a few
// neighbouring ones. Included inside an instruction set's namespace, after fft.h and rows.h.
//
// With x = pre_gate * u, spectra X, and K the spectrum of k[t] - i k_rev[n - t], on n >= length
// points (design of plan.h):
//   v = Re inv(X K),   dx = Re inv(dV conj K),   dk = Re inv(sum dV conj X),   dk_rev = -Im of it.
// A kernel much shorter than the row takes blocks of n points instead, with all its taps in one
// causal kernel kk of `width` taps, kk[reach] being k[0], and x shifted by `reach`:
//   v_j = Re inv(K (X_j - i X_{j-1})),   dx_j = Re inv(conj K (dV_j + i dV_{j+1})),
//   dkk = Re inv(sum_j conj X_j (dV_j + i dV_{j+1})),
// since the wrapped parts are the imaginary ones: every point of every block is of use.

// Bump allocator over the caller's scratch; with base null it only counts.
struct Scratch {
  char* base;
  size_t used = 0;
  template <class E>
  E* take(int64_t count) {
    E* start = reinterpret_cast<E*>(base + used);
    used += (static_cast<size_t>(count) * sizeof(E) + 63) / 64 * 64;
    return start;
  }
};

SEQCONV_INLINE int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// What a sum over the batch keeps: spectra of the kernels' gradients and, in double, dot products.
template <class T>
struct Sums {
  T* dk = nullptr;         // a spectrum per head
  double* dots = nullptr;  // per head: d skip and, of a direct sum, the gradient of every tap

  Sums() = default;
  Sums(const Problem& p, const Transform<T>& plan, int64_t dot_count, int64_t channels,
       Scratch& scratch)
      : dk(scratch.take<T>(channels * p.heads * plan.spectrum)),
        dots(scratch.take<double>(channels * p.heads * dot_count)) {}
};

// A tensor as the rows of a unit see it.
template <class T>
struct View {
  const Tensor* tensor;
  T* panel = nullptr;  // transposed copy, (heads, channels, length), of one sample of the unit
};

constexpr int64_t kDotPieces = 32;
constexpr int64_t kFetchAhead = 1 << 15;  // rows up to here are fetched while the last is in work

template <class T>
struct Work {
  const Problem& p;
  const Method& method;
  const Transform<T>& plan;
  const Unit& unit;
  Team& team;
  int64_t group;         // channels that the memory is for
  int64_t pitch;         // of a panel's rows: not a power of two, or they would share cache sets
  int64_t width, reach;  // of the combined kernel kk
  int64_t dot_count;
  bool gated, blocked;
  T *a, *x, *sum;  // spectra
  T* kernels;      // spectra per channel and head, or, of a direct sum, kk
  T* kk;           // a combined kernel's taps, where it is transformed
  T* dv;           // rows of the gradient of v, per head
  double* pieces;  // of one long dot product
  Sums<T> sums;
  View<T> u, pre, post, y, dy, du, dpre, dpost;

  Work(const Problem& problem, const Method& m, const Transform<T>& transform, const Unit& of,
       bool backward, Scratch& scratch)
      : p(problem), method(m), plan(transform), unit(of), team(*of.team), group(of.channels) {
    pitch = (p.length + 31) / 16 * 16;
    reach = p.taps_rev;
    width = reach + (p.taps ? p.taps : p.skip ? 1 : 0);
    dot_count = method.direct ? 1 + width : 1;
    gated = p.post_gate || p.activation != Activation::kNone;
    blocked = method.blocks > 1;
    const int64_t spectrum = plan.spectrum;
    a = scratch.take<T>(spectrum);
    x = scratch.take<T>(backward || p.heads > 1 ? spectrum : 0);
    sum = scratch.take<T>(backward && p.heads > 1 ? spectrum : 0);
    kernels = scratch.take<T>(group * p.heads * (method.direct ? width + 1 : spectrum));
    kk = scratch.take<T>(method.direct || blocked ? width + 1 : 0);
    dv = scratch.take<T>(backward && gated ? p.heads * p.length : 0);
    pieces = scratch.take<double>(backward ? kDotPieces : 0);
    if (backward) {
      Scratch elsewhere{of.partial};
      sums = Sums<T>(p, plan, dot_count, group, of.partial ? elsewhere : scratch);
    }
    // Rows whose neighbours in memory are other channels are transposed a few at a time.
    const auto view = [&](const Tensor& t, int64_t heads, T* shared = nullptr) {
      View<T> v{&t};
      if (t && group > 1 && t.stride[3] != 1)
        v.panel = shared ? shared : scratch.take<T>(heads * group * pitch);
      return v;
    };
    // A row that is consumed before the result appears lends it its place.
    const bool reuse = !method.direct && !blocked && p.heads == 1;
    u = view(p.u, 1);
    pre = view(p.pre_gate, 1);
    post = view(p.post_gate, p.heads);
    if (!backward) {
      y = view(p.y, p.heads, reuse ? u.panel : nullptr);
    } else {
      dy = view(p.dy, p.heads);
      du = view(p.du, 1, reuse ? dy.panel : nullptr);
      dpre = view(p.dpre_gate, 1);
      dpost = view(p.dpost_gate, p.heads);
    }
  }

  T* kernel(int64_t g, int64_t c) {
    return kernels + (g * p.heads + c) * (method.direct ? width + 1 : plan.spectrum);
  }
  T* dk(int64_t g, int64_t c) { return sums.dk + (g * p.heads + c) * plan.spectrum; }
  double* dots(int64_t g, int64_t c) { return sums.dots + (g * p.heads + c) * dot_count; }

  Series row(const Tensor& t, int64_t b, int64_t c, int64_t g) const {
    if (!t) return {};
    const int64_t at = b * t.stride[0] + c * t.stride[1] + (unit.channel + g) * t.stride[2];
    return {t.data + at * size_of(t.dtype), t.dtype, t.stride[3]};
  }
  Series row(const View<T>& v, int64_t b, int64_t c, int64_t g) const {
    if (!v.panel) return row(*v.tensor, b, c, g);
    return {reinterpret_cast<char*>(v.panel + (c * group + g) * pitch), kDtype<T>, 1};
  }

  // Copies sample b of a view into its panel, or back out.
  template <bool kIn>
  void move(const View<T>& v, int64_t b, int64_t heads) {
    if (!v.panel) return;
    constexpr int64_t kPiece = 1024;
    spread(team, (p.length + kPiece - 1) / kPiece, [&](int64_t begin, int64_t end) {
      end = end * kPiece < p.length ? end * kPiece : p.length;
      for (int64_t c = 0; c < heads; ++c) move_times<kIn>(v, b, c, begin * kPiece, end);
    });
  }

  // Times [begin, end), 4x4 elements at a time where it can.
  template <bool kIn>
  void move_times(const View<T>& v, int64_t b, int64_t c, int64_t begin, int64_t end) const {
    const Tensor& t = *v.tensor;
    const int64_t across = t.stride[2], along = t.stride[3];
    dispatch(t.dtype, [&](auto tag) {
      using S = typename decltype(tag)::Type;
      S* outside = reinterpret_cast<S*>(row(t, b, c, 0).base);
      T* inside = v.panel + c * group * pitch;
      int64_t done = 0;  // channels done four by four
      const int64_t fours = begin + (end - begin) / 4 * 4;
      if constexpr (sizeof(S) == sizeof(T)) {
        if (across == 1) {
          done = unit.channels / 4 * 4;
          for (int64_t i = begin; i < fours; i += 4)
            for (int64_t g = 0; g < done; g += 4) {
              T* there = reinterpret_cast<T*>(outside) + i * along + g;
              T* here = inside + g * pitch + i;
              if constexpr (kIn)
                transpose_block<T>(there, along, here, pitch);
              else
                transpose_block<T>(here, pitch, there, along);
            }
        }
      }
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t g = i < fours ? done : 0; g < unit.channels; ++g) {
          S& there = outside[g * across + i * along];
          T& here = inside[g * pitch + i];
          if constexpr (kIn)
            here = static_cast<T>(widen(there));
          else
            narrow(here, there);
        }
      }
    });
  }

  bool fetches() const { return !blocked && p.length <= kFetchAhead; }
  // What to fetch while channel g of sample b is in work. Of a view that is read as it lies: the
  // row itself, or the one after it, in the next channel or sample. Of a panel: its part of the
  // lines that the panel is copied to, or that the next is copied from.
  Ahead::Lines lines(const View<T>& v, int64_t b, int64_t g, bool after, int64_t c = 0) const {
    const Tensor& t = *v.tensor;
    if (!t) return {};
    if (v.panel) {
      if (t.stride[2] != 1 || p.heads > 1) return {};
      Series s = row(t, after && b + 1 < unit.batch_end ? b + 1 : b, c, 0);
      const int64_t step = s.stride * size_of(s.dtype);
      return {s.base + g * (p.length / group) * step, step};
    }
    if (after && ++g == unit.channels) {
      g = 0;
      ++b;
    }
    if (b >= unit.batch_end) return {};
    const Series s = row(t, b, c, g);
    return {s.stride == 1 ? s.base : nullptr, 64 * size_of(s.dtype) / static_cast<int>(sizeof(T))};
  }

  Source<T> input(int64_t b, int64_t g) const {
    return {row(u, b, 0, g), row(pre, b, 0, g), p.length};
  }

  // Spectra are started by the first row.
  void clear_dots(bool skip_too) {
    once(team, [&] {
      for (int64_t i = 0; i < group * p.heads; ++i)
        for (int64_t j = skip_too ? 0 : 1; j < dot_count; ++j) sums.dots[i * dot_count + j] = 0;
    });
  }

  // d skip is also the gradient of tap 0, which a direct sum has at hand.
  void move_skip_sums() {
    for (int64_t i = 0; method.direct && p.skip && i < group * p.heads; ++i)
      sums.dots[i * dot_count] += sums.dots[i * dot_count + 1 + reach];
  }

  // Taps of k_rev, backwards, then those of k, or their gradients.
  template <bool kIn>
  void move_taps(const Tensor& k, const Tensor& k_rev, int64_t b, int64_t c, int64_t g, T* taps) {
    Series rev = row(k_rev, b, c, g), fore = row(k, b, c, g);
    if (rev && reach) {
      rev.base += (reach - 1) * rev.stride * size_of(rev.dtype);
      rev.stride = -rev.stride;
      if constexpr (kIn)
        read(rev, 0, reach, taps);
      else
        write(rev, 0, reach, taps);
    }
    if (!fore) return;
    if constexpr (kIn)
      read(fore, 0, p.taps, taps + reach);
    else
      write(fore, 0, p.taps, taps + reach);
  }

  T skip(int64_t c, int64_t g) const {
    T value = 0;
    if (p.skip) read(row(p.skip, 0, c, g), 0, 1, &value);
    return value;
  }

  // The kernels of sample b, each with its skip as part of tap 0.
  void load_kernels(int64_t b) {
    for (int64_t g = 0; g < unit.channels; ++g) {
      for (int64_t c = 0; c < p.heads; ++c) {
        T* to = kernel(g, c);
        if (method.direct || blocked) {
          T* taps = method.direct ? to : kk;
          once(team, [&] {
            taps[reach] = 0;
            move_taps<true>(p.k, p.k_rev, b, c, g, taps);
            taps[reach] += skip(c, g);
          });
          if (method.direct) continue;
          const Source<T> all{{reinterpret_cast<char*>(kk), kDtype<T>, 1}, {}, width};
          enter(plan, team, to, plan.scaled, all);
        } else {
          const Source<T> fore{row(p.k, b, c, g), {}, p.taps};
          Source<T> back{row(p.k_rev, b, c, g), {}, reach, reach - plan.n};
          back.row.base += (reach - 1) * back.row.stride * size_of(back.row.dtype);
          back.row.stride = -back.row.stride;
          enter(plan, team, to, plan.scaled, fore, reach ? &back : nullptr, T(-1));
          // Tap 0 meets every factor with weight 1.
          const T value = skip(c, g) / static_cast<T>(plan.n);
          once(team, [&] {
            for (int r = 0; r < plan.radix; ++r)
              for (int q = 0; q < kQuads<T>; ++q) to[r * plan.vectors * kStep<T> + 4 * q] += value;
          });
        }
        Task<T> task(to);
        task.join = false;
        if (fetches() && c + 1 == p.heads) {
          const bool last = g + 1 == unit.channels;
          const Series next = last ? row(u, b, 0, 0) : row(p.k, b, 0, g + 1);
          if (T* first = contiguous<T>(next))
            task.ahead.will_read({reinterpret_cast<const char*>(first), 64});
        }
        run_task(plan, task, team);
      }
    }
  }

  // The first pass of block j of the input of v.
  void enter_input(T* to, const Source<T>& in, int64_t j) {
    if (!blocked) return enter(plan, team, to, plan.plain, in);
    const Source<T> now = in.at(j * plan.n + reach), before = now.at(-plan.n);
    enter(plan, team, to, plan.plain, now, &before, T(-1));
  }
  // The same of the gradient of v, for the gradient of its input.
  void enter_gradient(T* to, const Source<T>& in, int64_t j) {
    if (!blocked) return enter(plan, team, to, plan.plain, in);
    const Source<T> now = in.at(j * plan.n - reach), after = now.at(plan.n);
    enter(plan, team, to, plan.plain, now, &after);
  }
};

// ---- direct sums ----

constexpr int64_t kDirectChunk = 256;

// out[i] (+)= sum_j kk[j] x[i + width - 1 - j], or, flipped, sum_j kk[j] x[i + j]; i <
// kDirectChunk.
template <bool kFlipped, class T>
void direct_chunk(const T* kk, int64_t width, const T* x, T* out, bool add) {
  using V = typename VectorOf<T>::Unaligned;
  constexpr int kAtOnce = 4;
  for (int64_t i = 0; i < kDirectChunk; i += kAtOnce * kLanes<T>) {
    Vec<T> acc[kAtOnce];
    SEQCONV_UNROLL
    for (int v = 0; v < kAtOnce; ++v)
      acc[v] = add ? *reinterpret_cast<const V*>(out + i + v * kLanes<T>) : Vec<T>{};
    for (int64_t j = 0; j < width; ++j) {
      const Vec<T> tap = splat(kk[j]);
      const T* from = x + i + (kFlipped ? j : width - 1 - j);
      SEQCONV_UNROLL
      for (int v = 0; v < kAtOnce; ++v)
        acc[v] += tap * *reinterpret_cast<const V*>(from + v * kLanes<T>);
    }
    SEQCONV_UNROLL
    for (int v = 0; v < kAtOnce; ++v) *reinterpret_cast<V*>(out + i + v * kLanes<T>) = acc[v];
  }
}

// sum_i a[i] b[i], i < n
template <class T>
double dot(const T* a, const T* b, int64_t n) {
  using V = typename VectorOf<T>::Unaligned;
  Vec<T> acc[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes<T> <= n; i += 4 * kLanes<T>) {
    SEQCONV_UNROLL
    for (int v = 0; v < 4; ++v)
      acc[v] += *reinterpret_cast<const V*>(a + i + v * kLanes<T>) *
                *reinterpret_cast<const V*>(b + i + v * kLanes<T>);
  }
  T rest = 0;
  for (; i < n; ++i) rest += a[i] * b[i];
  const Vec<T> both = (acc[0] + acc[1]) + (acc[2] + acc[3]);
  double sum = static_cast<double>(rest);
  for (int lane = 0; lane < kLanes<T>; ++lane) sum += static_cast<double>(both[lane]);
  return sum;
}

constexpr int64_t kDirectWindow = kDirectChunk + kDirectTaps;

template <class T>
void direct_forward(const Work<T>& w, const T* kk, const Source<T>& in, const Sink<T>& sink) {
  alignas(64) T window[kDirectWindow], staging[kDirectChunk];
  for (int64_t t = 0; t < w.p.length; t += kDirectChunk) {
    const int64_t n = w.p.length - t < kDirectChunk ? w.p.length - t : kDirectChunk;
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
  for (int64_t t = 0; t < w.p.length; t += kDirectChunk) {
    const int64_t n = w.p.length - t < kDirectChunk ? w.p.length - t : kDirectChunk;
    const T* x = in.window(t + w.reach + 1 - w.width, kDirectChunk + w.width - 1, window);
    const T* dv = grad.window(t, n, staging);
    for (int64_t j = 0; j < w.width; ++j) dots[j] += dot(dv, x + w.width - 1 - j, n);
  }
}

// ---- what follows the convolution, kChunk values at a time ----

template <class T>
struct Epilogue {
  Activation activation;
  Series post_gate, y;           // forward
  Series dy, dpost_gate;         // backward
  T* dv = nullptr;               //
  Series u, pre_gate, du, dpre;  // of x

  // y = post_gate * activation(v)
  static void forward(const void* context, int64_t t, int64_t n, T* v) {
    const Epilogue& e = *static_cast<const Epilogue*>(context);
    Vec<T> slope;
    if (e.activation != Activation::kNone)
      for (int64_t i = 0; i < n; i += kLanes<T>) {
        Vec<T>& at = *reinterpret_cast<Vec<T>*>(v + i);
        at = activate<T>(e.activation, at, slope);
      }
    if (!e.post_gate) return write(e.y, t, n, v);
    T gate[kChunk];
    write_product(e.y, t, n, v, read_window(e.post_gate, t, n, gate));
  }

  // dv = dy * post_gate * activation'(v), dpost_gate = dy * activation(v)
  static void backward(const void* context, int64_t t, int64_t n, T* v) {
    const Epilogue& e = *static_cast<const Epilogue*>(context);
    alignas(64) T slopes[kChunk], staging[2][kChunk];
    const T* grad = read_window(e.dy, t, n, staging[0]);
    const bool active = e.activation != Activation::kNone;
    for (int64_t i = 0; active && i < n; i += kLanes<T>) {
      Vec<T>& at = *reinterpret_cast<Vec<T>*>(v + i);
      at = activate<T>(e.activation, at, *reinterpret_cast<Vec<T>*>(slopes + i));
    }
    if (e.dpost_gate) write_product(e.dpost_gate, t, n, grad, v);
    if (active) {
      multiply(grad, slopes, n, e.dv + t);
      grad = e.dv + t;
    }
    if (e.post_gate)
      multiply(grad, read_window(e.post_gate, t, n, staging[1]), n, e.dv + t);
    else if (!active)
      copy(grad, n, e.dv + t);
  }

  // du = dx * pre_gate, dpre_gate = dx * u
  static void input(const void* context, int64_t t, int64_t n, T* dx) {
    const Epilogue& e = *static_cast<const Epilogue*>(context);
    T staging[kChunk];
    if (e.dpre) write_product(e.dpre, t, n, dx, read_window(e.u, t, n, staging));
    if (!e.du) return;
    if (e.pre_gate)
      write_product(e.du, t, n, dx, read_window(e.pre_gate, t, n, staging));
    else
      write(e.du, t, n, dx);
  }
};

// ---- forward ----

// v of channel g and head c of sample b, to sink; `spectrum` is that of the input, if known.
template <class T>
void convolve(Work<T>& w, int64_t g, int64_t c, const Source<T>& in, const T* spectrum,
              const Sink<T>& sink, const Ahead& ahead) {
  if (w.method.direct) return direct_forward(w, w.kernel(g, c), in, sink);
  for (int64_t j = 0; j < w.method.blocks; ++j) {
    Task<T> task(w.a);
    task.source = spectrum;
    task.split = !spectrum;
    task.factor = w.kernel(g, c);
    task.ahead = ahead;
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
        task.ahead = ahead;
        run_task(plan, task, w.team);
      }
      for (int64_t c = 0; c < p.heads; ++c) {
        Epilogue<T> epilogue{};
        epilogue.activation = p.activation;
        epilogue.post_gate = w.row(w.post, b, c, g);
        epilogue.y = w.row(w.y, b, c, g);
        Sink<T> sink{epilogue.y, p.length};
        if (w.gated) {
          sink.function = Epilogue<T>::forward;
          sink.context = &epilogue;
        }
        convolve(w, g, c, in, shared ? w.x : nullptr, sink, ahead);
      }
    }
    w.template move<false>(w.y, b, p.heads);
  }
}

// ---- backward ----

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
    if (w.fetches()) {
      task.ahead.will_read(w.lines(w.dy, b, g, false));
      task.ahead.will_read(w.lines(w.post, b, g, false));
      task.ahead.will_write(w.lines(w.dpost, b, g, false));
    }
    run_task(plan, task, w.team);
  }

  // The gradient of v, per head, is dy, or made from v and kept.
  const auto gradient = [&](int64_t c) -> Source<T> {
    if (!w.gated) return {w.row(w.dy, b, c, g), {}, p.length};
    return {{reinterpret_cast<char*>(w.dv + c * p.length), kDtype<T>, 1}, {}, p.length};
  };
  for (int64_t c = 0; c < p.heads; ++c) {
    if (w.gated) {
      Epilogue<T> epilogue{};
      epilogue.activation = p.activation;
      epilogue.post_gate = w.row(w.post, b, c, g);
      epilogue.dy = w.row(w.dy, b, c, g);
      epilogue.dpost_gate = w.row(w.dpost, b, c, g);
      epilogue.dv = w.dv + c * p.length;
      const Sink<T> sink{{}, p.length, 0, Epilogue<T>::backward, &epilogue};
      Ahead ahead;
      convolve<T>(w, g, c, in, early ? w.x : nullptr, sink, ahead);
    }
    if (direct && (wanted.dk || wanted.dskip))
      direct_dots(w, in, gradient(c), w.dots(g, c) + 1);
    else if (wanted.dskip)
      add_dot(w, in, gradient(c), w.dots(g, c));
  }

  Epilogue<T> epilogue{};
  epilogue.u = w.row(w.u, b, 0, g);
  epilogue.pre_gate = w.row(w.pre, b, 0, g);
  epilogue.du = w.row(w.du, b, 0, g);
  epilogue.dpre = w.row(w.dpre, b, 0, g);
  Sink<T> dx{epilogue.du, p.length};
  if (epilogue.dpre || epilogue.pre_gate) {
    dx.function = Epilogue<T>::input;
    dx.context = &epilogue;
  }

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
  if (!wanted.dx && !wanted.dk) return;
  for (int64_t j = 0; j < w.method.blocks; ++j) {
    const bool with_x = wanted.dk && !early;
    if (with_x) enter(plan, w.team, w.x, plan.plain, in.at(j * plan.n));
    const bool single = p.heads == 1;
    for (int64_t c = 0; c < p.heads; ++c) {
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
      if (w.fetches() && c + 1 == p.heads) {
        task.ahead.will_read(w.lines(w.u, b, g, true));
        task.ahead.will_read(w.lines(w.pre, b, g, true));
        if (!w.gated) task.ahead.will_read(w.lines(w.dy, b, g, true));
        task.ahead.will_write(w.lines(w.du, b, g, false));
        task.ahead.will_write(w.lines(w.dpre, b, g, false));
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
    const Sink<T> combined{{reinterpret_cast<char*>(w.kk), kDtype<T>, 1}, w.width};
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
  if (!p.kernel_per_sample) w.load_kernels(0);
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
    for (int64_t s = 0; wanted.dk && s < p.heads * plan.spectrum; ++s) w.sums.dk[s] += more.dk[s];
    for (int64_t s = 0; s < p.heads * w.dot_count; ++s) w.sums.dots[s] += more.dots[s];
  }
  store_sums(w, wanted, 0);
}

template <class T>
size_t scratch_bytes(const Problem& p, const Method& method, const Transform<T>& plan,
                     const Unit& unit, bool backward) {
  Scratch scratch{nullptr};
  const Work<T> w(p, method, plan, unit, backward, scratch);
  return scratch.used;
}

template <class T>
constexpr Kernel<T> kKernel = {kQuads<T>,       scratch_bytes<T>, partial_bytes<T>,
                               forward_unit<T>, backward_unit<T>, reduce<T>};
