// Rows of tensors as the transform reads and writes them: any dtype, any stride, products with
// gates, zeros outside. Where memory already holds what is wanted nothing is copied. Included
// inside an instruction set's namespace, after vectors.h.

// One row: time t at base + t * stride elements.
struct Series {
  char* base = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t stride = 0;
  bool streamed = false;  // written past the caches
  explicit operator bool() const { return base != nullptr; }
};

template <class T>
constexpr Dtype kDtype = sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kFloat64;

template <class T>
SEQCONV_INLINE T* contiguous(const Series& s) {
  return s.base && s.dtype == kDtype<T> && s.stride == 1 ? reinterpret_cast<T*>(s.base) : nullptr;
}

// out[i] = value(i), i < n; value.many(i): as many as a vector has.
template <class T, class Value>
SEQCONV_INLINE void put(const Value& value, int64_t n, T* out, bool streamed) {
  int64_t i = 0;
  if (kStreams && streamed) {
    for (; i < n && reinterpret_cast<uintptr_t>(out + i) % 64; ++i) out[i] = value.one(i);
    for (; i + kLanes<T> <= n; i += kLanes<T>) stream<T>(out + i, value.many(i));
  }
  for (; i + kLanes<T> <= n; i += kLanes<T>)
    *reinterpret_cast<typename VectorOf<T>::Unaligned*>(out + i) = value.many(i);
  for (; i < n; ++i) out[i] = value.one(i);
}
template <class T>
struct Plain {
  const T* x;
  T one(int64_t i) const { return x[i]; }
  Vec<T> many(int64_t i) const {
    return *reinterpret_cast<const typename VectorOf<T>::Unaligned*>(x + i);
  }
};
template <class T>
struct Product {
  Plain<T> a, b;
  T one(int64_t i) const { return a.one(i) * b.one(i); }
  Vec<T> many(int64_t i) const { return a.many(i) * b.many(i); }
};
template <class T>
SEQCONV_INLINE void copy(const T* x, int64_t n, T* out, bool streamed = false) {
  put<T>(Plain<T>{x}, n, out, streamed);
}
// out[i] = a[i] b[i], i < n
template <class T>
SEQCONV_INLINE void multiply(const T* a, const T* b, int64_t n, T* out, bool streamed = false) {
  put<T>(Product<T>{{a}, {b}}, n, out, streamed);
}

// As many conversions as there are instructions for, from the start; how many those were.
template <class S, class T>
SEQCONV_INLINE int64_t widen_many(const S*, int64_t, T*) {
  return 0;
}
template <class S, class T>
SEQCONV_INLINE int64_t narrow_many(const T*, int64_t, S*) {
  return 0;
}
#if SEQCONV_AVX
SEQCONV_INLINE int64_t widen_many(const Float16* from, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 x = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    _mm256_storeu_ps(out + i, x);
  }
  return i;
}
SEQCONV_INLINE int64_t narrow_many(const float* from, int64_t n, Float16* to) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  return i;
}
#endif

// out[i] = s[t + i], i < n
template <class T>
void read(const Series& s, int64_t t, int64_t n, T* out) {
  if (const T* from = contiguous<T>(s)) return copy(from + t, n, out);
  dispatch(s.dtype, [&](auto tag) {
    using S = typename decltype(tag)::Type;
    const S* from = reinterpret_cast<const S*>(s.base) + t * s.stride;
    if (s.stride == 1) {
      int64_t i = widen_many(from, n, out);
      for (; i < n; ++i) out[i] = static_cast<T>(widen(from[i]));
    } else {
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(widen(from[i * s.stride]));
    }
  });
}
// Where s[t], ..., s[t + n - 1] lie, in staging if not in s itself.
template <class T>
SEQCONV_INLINE const T* read_window(const Series& s, int64_t t, int64_t n, T* staging) {
  if (const T* from = contiguous<T>(s)) return from + t;
  read(s, t, n, staging);
  return staging;
}

template <class T>
void write(const Series& s, int64_t t, int64_t n, const T* in) {
  if (T* to = contiguous<T>(s)) return copy(in, n, to + t, s.streamed);
  dispatch(s.dtype, [&](auto tag) {
    using S = typename decltype(tag)::Type;
    S* to = reinterpret_cast<S*>(s.base) + t * s.stride;
    if (s.stride == 1) {
      int64_t i = narrow_many(in, n, to);
      for (; i < n; ++i) narrow(in[i], to[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) narrow(in[i], to[i * s.stride]);
    }
  });
}

// s[t + i] = a[i] b[i], i < n <= kChunk
constexpr int64_t kChunk = 512;  // positions converted at a time: bursts that memory likes
template <class T>
void write_product(const Series& s, int64_t t, int64_t n, const T* a, const T* b) {
  if (T* to = contiguous<T>(s)) return multiply(a, b, n, to + t, s.streamed);
  T product[kChunk];
  multiply(a, b, n, product);
  write(s, t, n, product);
}

constexpr int64_t kPiece = 64;      // vectors of a child that one of a team takes at a time
constexpr int64_t kSmall = 2048;    // points of a transform whose row is copied whole, if at all
constexpr int64_t kCrowded = 8192;  // points of a transform whose ends are far apart

// The real sequence row * gate (if any), zero outside [0, length), read at t + shift.
template <class T>
struct Source {
  Series row, gate;
  int64_t length = 0, shift = 0;

  Source at(int64_t more) const { return {row, gate, length, shift + more}; }

  // Where [t, t + n) lies in memory as it is; null if nowhere.
  const T* find(int64_t t, int64_t n) const {
    t += shift;
    const T* start = gate ? nullptr : contiguous<T>(row);
    return start && t >= 0 && t + n <= length ? start + t : nullptr;
  }
  void fill(int64_t t, int64_t n, T* out) const {
    t += shift;
    const int64_t low = t < 0 ? (-t < n ? -t : n) : 0;
    const int64_t end = t + n > length ? (length > t ? length - t : 0) : n;
    const int64_t high = end > low ? end : low;
    for (int64_t i = 0; i < low; ++i) out[i] = 0;
    if (high > low) {
      if (!gate) {
        read(row, t + low, high - low, out + low);
      } else {
        T staging[kChunk];
        for (int64_t i = low, some; i < high; i += some) {
          some = high - i < kChunk ? high - i : kChunk;
          const T* a = read_window(row, t + i, some, out + i);
          multiply(a, read_window(gate, t + i, some, staging), some, out + i);
        }
      }
    }
    for (int64_t i = high; i < n; ++i) out[i] = 0;
  }
  // For how many t from 0 on [t, t + span] lies in memory as it is, rounded down to fours.
  int64_t fours(int64_t span) const {
    const int64_t more = length - shift - span;
    return !gate && contiguous<T>(row) && shift >= 0 && more > 0 ? more / 4 : 0;
  }
  const T* window(int64_t t, int64_t n, T* staging) const {
    if (const T* found = find(t, n)) return found;
    fill(t, n, staging);
    return staging;
  }
};

// Takes the values at [0, length) of a sequence offered at t + shift. Without a function they go to
// `row`; with one they go to it, which may change them. They come in pieces of at most kChunk.
template <class T>
struct Sink {
  Series row;
  int64_t length = 0, shift = 0;
  void (*function)(const void* context, int64_t t, int64_t n, T* values) = nullptr;
  const void* context = nullptr;

  Sink at(int64_t more) const { return {row, length, shift + more, function, context}; }

  T* find(int64_t t, int64_t n) const {
    t += shift;
    T* start = function ? nullptr : contiguous<T>(row);
    return start && t >= 0 && t + n <= length ? start + t : nullptr;
  }
  int64_t fours(int64_t span) const {  // as of a Source
    const int64_t more = length - shift - span;
    return !function && !row.streamed && contiguous<T>(row) && shift >= 0 && more > 0 ? more / 4
                                                                                      : 0;
  }
  void take(int64_t t, int64_t n, T* values) const {
    t += shift;
    const int64_t low = t < 0 ? -t : 0, high = t + n > length ? length - t : n;
    if (low >= high) return;
    if (function)
      function(context, t + low, high - low, values + low);
    else
      write(row, t + low, high - low, values + low);
  }
  // The same for any number of values.
  void take_all(int64_t t, int64_t n, T* values) const {
    const int64_t most = function ? kChunk : n;
    for (int64_t i = 0; i < n; i += most) take(t + i, n - i < most ? n - i : most, values + i);
  }
};

// The ends of the transform, where a row meets its nodes: R times kEndQuads segments, split R by R
// by a butterfly and the rest into lanes. kParts neighbouring results are parts of one vector.
template <int R, class T>
struct End {
  static constexpr int kQ = kEndQuads<T>, kParts = kQuads<T> / kQ, kSegments = R * kQ;
  // Where result j lies, children being `apart` scalars apart.
  static int64_t place(int j, int64_t apart) { return j / kParts * apart + j % kParts * 4 * kQ; }
  static Complex<T, kQ> weight(const T* table, int r, int s) {
    return load<T, kQ>(table + (r * kQ + s) * 8 * kQ, 4 * kQ);
  }
  // a[r]: what the segments of a real sequence at x add to child r before its butterfly. Of two
  // segments the second's weight is the first's times exp(i pi / 4), or minus that in the second
  // quad.
  static void put(Complex<T, kQ>& a, const T* table, const T* x, int r, int64_t stride) {
    const Complex<T, kQ> w = weight(table, r, 0);
    const Vec<T, kQ> value = repeat<T, kQ>(x + r * stride);
    a = {value * w.re, value * w.im};
    if constexpr (kQ == 2) {
      const Complex<T, kQ> z = weight(table, r, 1);
      const Vec<T, kQ> other = repeat<T, kQ>(x + (r + R) * stride);
      a = {a.re + other * z.re, a.im + other * z.im};
    }
  }
  // The same of i turn times the sequence at y, added.
  static void add(Complex<T, kQ>& a, const T* table, const T* y, T turn, int r, int64_t stride) {
    for (int s = 0; s < kQ; ++s) {
      const Complex<T, kQ> w = weight(table, r, s);
      const Vec<T, kQ> value = turn * repeat<T, kQ>(y + (r + s * R) * stride);
      a = {a.re - value * w.im, a.im + value * w.re};
    }
  }
  // So many streams a power of two apart would evict each other's lines half used.
  static bool crowded(const Transform<T>& plan) { return kSegments > 8 && plan.n >= kCrowded; }
};

// The first pass: children [begin, end) vectors of every child of the root, of the sequence re, or
// re + turn i im, times the constant folded into `weights`.
template <int R, bool kComplex, class T>
void first_pass(const Transform<T>& plan, const T* weights, const Source<T>& re,
                const Source<T>& im, T turn, T* data, int64_t begin, int64_t end) {
  using E = End<R, T>;
  constexpr int kQ = E::kQ;
  const int64_t apart = 4 * plan.vectors;  // positions from segment to segment
  const int64_t child = plan.vectors * kStep<T>;
  T* to = data + begin * kStep<T>;
  alignas(64) T staging[kComplex ? 2 : 1][E::kSegments][kChunk];
  const bool crowded = E::crowded(plan);
  // Vectors up to `direct` have all their segments in memory.
  const int64_t span = (E::kSegments - 1) * apart;
  int64_t direct = crowded ? 0 : re.fours(span);
  if (kComplex && im.fours(span) < direct) direct = im.fours(span);
  const T* whole_re = direct ? contiguous<T>(re.row) + re.shift : nullptr;
  const T* whole_im = kComplex && direct ? contiguous<T>(im.row) + im.shift : whole_re;
  // A short row is cheaper to copy at once than segment by segment.
  alignas(64) T spare[kComplex ? 2 : 1][kSmall];
  if (plan.n <= kSmall && direct < plan.vectors && end - begin == plan.vectors) {
    re.fill(0, plan.n, spare[0]);
    if (kComplex) im.fill(0, plan.n, spare[kComplex]);
    whole_re = spare[0];
    whole_im = spare[kComplex];
    direct = end;
  }
  while (begin < end) {
    const T *x = staging[0][0], *y = staging[kComplex][0];
    int64_t stop = end < direct ? end : direct, stride = kChunk;
    if (begin < direct) {
      x = whole_re + 4 * begin;
      y = whole_im + 4 * begin;
      stride = apart;
    } else {
      stop = end < begin + kChunk / 4 ? end : begin + kChunk / 4;
      for (int g = 0; g < E::kSegments; ++g) {
        const int64_t t = g * apart + 4 * begin, n = 4 * (stop - begin);
        re.fill(t, n, staging[0][g]);
        if (kComplex) im.fill(t, n, staging[kComplex][g]);
      }
    }
    for (int64_t i = 0; i < stop - begin; ++i) {
      Complex<T, kQ> a[R];
      SEQCONV_UNROLL
      for (int r = 0; r < R; ++r) {
        E::put(a[r], weights, x + 4 * i, r, stride);
        if constexpr (kComplex) E::add(a[r], weights, y + 4 * i, turn, r, stride);
      }
      dft<R>(a);
      SEQCONV_UNROLL
      for (int r = 0; r < R; ++r) store(to + E::place(r, child), a[r]);
      to += kStep<T>;
    }
    begin = stop;
  }
}

// The last pass: real parts of the inverse times the constant folded into `weights`.
template <int R, class T>
void last_pass(const Transform<T>& plan, const T* data, const T* weights, const Sink<T>& sink,
               int64_t begin, int64_t end) {
  using E = End<R, T>;
  constexpr int kQ = E::kQ;
  const int64_t apart = 4 * plan.vectors, child = plan.vectors * kStep<T>;
  const T* from = data + begin * kStep<T>;
  alignas(64) T staging[E::kSegments][kChunk];
  int64_t direct = E::crowded(plan) ? 0 : sink.fours((E::kSegments - 1) * apart);
  T* whole = direct ? contiguous<T>(sink.row) + sink.shift : nullptr;
  alignas(64) T spare[kSmall];
  const bool spared = plan.n <= kSmall && direct < plan.vectors && end - begin == plan.vectors;
  if (spared) {
    whole = spare;
    direct = end;
  }
  while (begin < end) {
    const bool staged = begin >= direct;
    T* y = staged ? staging[0] : whole + 4 * begin;
    const int64_t stride = staged ? kChunk : apart;
    int64_t stop = end < direct ? end : direct;
    if (staged) stop = end < begin + kChunk / 4 ? end : begin + kChunk / 4;
    for (int64_t i = 0; i < stop - begin; ++i) {
      Complex<T, kQ> a[R];
      SEQCONV_UNROLL
      for (int r = 0; r < R; ++r)
        a[r ? R - r : 0] = load<T, kQ>(from + E::place(r, child));  // as in join_node
      from += kStep<T>;
      dft<R>(a);
      SEQCONV_UNROLL
      for (int r = 0; r < R; ++r) {
        Vec<T, kQ> e[kQ];
        SEQCONV_UNROLL
        for (int s = 0; s < kQ; ++s) {
          const Complex<T, kQ> c = E::weight(weights, r, s);
          e[s] = a[r].re * c.re + a[r].im * c.im;
        }
        store_quad_sums<T, kQ>(e, y + r * stride + 4 * i, R * stride);
      }
    }
    for (int g = 0; g < E::kSegments && staged; ++g)
      sink.take(g * apart + 4 * begin, 4 * (stop - begin), staging[g]);
    begin = stop;
  }
  if (spared) sink.take_all(0, plan.n, spare);
}

template <class T, class Op>
SEQCONV_INLINE void with_radix(const Transform<T>& plan, const Op& op) {
  switch (plan.radix) {
    case 2:
      return op(Indices<2>{});
    case 3:
      return op(Indices<3>{});
    case 4:
      return op(Indices<4>{});
    case 5:
      return op(Indices<5>{});
    default:
      return op(Indices<7>{});
  }
}
template <int R>
SEQCONV_INLINE constexpr int radix_of(Indices<R>) {
  return R;
}
// Of the first and last pass, for a plan of radix R.
template <class T, class Radix>
constexpr int kEndRadix = radix_of(Radix{}) * kQuads<T> / kEndQuads<T>;

// data <- first pass of re (+ turn i im), times the constant folded into `weights`.
template <class T>
void enter(const Transform<T>& plan, Team& team, T* data, const T* weights, const Source<T>& re,
           const Source<T>* im = nullptr, T turn = 1) {
  with_radix(plan, [&](auto radix) {
    constexpr int R = kEndRadix<T, decltype(radix)>;
    const int64_t piece = team.board ? kPiece : plan.vectors;
    spread(team, (plan.vectors + piece - 1) / piece, [&](int64_t begin, int64_t end) {
      end = end * piece < plan.vectors ? end * piece : plan.vectors;
      // Transposing works on whole groups of four nodes.
      const int64_t rest = plan.radix * plan.vectors * kStep<T>;
      for (int64_t i = rest; begin == 0 && i < plan.spectrum; ++i) data[i] = 0;
      if (im)
        first_pass<R, true, T>(plan, weights, re, *im, turn, data, begin * piece, end);
      else
        first_pass<R, false, T>(plan, weights, re, re, turn, data, begin * piece, end);
    });
  });
}

// sink <- last pass of data.
template <class T>
void leave(const Transform<T>& plan, Team& team, const T* data, const T* weights,
           const Sink<T>& sink) {
  with_radix(plan, [&](auto radix) {
    constexpr int R = kEndRadix<T, decltype(radix)>;
    const int64_t piece = team.board ? kPiece : plan.vectors;
    spread(team, (plan.vectors + piece - 1) / piece, [&](int64_t begin, int64_t end) {
      end = end * piece < plan.vectors ? end * piece : plan.vectors;
      last_pass<R, T>(plan, data, weights, sink, begin * piece, end);
    });
  });
}
