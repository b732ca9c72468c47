// One unit of work of the convolution and of its gradient. Included inside an instruction set's
// namespace.

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

// Everything below works on lanes; a "row" is `length` vectors, a "spectrum" n complex vectors.
template <class T>
struct Workspace {
  const Problem& p;
  const Transform<T>& plan;
  Unit unit{};
  bool direct, gated;
  Vec<T>*x, *v, *gate, *dy, *dx;  // rows
  Vec<T>*taps, *taps_rev;         // of every head
  double* sums;  // lanes of dot products; per head: d skip, then direct gradients of every tap
  int64_t dots;
  Complex<T>*spectrum, *work, *kernel, *dx_spectrum, *dk_spectrum;

  Workspace(const Problem& problem, const Transform<T>& transform, bool backward, Scratch& scratch)
      : p(problem), plan(transform) {
    direct = p.taps + p.taps_rev <= kDirectTaps;
    gated = p.post_gate || p.activation != Activation::kNone;
    const int64_t kernel_sets = p.heads, length = p.length, n = plan.n;
    x = scratch.take<Vec<T>>(length);
    v = scratch.take<Vec<T>>(length);
    gate = scratch.take<Vec<T>>(p.pre_gate || p.post_gate ? length : 0);
    dy = scratch.take<Vec<T>>(backward && gated ? length : 0);
    dx = scratch.take<Vec<T>>(backward ? length : 0);
    taps = scratch.take<Vec<T>>(direct ? kernel_sets * p.taps : p.taps);
    taps_rev = scratch.take<Vec<T>>(direct ? kernel_sets * p.taps_rev : p.taps_rev);
    dots = 1 + (direct ? p.taps + p.taps_rev : 0);
    sums = scratch.take<double>(backward ? p.heads * dots * kLanes<T> : 0);
    spectrum = scratch.take<Complex<T>>(direct ? 0 : n);
    work = scratch.take<Complex<T>>(direct ? 0 : n);
    kernel = scratch.take<Complex<T>>(direct ? 0 : kernel_sets * n);
    dx_spectrum = scratch.take<Complex<T>>(direct || !backward ? 0 : n);
    dk_spectrum = scratch.take<Complex<T>>(direct || !backward ? 0 : kernel_sets * n);
  }

  double* head_sums(int64_t c) { return sums + c * dots * kLanes<T>; }

  void clear_sums() {
    for (int64_t i = 0; i < p.heads * dots * kLanes<T>; ++i) sums[i] = 0;
    for (int64_t i = 0; i < p.heads * plan.n && !direct; ++i) dk_spectrum[i] = Complex<T>{};
  }

  // Keeps the sums of d skip.
  void clear_kernel_sums() {
    for (int64_t c = 0; c < p.heads; ++c)
      for (int64_t i = kLanes<T>; i < dots * kLanes<T>; ++i) head_sums(c)[i] = 0;
    for (int64_t i = 0; i < p.heads * plan.n && !direct; ++i) dk_spectrum[i] = Complex<T>{};
  }

  Row row(const Tensor& t, int64_t b, int64_t c = 0) const { return {&t, b, c}; }

  // x = pre_gate * u
  void load_input(int64_t b) {
    load<T>(row(p.u, b), unit, p.length, x);
    if (!p.pre_gate) return;
    load<T>(row(p.pre_gate, b), unit, p.length, gate);
    for (int64_t t = 0; t < p.length; ++t) x[t] *= gate[t];
  }

  void transform_row(const Vec<T>* in, Complex<T>* out) {
    for (int64_t t = 0; t < p.length; ++t) out[t] = {in[t], Vec<T>{}};
    for (int64_t t = p.length; t < plan.n; ++t) out[t] = Complex<T>{};
    transform<true>(plan, out, plan.n);
  }

  // kernel <- spectrum of (k[t] - i k_rev[n-t-1]) / n for every head; or just the taps for a direct
  // sum.
  void load_kernel(int64_t b) {
    const T scale = T(1) / static_cast<T>(plan.n);
    for (int64_t c = 0; c < p.heads; ++c) {
      Vec<T>* k = taps + (direct ? c * p.taps : 0);
      Vec<T>* k_rev = taps_rev + (direct ? c * p.taps_rev : 0);
      load<T>(row(p.k, b, c), unit, p.taps, k);
      if (p.taps_rev) load<T>(row(p.k_rev, b, c), unit, p.taps_rev, k_rev);
      if (direct) continue;
      Complex<T>* q = kernel + c * plan.n;
      for (int64_t t = 0; t < p.taps; ++t) q[t] = {k[t] * scale, Vec<T>{}};
      for (int64_t t = p.taps; t < plan.n; ++t) q[t] = Complex<T>{};
      for (int64_t m = 1; m <= p.taps_rev; ++m) q[plan.n - m].im = k_rev[m - 1] * -scale;
      transform<true>(plan, q, plan.n);
    }
  }

  Vec<T> load_skip(int64_t c) const {
    Vec<T> value = {};
    if (p.skip) load<T>(row(p.skip, 0, c), unit, 1, &value);
    return value;
  }

  // v = k * x + skip x, from x and, unless direct, its spectrum; `in_place` may overwrite the
  // spectrum.
  void convolve(int64_t c, bool in_place) {
    if (direct) {
      const Vec<T>*k = taps + c * p.taps, *k_rev = taps_rev + c * p.taps_rev;
      for (int64_t t = 0; t < p.length; ++t) {
        Vec<T> sum = {};
        for (int64_t j = 0; j < p.taps && j <= t; ++j) sum += k[j] * x[t - j];
        for (int64_t m = 1; m <= p.taps_rev && t + m < p.length; ++m)
          sum += k_rev[m - 1] * x[t + m];
        v[t] = sum;
      }
    } else {
      Complex<T>* to = in_place ? spectrum : work;
      const Complex<T>* q = kernel + c * plan.n;
      for (int64_t f = 0; f < plan.n; ++f) to[f] = spectrum[f] * q[f];
      transform<false>(plan, to, plan.n);
      for (int64_t t = 0; t < p.length; ++t) v[t] = to[t].re;
    }
    if (!p.skip) return;
    const Vec<T> skip = load_skip(c);
    for (int64_t t = 0; t < p.length; ++t) v[t] += skip * x[t];
  }
};

template <class T>
void forward_unit(const Problem& p, const Transform<T>& plan, const Unit& unit, void* memory) {
  Scratch scratch{static_cast<char*>(memory)};
  Workspace<T> w(p, plan, false, scratch);
  w.unit = unit;
  if (!p.kernel_per_sample) w.load_kernel(0);
  for (int64_t b = unit.batch; b < unit.batch_end; ++b) {
    if (p.kernel_per_sample) w.load_kernel(b);
    w.load_input(b);
    if (!w.direct) w.transform_row(w.x, w.spectrum);
    for (int64_t c = 0; c < p.heads; ++c) {
      w.convolve(c, p.heads == 1);
      if (w.gated) {
        if (p.post_gate) load<T>(w.row(p.post_gate, b, c), unit, p.length, w.gate);
        Vec<T> slope;
        for (int64_t t = 0; t < p.length; ++t) {
          w.v[t] = activate<T>(p.activation, w.v[t], slope);
          if (p.post_gate) w.v[t] *= w.gate[t];
        }
      }
      store<T>(w.row(p.y, b, c), unit, p.length, w.v);
    }
  }
}

// sums[lane] += sum_t a[t] b[t]: short runs in T, then double, so that long rows do not lose
// digits.
template <class T>
void add_dot(const Vec<T>* a, const Vec<T>* b, int64_t n, double* sums) {
  constexpr int64_t kRun = 64;
  for (int64_t t0 = 0; t0 < n; t0 += kRun) {
    const int64_t end = t0 + kRun < n ? t0 + kRun : n;
    Vec<T> run = {};
    for (int64_t t = t0; t < end; ++t) run += a[t] * b[t];
    for (int lane = 0; lane < kLanes<T>; ++lane) sums[lane] += static_cast<double>(run[lane]);
  }
}

template <class T>
SEQCONV_INLINE Vec<T> from_sums(const double* sums) {
  Vec<T> value;
  for (int lane = 0; lane < kLanes<T>; ++lane) value[lane] = static_cast<T>(sums[lane]);
  return value;
}

// What one sample and head add to the gradients; leaves dv, the gradient of v, in w.v.
template <class T>
void backward_row(Workspace<T>& w, int64_t b, int64_t c, bool want_dx, bool want_dk) {
  const Problem& p = w.p;
  const int64_t length = p.length;
  if (w.gated) {
    w.convolve(c, false);
    load<T>(w.row(p.dy, b, c), w.unit, length, w.dy);
    if (p.post_gate) load<T>(w.row(p.post_gate, b, c), w.unit, length, w.gate);
    for (int64_t t = 0; t < length; ++t) {
      Vec<T> slope, grad = w.dy[t];
      const Vec<T> activated = activate<T>(p.activation, w.v[t], slope);
      if (p.post_gate) {
        w.dy[t] = grad * activated;
        grad *= w.gate[t];
      }
      w.v[t] = grad * slope;
    }
    if (p.dpost_gate) store<T>(w.row(p.dpost_gate, b, c), w.unit, length, w.dy);
  } else {
    load<T>(w.row(p.dy, b, c), w.unit, length, w.v);
  }

  double* sums = w.head_sums(c);
  if (p.dskip) add_dot<T>(w.v, w.x, length, sums);
  if (want_dx && p.skip) {
    const Vec<T> skip = w.load_skip(c);
    for (int64_t t = 0; t < length; ++t) w.dx[t] += skip * w.v[t];
  }
  if (w.direct) {
    if (want_dx) {
      const Vec<T>*k = w.taps + c * p.taps, *k_rev = w.taps_rev + c * p.taps_rev;
      for (int64_t s = 0; s < length; ++s) {
        Vec<T> sum = {};
        for (int64_t j = 0; j < p.taps && s + j < length; ++j) sum += k[j] * w.v[s + j];
        for (int64_t m = 1; m <= p.taps_rev && m <= s; ++m) sum += k_rev[m - 1] * w.v[s - m];
        w.dx[s] += sum;
      }
    }
    if (!want_dk) return;
    sums += kLanes<T>;
    for (int64_t j = 0; j < p.taps; ++j, sums += kLanes<T>)
      add_dot<T>(w.v + j, w.x, length - j, sums);
    for (int64_t m = 1; m <= p.taps_rev; ++m, sums += kLanes<T>)
      add_dot<T>(w.v, w.x + m, length - m, sums);
    return;
  }
  if (!want_dx && !want_dk) return;
  const int64_t n = w.plan.n;
  w.transform_row(w.v, w.work);
  if (want_dk) {
    Complex<T>* dk = w.dk_spectrum + c * n;
    for (int64_t f = 0; f < n; ++f) dk[f] = dk[f] + w.work[f] * conj(w.spectrum[f]);
  }
  if (want_dx) {
    const Complex<T>* q = w.kernel + c * n;
    for (int64_t f = 0; f < n; ++f) w.dx_spectrum[f] = w.dx_spectrum[f] + w.work[f] * conj(q[f]);
  }
}

template <class T>
void store_kernel_gradient(Workspace<T>& w, int64_t b) {
  const Problem& p = w.p;
  const int64_t n = w.plan.n;
  const T scale = T(1) / static_cast<T>(n);
  for (int64_t c = 0; c < p.heads; ++c) {
    if (w.direct) {
      const double* sums = w.head_sums(c) + kLanes<T>;
      for (int64_t j = 0; j < p.taps; ++j, sums += kLanes<T>) w.taps[j] = from_sums<T>(sums);
      for (int64_t m = 0; m < p.taps_rev; ++m, sums += kLanes<T>)
        w.taps_rev[m] = from_sums<T>(sums);
    } else {
      Complex<T>* dk = w.dk_spectrum + c * n;
      transform<false>(w.plan, dk, n);
      for (int64_t t = 0; t < p.taps; ++t) w.taps[t] = dk[t].re * scale;
      for (int64_t m = 1; m <= p.taps_rev; ++m) w.taps_rev[m - 1] = dk[n - m].im * -scale;
    }
    if (p.dk) store<T>(w.row(p.dk, b, c), w.unit, p.taps, w.taps);
    if (p.dk_rev) store<T>(w.row(p.dk_rev, b, c), w.unit, p.taps_rev, w.taps_rev);
  }
}

// A unit of the gradient takes the whole batch, so that sums over it have one fixed order.
template <class T>
void backward_unit(const Problem& p, const Transform<T>& plan, const Unit& unit, void* memory) {
  Scratch scratch{static_cast<char*>(memory)};
  Workspace<T> w(p, plan, true, scratch);
  w.unit = unit;
  const bool want_dx = p.du || p.dpre_gate, want_dk = p.dk || p.dk_rev;
  w.clear_sums();
  if (!p.kernel_per_sample) w.load_kernel(0);
  for (int64_t b = unit.batch; b < unit.batch_end; ++b) {
    if (p.kernel_per_sample) w.load_kernel(b);
    w.load_input(b);
    if (!w.direct) {
      if (w.gated || want_dk) w.transform_row(w.x, w.spectrum);
      for (int64_t f = 0; f < plan.n && want_dx; ++f) w.dx_spectrum[f] = Complex<T>{};
    }
    for (int64_t t = 0; t < p.length; ++t) w.dx[t] = Vec<T>{};
    for (int64_t c = 0; c < p.heads; ++c) backward_row(w, b, c, want_dx, want_dk);
    if (want_dx) {
      if (!w.direct) {
        transform<false>(plan, w.dx_spectrum, plan.n);
        for (int64_t t = 0; t < p.length; ++t) w.dx[t] += w.dx_spectrum[t].re;
      }
      if (p.dpre_gate) {
        load<T>(w.row(p.u, b), unit, p.length, w.v);
        for (int64_t t = 0; t < p.length; ++t) w.v[t] *= w.dx[t];
        store<T>(w.row(p.dpre_gate, b), unit, p.length, w.v);
      }
      if (p.du && p.pre_gate) {
        load<T>(w.row(p.pre_gate, b), unit, p.length, w.gate);
        for (int64_t t = 0; t < p.length; ++t) w.dx[t] *= w.gate[t];
      }
      if (p.du) store<T>(w.row(p.du, b), unit, p.length, w.dx);
    }
    if (want_dk && p.kernel_per_sample) {
      store_kernel_gradient(w, b);
      w.clear_kernel_sums();
    }
  }
  if (want_dk && !p.kernel_per_sample) store_kernel_gradient(w, 0);
  if (!p.dskip) return;
  for (int64_t c = 1; c < p.heads && !p.skip_per_head; ++c)
    for (int lane = 0; lane < kLanes<T>; ++lane) w.sums[lane] += w.head_sums(c)[lane];
  for (int64_t c = 0; c < (p.skip_per_head ? p.heads : 1); ++c) {
    const Vec<T> value = from_sums<T>(w.head_sums(c));
    store<T>(w.row(p.dskip, 0, c), unit, 1, &value);
  }
}

template <class T>
size_t scratch_bytes(const Problem& p, int64_t n, bool backward) {
  Scratch scratch{nullptr};
  Transform<T> transform;
  transform.n = n;
  Workspace<T> w(p, transform, backward, scratch);
  return scratch.used;
}

template <class T>
constexpr Kernel<T> kKernel = {kLanes<T>, scratch_bytes<T>, forward_unit<T>, backward_unit<T>};
