// Vectors, their shuffles, conversions between dtypes, and the activations. Included inside an
// instruction set's namespace (see isa_*.cpp), which defines SEQCONV_VECTOR_BYTES.
//
// GCC and Clang vector extensions: + - * / and ?: work lane by lane and compile to whatever the
// target has. No include here: isa_*.cpp includes all it needs before switching the target.

#define SEQCONV_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define SEQCONV_UNROLL _Pragma("unroll")
#else
#define SEQCONV_UNROLL _Pragma("GCC unroll 16")
#endif

// At least four lanes: shuffles work on quads of four, the same in every quad.
template <class T>
constexpr int kLanes =
    SEQCONV_VECTOR_BYTES / sizeof(T) < 4 ? 4 : SEQCONV_VECTOR_BYTES / static_cast<int>(sizeof(T));
template <class T>
constexpr int kQuads = kLanes<T> / 4;
template <class T>
constexpr int kEndQuads = end_quads(kQuads<T>, sizeof(T));

template <class T>
struct IntOf;
template <>
struct IntOf<float> {
  using Type = int32_t;
};
template <>
struct IntOf<double> {
  using Type = int64_t;
};

template <class T, int Q = kQuads<T>>
struct VectorOf {
  typedef T Type __attribute__((vector_size(4 * Q * sizeof(T)), may_alias));
  typedef typename IntOf<T>::Type Int __attribute__((vector_size(4 * Q * sizeof(T)), may_alias));
  typedef T Unaligned
      __attribute__((vector_size(4 * Q * sizeof(T)), may_alias, aligned(sizeof(T))));
};
template <class T, int Q = kQuads<T>>
using Vec = typename VectorOf<T, Q>::Type;
template <class T>
using Quad = typename VectorOf<T, 1>::Unaligned;

template <class T>
SEQCONV_INLINE Vec<T> splat(T value) {
  return Vec<T>{} + value;
}

// Stores past the caches, where the target can: lines that are written whole need not be read
// first. `to` is aligned to a vector.
#if SEQCONV_AVX
constexpr bool kStreams = true;
#else
constexpr bool kStreams = false;
#endif
template <class T>
SEQCONV_INLINE void stream(T* to, Vec<T> value) {
#if SEQCONV_AVX && SEQCONV_VECTOR_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)value);
#elif SEQCONV_AVX
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)value);
#else
  *reinterpret_cast<Vec<T>*>(to) = value;
#endif
}
// Before other threads may read what was streamed.
SEQCONV_INLINE void end_streams() {
#if SEQCONV_AVX
  _mm_sfence();
#endif
}

// ---- shuffles ----

template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using Type = Indices<I...>;
};

// Lane l of the result is lane P::at(l, W) of a and b side by side.
template <class P, class T, int Q, int... I>
SEQCONV_INLINE Vec<T, Q> shuffle(Vec<T, Q> a, Vec<T, Q> b, Indices<I...>) {
  constexpr int w = 4 * Q;
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, P::at(I, w)...);
#else
  return __builtin_shuffle(a, b, typename VectorOf<T, Q>::Int{P::at(I, w)...});
#endif
}
template <class P, class T, int Q = kQuads<T>>
SEQCONV_INLINE Vec<T, Q> shuffle(Vec<T, Q> a, Vec<T, Q> b) {
  return shuffle<P, T, Q>(a, b, typename MakeIndices<4 * Q>::Type{});
}

// Two steps of a 4x4 transpose inside every quad, for four-byte lanes: interleave the low or the
// high halves of two quads, then join halves.
template <int kHigh>
struct Interleave {
  static constexpr int at(int l, int w) { return l / 4 * 4 + 2 * kHigh + l % 4 / 2 + l % 2 * w; }
};
template <int kHigh>
struct JoinHalves {
  static constexpr int at(int l, int w) { return l / 4 * 4 + 2 * kHigh + l % 2 + l % 4 / 2 * w; }
};
// The first step for eight-byte lanes, of which a 128-bit register holds a pair: even or odd lanes.
template <int kOdd>
struct EveryOther {
  static constexpr int at(int l, int w) { return l / 4 * 4 + l % 4 / 2 * 2 + kOdd + l % 2 * w; }
};
// The first (second) of the two quads of a, then that of b.
template <int kOdd>
struct EveryOtherQuad {
  static constexpr int at(int l, int w) { return 4 * kOdd + l % 4 + l / 4 * w; }
};

// Every other lane of both, and what puts them side by side again: its low or high half.
template <int kOdd>
struct Unzip {
  static constexpr int at(int l, int) { return 2 * l + kOdd; }
};
template <int kHigh>
struct Zip {
  static constexpr int at(int l, int w) { return kHigh * (w / 2) + l / 2 + l % 2 * w; }
};

// Transposes the 4x4 matrices that quad j of a, b, c, d are the rows of.
template <class T, int Q = kQuads<T>>
SEQCONV_INLINE void transpose(Vec<T, Q>& a, Vec<T, Q>& b, Vec<T, Q>& c, Vec<T, Q>& d) {
  if constexpr (sizeof(T) == 4) {
    const Vec<T, Q> p = shuffle<Interleave<0>, T, Q>(a, b), q = shuffle<Interleave<1>, T, Q>(a, b);
    const Vec<T, Q> r = shuffle<Interleave<0>, T, Q>(c, d), s = shuffle<Interleave<1>, T, Q>(c, d);
    a = shuffle<JoinHalves<0>, T, Q>(p, r);
    b = shuffle<JoinHalves<1>, T, Q>(p, r);
    c = shuffle<JoinHalves<0>, T, Q>(q, s);
    d = shuffle<JoinHalves<1>, T, Q>(q, s);
  } else {
    const Vec<T, Q> p = shuffle<EveryOther<0>, T, Q>(a, b), q = shuffle<EveryOther<1>, T, Q>(a, b);
    const Vec<T, Q> r = shuffle<EveryOther<0>, T, Q>(c, d), s = shuffle<EveryOther<1>, T, Q>(c, d);
    a = shuffle<JoinHalves<0>, T, Q>(p, r);
    b = shuffle<JoinHalves<0>, T, Q>(q, s);
    c = shuffle<JoinHalves<1>, T, Q>(p, r);
    d = shuffle<JoinHalves<1>, T, Q>(q, s);
  }
}

// to[j][i] = from[i][j] for i, j < 4, rows `from_row` and `to_row` apart.
template <class T>
SEQCONV_INLINE void transpose_block(const T* from, int64_t from_row, T* to, int64_t to_row) {
  using V = typename VectorOf<T, 1>::Unaligned;
  Vec<T, 1> rows[4];
  SEQCONV_UNROLL
  for (int i = 0; i < 4; ++i) rows[i] = *reinterpret_cast<const V*>(from + i * from_row);
  transpose<T, 1>(rows[0], rows[1], rows[2], rows[3]);
  SEQCONV_UNROLL
  for (int j = 0; j < 4; ++j) *reinterpret_cast<V*>(to + j * to_row) = rows[j];
}

// Four values, in every quad.
template <class T, int Q>
SEQCONV_INLINE Vec<T, Q> repeat(const T* from) {
#if SEQCONV_AVX
  // Compilers load and shuffle, where loading alone can repeat.
  if constexpr (Q == 2 && sizeof(T) == 4)
    return reinterpret_cast<Vec<T, 2>>(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(from)));
#endif
  const Quad<T> x = *reinterpret_cast<const Quad<T>*>(from);
  if constexpr (Q == 1) {
    return reinterpret_cast<const Vec<T, 1>&>(x);
  } else {
    static_assert(Q == 2);
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(x, x, 0, 1, 2, 3, 0, 1, 2, 3);
#else
    return Vec<T, 2>{x[0], x[1], x[2], x[3], x[0], x[1], x[2], x[3]};
#endif
  }
}

template <int kQuad, class T, int Q>
SEQCONV_INLINE Quad<T> quad_of(Vec<T, Q> x) {
#if SEQCONV_AVX
  // Compilers shuffle and store, where storing alone can select.
  if constexpr (Q == 2 && sizeof(T) == 4 && kQuad == 1)
    return reinterpret_cast<Quad<T>>(_mm256_extractf128_ps(reinterpret_cast<__m256>(x), 1));
#endif
  if constexpr (Q == 1) {
    return reinterpret_cast<const Quad<T>&>(x);
  } else {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(x, x, 4 * kQuad, 4 * kQuad + 1, 4 * kQuad + 2, 4 * kQuad + 3);
#else
    return Quad<T>{x[4 * kQuad], x[4 * kQuad + 1], x[4 * kQuad + 2], x[4 * kQuad + 3]};
#endif
  }
}

// to[s * apart ...] = four values, the sum of the quads of e[s], s < Q.
template <class T, int Q>
SEQCONV_INLINE void store_quad_sums(const Vec<T, Q>* e, T* to, int64_t apart) {
  const auto put = [to, apart](int s, Quad<T> value) {
    *reinterpret_cast<Quad<T>*>(to + s * apart) = value;
  };
  if constexpr (Q == 1) {
    put(0, quad_of<0, T, 1>(e[0]));
  } else {
    static_assert(Q == 2);
    const Vec<T, 2> sum =
        shuffle<EveryOtherQuad<0>, T, 2>(e[0], e[1]) + shuffle<EveryOtherQuad<1>, T, 2>(e[0], e[1]);
    put(0, quad_of<0, T, 2>(sum));
    put(1, quad_of<1, T, 2>(sum));
  }
}

// ---- the four dtypes ----

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

SEQCONV_INLINE float as_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
SEQCONV_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

// Without branches, so that loops over them become vector code.
SEQCONV_INLINE float widen(float x) { return x; }
SEQCONV_INLINE double widen(double x) { return x; }
SEQCONV_INLINE float widen(BFloat16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
SEQCONV_INLINE float widen(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  const uint32_t normal = (rest << 13) + (112u << 23);  // rebiases the exponent
  const uint32_t special = (rest << 13) + (224u << 23);
  // By an integer conversion, in case the processor flushes subnormals to zero.
  const uint32_t subnormal = as_bits(static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-24f);
  const uint32_t finite = rest < 0x400u ? subnormal : normal;
  return as_float(sign | (rest >= 0x7c00u ? special : finite));
}

// Round to nearest, ties to even.
SEQCONV_INLINE void narrow(float x, float& out) { out = x; }
SEQCONV_INLINE void narrow(float x, double& out) { out = static_cast<double>(x); }
SEQCONV_INLINE void narrow(double x, double& out) { out = x; }
SEQCONV_INLINE void narrow(double x, float& out) { out = static_cast<float>(x); }
SEQCONV_INLINE void narrow(float x, BFloat16& out) {
  const uint32_t bits = as_bits(x), magnitude = bits & 0x7fffffffu;
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(magnitude > 0x7f800000u ? bits >> 16 | 0x40u : rounded);
}
SEQCONV_INLINE void narrow(float x, Float16& out) {
  const uint32_t sign = as_bits(x) >> 16 & 0x8000u;
  const uint32_t magnitude = as_bits(x) & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  // Subnormal: adding 0.5 puts the rounding where it belongs.
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
  uint32_t rest = magnitude < 0x38800000u ? subnormal : normal;
  rest = magnitude >= 0x477ff000u ? 0x7c00u : rest;  // rounds to infinity
  out.bits = static_cast<uint16_t>(sign | (magnitude > 0x7f800000u ? 0x7e00u : rest));
}
// A problem computed in double has no narrower output than the gradient of a narrow kernel.
template <class S>
SEQCONV_INLINE void narrow(double x, S& out) {
  narrow(static_cast<float>(x), out);
}

template <class S>
struct Tag {
  using Type = S;
};

// Calls op(Tag<S>{}) with the scalar type S of dtype.
template <class Op>
SEQCONV_INLINE void dispatch(Dtype dtype, const Op& op) {
  switch (dtype) {
    case Dtype::kFloat32:
      return op(Tag<float>{});
    case Dtype::kFloat64:
      return op(Tag<double>{});
    case Dtype::kBFloat16:
      return op(Tag<BFloat16>{});
    case Dtype::kFloat16:
      return op(Tag<Float16>{});
  }
}

// ---- activations ----

constexpr float kTaylor[7] = {1.0f, 1.0f, 1.0f / 2, 1.0f / 6, 1.0f / 24, 1.0f / 120, 1.0f / 720};

// |x - n ln 2| <= ln(2) / 2 and a Taylor polynomial whose tail is below 2^-25. NaN stays NaN.
SEQCONV_INLINE Vec<float> exp_of(Vec<float> x) {
  typedef uint32_t Int __attribute__((vector_size(sizeof(Vec<float>)), may_alias));
  const Vec<float> magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> shifted = x * 1.44269504088896341f + magic;
  const Vec<float> n = shifted - magic;
  const Vec<float> r = x - n * 0.693359375f - n * -2.12194440e-4f;  // ln 2 in two parts
  Vec<float> p = splat(1.0f / 5040);
  for (int i = 6; i >= 0; --i) p = p * r + kTaylor[i];
  const Int power = (reinterpret_cast<const Int&>(shifted) << 23) + (127u << 23);
  p *= reinterpret_cast<const Vec<float>&>(power);
  p = x < -87.0f ? Vec<float>{} : p;
  return x > 88.0f ? splat(__builtin_inff()) : p;
}

constexpr float kErfc[10] = {
    2.820869264e-01f, 2.823478961e-01f,  2.434860648e-01f, 2.001805763e-01f,  -1.737233758e-02f,
    2.573629220e-01f, -4.585286083e-01f, 2.605507075e-01f, -4.790700084e-02f, -2.207192189e-03f};

// Standard normal distribution function and density. erfc(z) exp(z^2) (1 + z / 2) is close to a
// polynomial in t = 1 / (1 + z / 2); this one, fitted for z < 18, has a relative error of 6e-8.
// Beyond, exp underflows.
SEQCONV_INLINE void normal(Vec<float> v, Vec<float>& cdf, Vec<float>& density) {
  const Vec<float> size = v < 0.0f ? -v : v;
  const Vec<float> t = 1.0f / (1.0f + size * 0.353553390593273762f);
  Vec<float> p = splat(kErfc[9]);
  for (int i = 8; i >= 0; --i) p = p * t + kErfc[i];
  const Vec<float> bell = exp_of(v * v * -0.5f);
  const Vec<float> tail = bell * (size > 25.0f ? Vec<float>{} : p * t * 0.5f);
  cdf = v < 0.0f ? tail : 1.0f - tail;
  density = bell * 0.398942280401432678f;
}

// The same through libm: double problems are checks, not production.
SEQCONV_INLINE Vec<double> exp_of(Vec<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = exp(x[lane]);
  return x;
}
SEQCONV_INLINE void normal(Vec<double> v, Vec<double>& cdf, Vec<double>& density) {
  for (int lane = 0; lane < kLanes<double>; ++lane) {
    cdf[lane] = 0.5 * erfc(-v[lane] * 0.707106781186547524401);
    density[lane] = 0.398942280401432677940 * exp(-0.5 * v[lane] * v[lane]);
  }
}

// activation(v), and its derivative in slope.
template <class T>
SEQCONV_INLINE Vec<T> activate(Activation activation, Vec<T> v, Vec<T>& slope) {
  const Vec<T> one = splat(T(1)), zero = {};
  Vec<T> cdf, density;
  switch (activation) {
    case Activation::kNone:
      slope = one;
      return v;
    case Activation::kGelu:
      normal(v, cdf, density);
      slope = cdf + v * density;
      return v * cdf;
    case Activation::kSilu:
      cdf = one / (one + exp_of(-v));
      slope = cdf + v * cdf * (one - cdf);
      return v * cdf;
    case Activation::kRelu:
      slope = v <= zero ? zero : one;
      return v < zero ? zero : v;
  }
  __builtin_unreachable();
}
