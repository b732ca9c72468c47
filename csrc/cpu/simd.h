// Vectors of neighbouring channels, loading and storing them from any dtype and stride, and the
// activations on them. Included inside an instruction set's namespace (see kernel_*.cpp).
//
// GCC and Clang vector extensions: + - * / and ?: work lane by lane and compile to whatever the
// target has. No include here: kernel_*.cpp includes all it needs before switching the target.

#define SEQCONV_INLINE static inline __attribute__((always_inline))

constexpr int kVectorBytes = 32;

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Type __attribute__((vector_size(kVectorBytes), may_alias));
  typedef uint32_t Int __attribute__((vector_size(kVectorBytes), may_alias));
};
template <>
struct VectorOf<double> {
  typedef double Type __attribute__((vector_size(kVectorBytes), may_alias));
};
template <class T>
using Vec = typename VectorOf<T>::Type;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
SEQCONV_INLINE Vec<T> splat(T value) {
  return Vec<T>{} + value;
}

// ---- scalars of the four dtypes ----

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

SEQCONV_INLINE float widen(float x) { return x; }
SEQCONV_INLINE double widen(double x) { return x; }
SEQCONV_INLINE float widen(BFloat16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
SEQCONV_INLINE float widen(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // inf, nan
  if (rest < 0x400u)  // subnormal; by integers, in case the processor flushes them to zero
    return as_float(sign | as_bits(static_cast<float>(rest) * 0x1p-24f));
  // Multiplying by 2^112 rebiases the exponent.
  return as_float(sign | as_bits(as_float(rest << 13) * 0x1p112f));
}

template <class S>
S narrow(double x);
template <class S>
S narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline double narrow<double>(float x) {
  return x;
}
template <>
inline float narrow<float>(double x) {
  return static_cast<float>(x);
}
template <>
inline double narrow<double>(double x) {
  return x;
}
// Round to nearest, ties to even, in both.
template <>
inline BFloat16 narrow<BFloat16>(float x) {
  const uint32_t bits = as_bits(x);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
inline Float16 narrow<Float16>(float x) {
  const uint32_t sign = as_bits(x) >> 16 & 0x8000u;
  const uint32_t magnitude = as_bits(x) & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u)
    return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 puts the rounding where it belongs
    const uint32_t shifted = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
    return {static_cast<uint16_t>(sign | shifted)};
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23);
  return {static_cast<uint16_t>(sign | rounded >> 13)};
}
// A problem computed in double has no narrower output than the gradient of a narrow kernel.
template <>
inline BFloat16 narrow<BFloat16>(double x) {
  return narrow<BFloat16>(static_cast<float>(x));
}
template <>
inline Float16 narrow<Float16>(double x) {
  return narrow<Float16>(static_cast<float>(x));
}

// ---- rows ----

// A row of one sample and head: lane l is channel (channel + l). Lanes beyond the last channel read
// zero.
struct Row {
  const Tensor* tensor;
  int64_t batch, head;
};

template <class S>
SEQCONV_INLINE S* row_start(const Tensor& t, int64_t batch, int64_t head, int64_t channel) {
  return reinterpret_cast<S*>(t.data) + batch * t.stride[0] + head * t.stride[1] +
         channel * t.stride[2];
}

// Calls op(S{}) with the scalar type of dtype.
template <class Op>
SEQCONV_INLINE void dispatch(Dtype dtype, const Op& op) {
  switch (dtype) {
    case Dtype::kFloat32:
      return op(float{});
    case Dtype::kFloat64:
      return op(double{});
    case Dtype::kBFloat16:
      return op(BFloat16{});
    case Dtype::kFloat16:
      return op(Float16{});
  }
}

// out[i * step] = row[i] for i < n, in lanes.
template <class T>
void load(const Row& row, const Unit& unit, int64_t n, Vec<T>* out, int64_t step = 1) {
  const Tensor& t = *row.tensor;
  dispatch(t.dtype, [&](auto tag) {
    using S = decltype(tag);
    const S* base = row_start<S>(t, row.batch, row.head, unit.channel);
    const int64_t across = t.stride[2], along = t.stride[3];
    if (unit.channels < kLanes<T>)
      for (int64_t i = 0; i < n; ++i) out[i * step] = Vec<T>{};
    // Time innermost keeps one read stream per channel; a block of steps at a time keeps the writes
    // in cache.
    constexpr int64_t kBlock = 64;
    for (int64_t i0 = 0; i0 < n; i0 += kBlock) {
      const int64_t end = i0 + kBlock < n ? i0 + kBlock : n;
      for (int64_t lane = 0; lane < unit.channels; ++lane) {
        const S* from = base + lane * across;
        T* to = reinterpret_cast<T*>(out) + lane;
        for (int64_t i = i0; i < end; ++i)
          to[i * step * kLanes<T>] = static_cast<T>(widen(from[i * along]));
      }
    }
  });
}

template <class T>
void store(const Row& row, const Unit& unit, int64_t n, const Vec<T>* in, int64_t step = 1) {
  const Tensor& t = *row.tensor;
  dispatch(t.dtype, [&](auto tag) {
    using S = decltype(tag);
    S* base = row_start<S>(t, row.batch, row.head, unit.channel);
    const int64_t across = t.stride[2], along = t.stride[3];
    constexpr int64_t kBlock = 64;
    for (int64_t i0 = 0; i0 < n; i0 += kBlock) {
      const int64_t end = i0 + kBlock < n ? i0 + kBlock : n;
      for (int64_t lane = 0; lane < unit.channels; ++lane) {
        S* to = base + lane * across;
        const T* from = reinterpret_cast<const T*>(in) + lane;
        for (int64_t i = i0; i < end; ++i) to[i * along] = narrow<S>(from[i * step * kLanes<T>]);
      }
    }
  });
}

// ---- activations ----

constexpr float kTaylor[7] = {1.0f, 1.0f, 1.0f / 2, 1.0f / 6, 1.0f / 24, 1.0f / 120, 1.0f / 720};

// |x - n ln 2| <= ln(2) / 2 and a Taylor polynomial whose tail is below 2^-25. NaN stays NaN.
SEQCONV_INLINE Vec<float> exp_of(Vec<float> x) {
  using Int = VectorOf<float>::Int;
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
