// A channel of a product of spectra, see real_part.h.
#pragma once
#include "isa.h"
#include "radix.h"
#include "real_part.h"

namespace seqconv::SEQCONV_ISA {

struct Reversed {
  static constexpr int at(int l, int w) { return w - 1 - l; }
};

template <class T>
SEQCONV_INLINE Complex<T> conjugate(Complex<T> a) {
  return {a.re, -a.im};
}

// Numbers in a row of memory: a vector of them that begins or, reversed, ends at one; or one alone.
template <class T>
struct Several {
  static constexpr int64_t kCount = kLanes<T>;
  SEQCONV_INLINE Complex<T> load(const T* row, int64_t j) {
    const Vec<T> a = load_vector(row + 2 * j), b = load_vector(row + 2 * j + kCount);
    return {shuffle<Unzip<0>, T>(a, b), shuffle<Unzip<1>, T>(a, b)};
  }
  SEQCONV_INLINE void store(T* row, int64_t j, Complex<T> z) {
    store_vector(row + 2 * j, shuffle<Zip<0>, T>(z.re, z.im));
    store_vector(row + 2 * j + kCount, shuffle<Zip<1>, T>(z.re, z.im));
  }
  SEQCONV_INLINE Complex<T> turned(Complex<T> z) {
    return {shuffle<Reversed, T>(z.re, z.re), shuffle<Reversed, T>(z.im, z.im)};
  }
  SEQCONV_INLINE Complex<T> load_back(const T* row, int64_t j) {
    return turned(load(row, j - kCount + 1));
  }
  SEQCONV_INLINE void store_back(T* row, int64_t j, Complex<T> z) {
    store(row, j - kCount + 1, turned(z));
  }
};
template <class T>
struct Single {
  static constexpr int64_t kCount = 1;
  SEQCONV_INLINE Complex<T> load(const T* row, int64_t j) {
    return {splat(row[2 * j]), splat(row[2 * j + 1])};
  }
  SEQCONV_INLINE void store(T* row, int64_t j, Complex<T> z) {
    row[2 * j] = z.re[0];
    row[2 * j + 1] = z.im[0];
  }
  SEQCONV_INLINE Complex<T> load_back(const T* row, int64_t j) { return load(row, j); }
  SEQCONV_INLINE void store_back(T* row, int64_t j, Complex<T> z) { store(row, j, z); }
};

// op(numbers, j, m) for all frequencies 0 < j < n / 2 and their mirrors m = n - j.
template <class T, class Op>
SEQCONV_INLINE void for_mirrored(int64_t n, const Op& op) {
  int64_t j = 1;
  for (; j + kLanes<T> <= n / 2; j += kLanes<T>) op(Several<T>{}, j, n - j);
  for (; j < n / 2; ++j) op(Single<T>{}, j, n - j);
}

template <class T>
SEQCONV_INLINE void real_part_row(const T* u, const T* k, T* half, int64_t n) {
  for_mirrored<T>(n, [&](auto numbers, int64_t j, int64_t m) {
    const Complex<T> one = numbers.load(u, j) * numbers.load(k, j);
    const Complex<T> other = numbers.load_back(u, m) * numbers.load_back(k, m);
    numbers.store(half, j, T(0.5) * (one + conjugate(other)));
  });
  for (int64_t j = 0; j <= n / 2; j += n / 2) {
    const Single<T> number;
    const Complex<T> z = number.load(u, j) * number.load(k, j);
    number.store(half, j, {z.re, splat(T(0))});
  }
}

template <class T>
void real_part_forward_unit(const RealPartProblem& p, int64_t channel) {
  const int64_t row = 2 * p.n, half = p.n + 2;
  for (int64_t c = 0; c < p.heads; ++c) {
    const T* k = static_cast<const T*>(p.k) + c * p.k_stride + channel * row;
    for (int64_t b = 0; b < p.batch; ++b) {
      const T* u = static_cast<const T*>(p.u) + b * p.u_stride + channel * row;
      T* to = static_cast<T*>(p.half) + ((b * p.heads + c) * p.channels + channel) * half;
      real_part_row(u, k, to, p.n);
    }
  }
}

// to[j] <- g conj(other[j]), or is increased by it; the same of mirrored numbers.
template <class T, class Numbers>
SEQCONV_INLINE void put(Numbers numbers, T* to, int64_t j, Complex<T> g, Complex<T> other,
                        bool first) {
  const Complex<T> z = times_conj(g, other);
  numbers.store(to, j, first ? z : numbers.load(to, j) + z);
}
template <class T, class Numbers>
SEQCONV_INLINE void put_back(Numbers numbers, T* to, int64_t m, Complex<T> g, Complex<T> other,
                             bool first) {
  const Complex<T> z = times_conj(g, other);
  numbers.store_back(to, m, first ? z : numbers.load_back(to, m) + z);
}

// The rows of a sample and a head, and whether they are the first to be added to their gradients.
template <class T>
struct RealPartRows {
  const T *r, *u, *k;
  T *du, *dk;  // either may be null
  bool first_head, first_sample;
};
template <bool kU, bool kK, class T>
SEQCONV_INLINE void real_part_gradients(const RealPartRows<T>& rows, int64_t n) {
  const T scale = T(1) / static_cast<T>(n);
  for_mirrored<T>(n, [&](auto numbers, int64_t j, int64_t m) {
    const Complex<T> g = scale * numbers.load(rows.r, j);
    if constexpr (kU) {
      put(numbers, rows.du, j, g, numbers.load(rows.k, j), rows.first_head);
      put_back(numbers, rows.du, m, conjugate(g), numbers.load_back(rows.k, m), rows.first_head);
    }
    if constexpr (kK) {
      put(numbers, rows.dk, j, g, numbers.load(rows.u, j), rows.first_sample);
      put_back(numbers, rows.dk, m, conjugate(g), numbers.load_back(rows.u, m), rows.first_sample);
    }
  });
  for (int64_t j = 0; j <= n / 2; j += n / 2) {
    const Single<T> number;
    const Complex<T> g = {scale * number.load(rows.r, j).re, splat(T(0))};
    if constexpr (kU) put(number, rows.du, j, g, number.load(rows.k, j), rows.first_head);
    if constexpr (kK) put(number, rows.dk, j, g, number.load(rows.u, j), rows.first_sample);
  }
}

template <class T>
void real_part_backward_unit(const RealPartProblem& p, int64_t channel) {
  const int64_t row = 2 * p.n, half = p.n + 2;
  const auto at = [](const void* t, int64_t i) { return static_cast<const T*>(t) + i; };
  const auto to = [](void* t, int64_t i) { return t ? static_cast<T*>(t) + i : nullptr; };
  for (int64_t c = 0; c < p.heads; ++c) {
    const int64_t head = c * p.k_stride + channel * row;
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t sample = b * p.u_stride + channel * row;
      const T* r = at(p.half, ((b * p.heads + c) * p.channels + channel) * half);
      const RealPartRows<T> rows{
          r, at(p.u, sample), at(p.k, head), to(p.du, sample), to(p.dk, head), c == 0, b == 0};
      if (p.du && p.dk)
        real_part_gradients<true, true>(rows, p.n);
      else if (p.du)
        real_part_gradients<true, false>(rows, p.n);
      else if (p.dk)
        real_part_gradients<false, true>(rows, p.n);
    }
  }
}

template <class T>
constexpr RealPartKernel kRealPartKernel = {real_part_forward_unit<T>, real_part_backward_unit<T>};

}  // namespace seqconv::SEQCONV_ISA
