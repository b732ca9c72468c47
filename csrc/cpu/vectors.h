// Vectors and their shuffles. GCC and Clang vector extensions: + - * / and ?: work lane by lane and
// compile to whatever the target has.
#pragma once
#include "plan.h"
#include "target.h"

namespace seqconv::SEQCONV_ISA {

// At least four lanes: shuffles work on quads of four, the same in every quad.
template <class T>
constexpr int kLanes =
    SEQCONV_VECTOR_BYTES / sizeof(T) < 4 ? 4 : SEQCONV_VECTOR_BYTES / static_cast<int>(sizeof(T));
template <class T>
constexpr int kQuads = kLanes<T> / 4;
template <class T>
constexpr int kEndQuads = end_quads(kQuads<T>, sizeof(T));

template <class T, int Q = kQuads<T>>
struct VectorOf {
  typedef T Type __attribute__((vector_size(4 * Q * sizeof(T)), may_alias));
  typedef T Unaligned
      __attribute__((vector_size(4 * Q * sizeof(T)), may_alias, aligned(sizeof(T))));
};
template <class T, int Q = kQuads<T>>
using Vec = typename VectorOf<T, Q>::Type;
template <class T>
using Quad = typename VectorOf<T, 1>::Unaligned;

// Vectors anywhere in memory.
template <class T>
SEQCONV_INLINE Vec<T> load_vector(const T* from) {
  return *reinterpret_cast<const typename VectorOf<T>::Unaligned*>(from);
}
template <class T>
SEQCONV_INLINE void store_vector(T* to, Vec<T> x) {
  *reinterpret_cast<typename VectorOf<T>::Unaligned*>(to) = x;
}
// The vector at `at`, a multiple of its size.
template <class T>
SEQCONV_INLINE Vec<T>& vec(T* at) {
  return *reinterpret_cast<Vec<T>*>(at);
}

// By subtracting zero, which compilers leave out: of -0 adding it would make 0.
template <class T>
SEQCONV_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};
}

// Stores past the caches, where the target can: lines that are written whole need not be read
// first. `to` is aligned to a vector.
constexpr bool kStreams = SEQCONV_AVX;
template <class T>
SEQCONV_INLINE void stream(T* to, Vec<T> value) {
#if SEQCONV_AVX && SEQCONV_VECTOR_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)value);
#elif SEQCONV_AVX
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)value);
#else
  vec(to) = value;
#endif
}
// Before other threads may read what was streamed.
SEQCONV_INLINE void end_streams() {
#if SEQCONV_AVX
  _mm_sfence();
#endif
}

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
  return __builtin_shuffle(a, b, decltype(a < b){P::at(I, w)...});
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
// Every other quad of a, then of b.
template <int kOdd>
struct EveryOtherQuad {
  static constexpr int at(int l, int w) {
    const int half = w / 2, quad = l % half / 4;
    return l / half * w + 4 * (2 * quad + kOdd) + l % 4;
  }
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

// Transposes a square matrix of vectors.
template <class T>
SEQCONV_INLINE void transpose_square(Vec<T>* rows) {
  constexpr int Q = kQuads<T>;
  SEQCONV_UNROLL
  for (int i = 0; i < Q; ++i)
    transpose<T>(rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3]);
  // Now quad q of rows[4 i + j] has elements 4 i ... 4 i + 3 of row 4 q + j of the result.
  Vec<T> out[4 * Q];
  SEQCONV_UNROLL
  for (int j = 0; j < 4; ++j) {
    if constexpr (Q == 4) {
      const Vec<T> a = rows[j], b = rows[4 + j], c = rows[8 + j], d = rows[12 + j];
      const Vec<T> ab = shuffle<EveryOtherQuad<0>, T>(a, b);
      const Vec<T> ab_odd = shuffle<EveryOtherQuad<1>, T>(a, b);
      const Vec<T> cd = shuffle<EveryOtherQuad<0>, T>(c, d);
      const Vec<T> cd_odd = shuffle<EveryOtherQuad<1>, T>(c, d);
      out[j] = shuffle<EveryOtherQuad<0>, T>(ab, cd);
      out[8 + j] = shuffle<EveryOtherQuad<1>, T>(ab, cd);
      out[4 + j] = shuffle<EveryOtherQuad<0>, T>(ab_odd, cd_odd);
      out[12 + j] = shuffle<EveryOtherQuad<1>, T>(ab_odd, cd_odd);
    } else if constexpr (Q == 2) {
      out[j] = shuffle<EveryOtherQuad<0>, T>(rows[j], rows[4 + j]);
      out[4 + j] = shuffle<EveryOtherQuad<1>, T>(rows[j], rows[4 + j]);
    } else {
      out[j] = rows[j];
    }
  }
  SEQCONV_UNROLL
  for (int i = 0; i < 4 * Q; ++i) rows[i] = out[i];
}

// to[j][i] = from[i][j] for i, j < 4, rows `from_row` and `to_row` apart.
template <class T>
SEQCONV_INLINE void transpose_block(const T* from, int64_t from_row, T* to, int64_t to_row) {
  Vec<T, 1> rows[4];
  SEQCONV_UNROLL
  for (int i = 0; i < 4; ++i) rows[i] = *reinterpret_cast<const Quad<T>*>(from + i * from_row);
  transpose<T, 1>(rows[0], rows[1], rows[2], rows[3]);
  SEQCONV_UNROLL
  for (int j = 0; j < 4; ++j) *reinterpret_cast<Quad<T>*>(to + j * to_row) = rows[j];
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

// The sum of the lanes, one after another; and by halves, which do not wait for each other.
template <class T>
SEQCONV_INLINE double sum_of(const Vec<T>& x) {
  double sum = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) sum += static_cast<double>(x[lane]);
  return sum;
}
template <class T>
SEQCONV_INLINE double sum_by_halves(const Vec<T>& x) {
  double part[kLanes<T>];
  for (int lane = 0; lane < kLanes<T>; ++lane) part[lane] = static_cast<double>(x[lane]);
  SEQCONV_UNROLL
  for (int half = kLanes<T> / 2; half; half /= 2)
    for (int lane = 0; lane < half; ++lane) part[lane] += part[lane + half];
  return part[0];
}

}  // namespace seqconv::SEQCONV_ISA
