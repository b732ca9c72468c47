// A unit's memory: scratch, panels of channels-last tensors, spectra of the kernels, sums; and its
// rows' way into a transform and back. Part of fftconv_unit.h.

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
  const Tensor* tensor = nullptr;
  T* panel = nullptr;     // transposed copy, (heads, channels, length), of one sample of the unit
  bool streamed = false;  // a result too large to be found in cache by whoever reads it
};

constexpr int64_t kDotPieces = 32;
// Results from so many bytes on are streamed, where rows are not short and there is more to write
// than what the last pass leaves in passing; with gates, for which lines wait, shorter rows, too.
constexpr int64_t kStreamBytes = 1 << 23;
constexpr int64_t kStreamLength = 1024, kStreamGated = 256;
// Rows up to here are fetched while the last is in work; with gates there is more to wait for.
constexpr int64_t kFetchAhead = 1 << 15, kFetchGated = 1 << 18;

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
    const int64_t shortest = p.pre_gate || p.post_gate ? kStreamGated : kStreamLength;
    const bool more = gated || p.pre_gate || p.heads > 1;
    const auto result = [&](const Tensor& t, int64_t heads, T* shared = nullptr) {
      View<T> v = view(t, heads, shared);
      v.streamed = kStreams && p.length >= shortest && t.dtype == kDtype<T> &&
                   p.batch * heads * p.channels * p.length * size_of(t.dtype) >= kStreamBytes &&
                   (v.panel ? is_pair(t) : more && t.stride[3] == 1);
      return v;
    };
    // A row that is consumed before the result appears lends it its place.
    const bool reuse = !method.direct && !blocked && p.heads == 1;
    u = view(p.u, 1);
    pre = view(p.pre_gate, 1);
    post = view(p.post_gate, p.heads);
    if (!backward) {
      y = result(p.y, p.heads, reuse ? u.panel : nullptr);
    } else {
      dy = view(p.dy, p.heads);
      du = result(p.du, 1, reuse ? dy.panel : nullptr);
      dpre = result(p.dpre_gate, 1);
      dpost = result(p.dpost_gate, p.heads);
    }
  }

  T* kernel(int64_t g, int64_t c) {
    return kernels + (g * p.heads + c) * (method.direct ? width + 1 : plan.spectrum);
  }
  T* dk(int64_t g, int64_t c) { return sums.dk + (g * p.heads + c) * plan.spectrum; }
  double* dots(int64_t g, int64_t c) { return sums.dots + (g * p.heads + c) * dot_count; }

  // Made where they are wanted: a row copied soon after it was written would wait for the writes.
  Series row(const Tensor& t, int64_t b, int64_t c, int64_t g, bool streamed = false) const {
    const int64_t at = b * t.stride[0] + c * t.stride[1] + (unit.channel + g) * t.stride[2];
    return t ? Series{t.data + at * size_of(t.dtype), t.dtype, t.stride[3], streamed} : Series{};
  }
  Series row(const View<T>& v, int64_t b, int64_t c, int64_t g) const {
    return v.panel ? own_row(v.panel + (c * group + g) * pitch)
                   : row(*v.tensor, b, c, g, v.streamed);
  }
  static Series own_row(T* at) { return {reinterpret_cast<char*>(at), kDtype<T>, 1}; }

  // Whether the unit's rows are two channels that are all there are.
  bool is_pair(const Tensor& t) const {
    return unit.channels == 2 && t.stride[2] == 1 && t.stride[3] == 2;
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

  // Times [begin, end), pairs or 4x4 elements at a time where it can.
  template <bool kIn>
  void move_times(const View<T>& v, int64_t b, int64_t c, int64_t begin, int64_t end) const {
    const Tensor& t = *v.tensor;
    const int64_t across = t.stride[2], along = t.stride[3];
    dispatch(t.dtype, [&](auto tag) {
      using S = typename decltype(tag)::Type;
      S* outside = reinterpret_cast<S*>(row(t, b, c, 0).base);
      T* inside = v.panel + c * group * pitch;
      int64_t done = 0, until = begin;  // channels and times that whole vectors have done
      if constexpr (sizeof(S) == sizeof(T)) {
        if (is_pair(t)) {
          T* there = reinterpret_cast<T*>(outside) + 2 * until;
          const bool past = v.streamed && reinterpret_cast<uintptr_t>(there) % sizeof(Vec<T>) == 0;
          done = 2;
          for (; until + kLanes<T> <= end; until += kLanes<T>, there += 2 * kLanes<T>)
            move_pair<kIn>(there, inside + until, past);
        } else if (across == 1) {
          done = unit.channels / 4 * 4;
          for (; until + 4 <= end; until += 4)
            for (int64_t g = 0; g < done; g += 4) {
              T* there = reinterpret_cast<T*>(outside) + until * along + g;
              T* here = inside + g * pitch + until;
              if constexpr (kIn)
                transpose_block<T>(there, along, here, pitch);
              else
                transpose_block<T>(here, pitch, there, along);
            }
        }
      }
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t g = i < until ? done : 0; g < unit.channels; ++g) {
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

  // A vector of each of the two channels of a pair; `past` the caches, if told so.
  template <bool kIn>
  void move_pair(T* there, T* here, bool past) const {
    using V = typename VectorOf<T>::Unaligned;
    const auto at = [](T* p) -> V& { return *reinterpret_cast<V*>(p); };
    if constexpr (kIn) {
      const Vec<T> low = at(there), high = at(there + kLanes<T>);
      at(here) = shuffle<Unzip<0>, T>(low, high);
      at(here + pitch) = shuffle<Unzip<1>, T>(low, high);
    } else {
      const Vec<T> even = at(here), odd = at(here + pitch);
      const Vec<T> low = shuffle<Zip<0>, T>(even, odd), high = shuffle<Zip<1>, T>(even, odd);
      if (past) {
        stream<T>(there, low);
        stream<T>(there + kLanes<T>, high);
      } else {
        at(there) = low;
        at(there + kLanes<T>) = high;
      }
    }
  }

  bool fetches() const {
    return !blocked && p.length <= (p.pre_gate || p.post_gate ? kFetchGated : kFetchAhead);
  }
  bool fetches_blocks() const { return blocked && plan.n <= kFetchAhead; }
  // What to fetch while channel g of sample b is in work. Of a view that is read as it lies: the
  // row itself, or the one after it, in the next channel or sample. Of a panel: its part of the
  // lines that the panel is copied to, or that the next is copied from.
  Ahead::Lines lines(const View<T>& v, int64_t b, int64_t g, bool after, int64_t c = 0) const {
    const Tensor& t = *v.tensor;
    if (!t || v.streamed) return {};
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

  // A row as it lies, from time t on.
  static Ahead::Lines lines(const Series& s, int64_t t = 0) {
    if (!s || s.stride != 1 || s.streamed) return {};
    const int64_t size = size_of(s.dtype);
    return {s.base + t * size, 64 * size / static_cast<int>(sizeof(T))};
  }

  // What follows the last row of a unit.
  Ahead::Lines next_kernel(int64_t b, int64_t g) const {
    if (unit.next < 0 || b + 1 < unit.batch_end || g + 1 < unit.channels) return {};
    return lines(row(p.k, p.kernel_per_sample ? unit.batch : 0, 0, unit.next - unit.channel));
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
          const Source<T> all{own_row(kk), {}, width};
          enter(plan, team, to, plan.scaled, all);
        } else {
          const Source<T> fore{row(p.k, b, c, g), {}, p.taps};
          if (reach) {
            const Series rev = row(p.k_rev, b, c, g);
            const int64_t last = (reach - 1) * rev.stride * size_of(rev.dtype);
            const Source<T> back{
                {rev.base + last, rev.dtype, -rev.stride}, {}, reach, reach - plan.n};
            enter(plan, team, to, plan.scaled, fore, &back, T(-1));
          } else {
            enter(plan, team, to, plan.scaled, fore);
          }
          // Tap 0 meets every factor with weight 1.
          const T value = skip(c, g) / static_cast<T>(plan.n);
          if (p.skip) {
            once(team, [&] {
              for (int r = 0; r < plan.radix; ++r)
                for (int q = 0; q < kQuads<T>; ++q)
                  to[r * plan.vectors * kStep<T> + 4 * q] += value;
            });
          }
        }
        Task<T> task(to);
        task.join = false;
        Ahead ahead;
        if (fetches()) task.ahead = &ahead;
        if (fetches() && c + 1 < p.heads) {
          ahead.will_read(lines(row(p.k, b, c + 1, g)));
        } else if (fetches() && g + 1 < unit.channels) {
          ahead.will_read(lines(row(p.k, b, 0, g + 1)));
        } else if (fetches()) {
          const int64_t sample = p.kernel_per_sample ? b : unit.batch;
          ahead.will_read(lines(u, sample, 0, false));
          ahead.will_read(lines(pre, sample, 0, false));
          if (dy.tensor) ahead.will_read(lines(dy, sample, 0, false));
        }
        run_task(plan, task, team);
      }
    }
  }

  // The first pass of block j of a row.
  void enter_block(T* to, const Source<T>& in, int64_t j) {
    if (!blocked) return enter(plan, team, to, plan.plain, in);
    enter(plan, team, to, plan.plain, in.at(j * plan.n));
  }
  // The same of the input of v, for v.
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
