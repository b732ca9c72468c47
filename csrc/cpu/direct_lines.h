// Short kernels where channels are neighbours in memory: the vectors are of channels, and a block
// of times after another is read and written as it lies, without panels. The sums have the order of
// direct.h's, and so the bits of its results.
#pragma once
#include "direct.h"
#include "panels.h"
#include "taps.h"

namespace seqconv::SEQCONV_ISA {

template <class T>
struct DirectLines {
  static constexpr int64_t kTimes = 64;  // of a block
  static constexpr int64_t kSpan = kTimes + kDirectTaps;
  static constexpr int kTogether = 4;  // times whose sums are made side by side

  // Of kRow channels, a line of floats; what the unit lacks of them is zero.
  static constexpr int64_t kRow = kLineChannels;
  struct Row {
    int64_t first, channels;  // of the unit
    alignas(64) T taps[kDirectTaps * kRow];
    alignas(64) T bias[kRow];
    alignas(64) double sums[(1 + kDirectTaps) * kRow];  // dbias, then every tap's gradient
  };
  Work<T>& w;
  int64_t count = 0;
  Row rows[kMostLines];
  alignas(64) T staging[2][kSpan * kRow] = {};
  alignas(64) T results[kTimes * kRow] = {};

  explicit DirectLines(Work<T>& w) : w(w) {
    for (int64_t g = 0; g < w.unit.channels; ++g) {
      if (g % kRow == 0) {
        rows[count] = Row{};
        rows[count++].first = g;
      }
      Row& row = rows[count - 1];
      row.channels = g + 1 - row.first;
      for (int64_t j = 0; j < w.width; ++j) row.taps[j * kRow + g % kRow] = w.kernel(g, 0)[j];
      row.bias[g % kRow] = value_of<T>(w.kernel_row(w.p.bias, 0, 0, g));
    }
  }

  // The row's channels at time t.
  static Series line(const Row& row, const Series& s, int64_t t) {
    return {s.base + (t * s.stride + row.first) * size_of(s.dtype), s.dtype, 1, s.streamed};
  }
  // Values at times one after another, `apart` scalars apart.
  struct Block {
    const T* first;
    int64_t apart;
  };
  // `count` times from `from` on, zero outside of [0, length), as they lie or else in `staging`.
  // Fetches what comes afterwards.
  Block find(const Row& row, const Series& s, int64_t length, int64_t from, int64_t count,
             T* staging) const {
    const int64_t bytes = s.stride * size_of(s.dtype);
    const char* next = line(row, s, from + kTimes).base;
    for (int64_t i = 0; i < count && from + kTimes + i < length; ++i, next += bytes)
      __builtin_prefetch(next);
    // Sums are made of kTogether times, of which the last may lie beyond the sequence.
    const bool whole = row.channels == kRow && s.dtype == kDtype<T>;
    if (whole && (count - w.width + 1) % kTogether == 0 && from >= 0 && from + count <= length)
      return {reinterpret_cast<const T*>(line(row, s, from).base), s.stride};
    for (int64_t i = 0; i < count; ++i) {
      T* to = staging + i * kRow;
      if (from + i >= 0 && from + i < length)
        read(line(row, s, from + i), 0, row.channels, to);
      else
        for (int64_t g = 0; g < kRow; ++g) to[g] = 0;
    }
    return {staging, kRow};
  }
  void write_block(const Row& row, const Series& s, int64_t from, int64_t count) const {
    const bool whole = row.channels == kRow && s.dtype == kDtype<T>;
    for (int64_t i = 0; i < count; ++i) {
      const Series at = line(row, s, from + i);
      const T* values = results + i * kRow;
      if (!whole) {
        write(at, 0, row.channels, values);
        continue;
      }
      SEQCONV_UNROLL
      for (int64_t g = 0; g < kRow; g += kLanes<T>) {
        T* to = reinterpret_cast<T*>(at.base) + g;
        const Vec<T> x = load_vector(values + g);
        kStreams&& s.streamed ? stream<T>(to, x) : store_vector(to, x);
      }
    }
  }

  // results[t] = sum_j taps[j] x[t + width - 1 - j] + bias, or, flipped, sum_j taps[j] x[t + j]
  template <bool kFlipped>
  void convolve(const Row& row, Block x, int64_t count) {
    const int64_t width = w.width;
    for (int64_t g = 0; g < kRow; g += kLanes<T>) {
      const Vec<T> added = kFlipped ? Vec<T>{} : load_vector(row.bias + g);
      for (int64_t t = 0; t < count; t += kTogether) {
        Vec<T> acc[kTogether] = {};
        for (int64_t j = 0; j < width; ++j) {
          const Vec<T> tap = load_vector(row.taps + j * kRow + g);
          const T* from = x.first + (t + (kFlipped ? j : width - 1 - j)) * x.apart + g;
          SEQCONV_UNROLL
          for (int i = 0; i < kTogether; ++i) acc[i] += tap * load_vector(from + i * x.apart);
        }
        SEQCONV_UNROLL
        for (int i = 0; i < kTogether; ++i)
          store_vector(results + (t + i) * kRow + g, kFlipped ? acc[i] : acc[i] + added);
      }
    }
  }

  // sums += sum_t dv[t] x[t + reach - j], for t < count, and the same of dv alone.
  void add_sums(Row& row, Block gradients, Block inputs, int64_t count) {
    const T* dv = gradients.first + w.reach * gradients.apart;
    for (int64_t g = 0; g < kRow; g += kLanes<T>) {
      for (int64_t j = w.wants_dbias ? -1 : 0; j < (w.wants_dk || w.wants_dskip ? w.width : 0);
           ++j) {
        const T* x = j < 0 ? nullptr : inputs.first + (w.width - 1 - j) * inputs.apart + g;
        Vec<T> acc[kTogether] = {};
        int64_t t = 0;
        for (; t + kTogether <= count; t += kTogether) {
          SEQCONV_UNROLL
          for (int i = 0; i < kTogether; ++i) {
            const Vec<T> d = load_vector(dv + (t + i) * gradients.apart + g);
            acc[i] += j < 0 ? d : d * load_vector(x + (t + i) * inputs.apart);
          }
        }
        for (; t < count; ++t) {
          const Vec<T> d = load_vector(dv + t * gradients.apart + g);
          acc[0] += j < 0 ? d : d * load_vector(x + t * inputs.apart);
        }
        const Vec<T> sum = (acc[0] + acc[1]) + (acc[2] + acc[3]);
        for (int lane = 0; lane < kLanes<T>; ++lane)
          row.sums[(1 + j) * kRow + g + lane] += static_cast<double>(sum[lane]);
      }
    }
  }

  void forward(int64_t b) {
    const int64_t length = w.p.length_of(b), before = w.width - 1 - w.reach;
    const Series u = w.row(w.u, b, 0, 0), y = w.row(w.y, b, 0, 0);
    for (int64_t t = 0; t < length; t += kTimes) {
      const int64_t times = length - t < kTimes ? length - t : kTimes;
      for (int64_t i = 0; i < count; ++i) {
        const Block x = find(rows[i], u, length, t - before, times + w.width - 1, staging[0]);
        convolve<false>(rows[i], x, times);
        write_block(rows[i], y, t, times);
      }
    }
  }

  void backward(int64_t b) {
    const int64_t length = w.p.length_of(b), before = w.width - 1 - w.reach;
    const Series u = w.row(w.u, b, 0, 0), dy = w.row(w.dy, b, 0, 0), du = w.row(w.du, b, 0, 0);
    for (int64_t t = 0; t < length; t += kTimes) {
      const int64_t times = length - t < kTimes ? length - t : kTimes;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t span = times + w.width - 1;
        const Block dv = find(rows[i], dy, length, t - w.reach, span, staging[0]);
        Block x{};
        if (w.wants_dk || w.wants_dskip) x = find(rows[i], u, length, t - before, span, staging[1]);
        add_sums(rows[i], dv, x, times);
        if (!w.wants_dx) continue;
        convolve<true>(rows[i], dv, times);
        write_block(rows[i], du, t, times);
      }
    }
  }

  void store_sums() const {
    for (int64_t g = 0; g < w.unit.channels; ++g) {
      const double* sums = rows[g / kRow].sums + g % kRow;
      if (w.wants_dbias) w.dots(g, 0)[kBias] += sums[0];
      for (int64_t j = 0; j < w.width; ++j) w.dots(g, 0)[kScalars + j] += sums[(1 + j) * kRow];
    }
  }
};

}  // namespace seqconv::SEQCONV_ISA
