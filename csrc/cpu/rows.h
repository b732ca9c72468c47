// Rows of tensors as the transform reads and writes them: any dtype, any stride, products with
// gates, zeros outside. Where memory already holds what is wanted nothing is copied.
#pragma once
#include "dtypes.h"
#include "vectors.h"

namespace seqconv::SEQCONV_ISA {

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

// out[i] = value(at), i < n, where at(x) is x[i], or as many from there on as a vector has.
template <class T, class Value>
SEQCONV_INLINE void fill(int64_t n, T* out, bool streamed, const Value& value) {
  int64_t i = 0;
  const auto one = [&i](const T* x) { return x[i]; };
  const auto many = [&i](const T* x) { return load_vector(x + i); };
  if (kStreams && streamed) {
    for (; i < n && reinterpret_cast<uintptr_t>(out + i) % 64; ++i) out[i] = value(one);
    for (; i + kLanes<T> <= n; i += kLanes<T>) stream<T>(out + i, value(many));
  }
  for (; i + kLanes<T> <= n; i += kLanes<T>) store_vector(out + i, value(many));
  for (; i < n; ++i) out[i] = value(one);
}
template <class T>
SEQCONV_INLINE void copy(const T* x, int64_t n, T* out, bool streamed = false) {
  fill(n, out, streamed, [=](const auto& at) { return at(x); });
}
// out[i] = a[i] b[i], i < n
template <class T>
SEQCONV_INLINE void multiply(const T* a, const T* b, int64_t n, T* out, bool streamed = false) {
  fill(n, out, streamed, [=](const auto& at) { return at(a) * at(b); });
}

// out[i] = s[t + i], i < n
template <class T>
void read(const Series& s, int64_t t, int64_t n, T* out) {
  if (const T* from = contiguous<T>(s)) return copy(from + t, n, out);
  dispatch(s.dtype, [&](auto tag) {
    using S = typename decltype(tag)::Type;
    const S* from = reinterpret_cast<const S*>(s.base) + t * s.stride;
    if (s.stride == 1) {
      int64_t i = convert_many(from, n, out);
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
      int64_t i = convert_many(in, n, to);
      for (; i < n; ++i) narrow(in[i], to[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) narrow(in[i], to[i * s.stride]);
    }
  });
}

constexpr int64_t kChunk = 512;  // positions converted at a time: bursts that memory likes

// values[i] += s[t + i], i < n
template <class T>
void add_row(const Series& s, int64_t t, int64_t n, T* values) {
  T staging[kChunk];
  for (int64_t i = 0, some; i < n; i += some) {
    some = n - i < kChunk ? n - i : kChunk;
    const T* there = read_window(s, t + i, some, staging);
    for (int64_t j = 0; j < some; ++j) values[i + j] += there[j];
  }
}

// s[t + i] = a[i] b[i], i < n <= kChunk
template <class T>
void write_product(const Series& s, int64_t t, int64_t n, const T* a, const T* b) {
  if (T* to = contiguous<T>(s)) return multiply(a, b, n, to + t, s.streamed);
  T product[kChunk];
  multiply(a, b, n, product);
  write(s, t, n, product);
}

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

}  // namespace seqconv::SEQCONV_ISA
