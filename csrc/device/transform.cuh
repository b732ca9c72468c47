// The transform of a row in float32: radix passes in place over a plane in shared memory
// (FlashButterfly, arXiv 2302.06646 section 3, with butterflies of up to 16 points in registers).
//
// The convolution is a product modulo x^n - i: position t is multiplied by w^t, w = exp(i pi / 2n),
// and one complex transform of n points does the rest, without padding. With n = r_0 r_1 ... and
// s_d = r_{d+1} r_{d+2} ..., pass d takes the r_d points at distance s_d and multiplies the result
// p of column j by W^{pj}, W = exp(-2 pi i / (r_d s_d)). The twist is part of pass 0: w^{i s_0} at
// its inputs, w^j in its twiddles. Nothing is reordered behind the passes, since only the product
// with the taps' spectrum, which has the same order, happens there. The last radix is 16.
//
// The inverse is the mirror image. It has no scale, since the taps' spectrum carries the factor
// 1/n.
#pragma once
#include "radix.cuh"

// A row's place in shared memory. It is one element wider every 16, so that columns of 16
// neighbours meet no bank twice.
struct Plane {
  c32* data;
  SEQCONV_DEVICE c32* at(int i) const { return data + i + (i >> 4); }
};

// The columns of a pass that a plane holds: all of them, or a window of neighbours of a row too
// long for shared memory. Point i of a column is the one at i times a distance s from `base` on.
struct AllColumns {
  SEQCONV_DEVICE int global(int i) const { return i; }
  SEQCONV_DEVICE c32* at(Plane plane, int base, int i, int s) const {
    return plane.at(base + i * s);
  }
};
// Steps between points are always the same, since s is a multiple of 16. Where it is not known, all
// the steps would take more registers than there are.
struct KnownColumns : AllColumns {
  SEQCONV_DEVICE c32* at(Plane plane, int base, int i, int s) const {
    return plane.at(base) + i * (s + s / 16);
  }
};
struct SomeColumns {
  int shift, lower, first;  // of `lower` neighbours, 2^shift from `first` on
  SEQCONV_DEVICE int global(int i) const {
    return (i >> shift) * lower + first + (i & ((1 << shift) - 1));
  }
  SEQCONV_DEVICE c32* at(Plane plane, int base, int i, int s) const {
    return plane.at(base + i * s);
  }
};

// A transform of n points, which is the product of the radices.
struct Transform {
  i64 n, passes;
  i64 radices;  // of one byte each, the first in the lowest byte
  // The constants of the passes, which seqconv/backends/cuda/tables.py makes. In float32 these are
  // 16 factors for the first inputs, then a table of twiddles for each pass but the last.
  // half_shape.cuh says what they are for tensor cores.
  const c32* tables;
};

// What a kernel knows of its transform when it is compiled: nothing, or everything but the tables.
struct AnyTransform : Transform {
  typedef AllColumns Columns;
  static constexpr bool known = false;
  SEQCONV_DEVICE static AnyTransform of(const Transform& t) { return {t}; }
  SEQCONV_DEVICE static int threads(i64 row_threads) { return (int)row_threads; }
  // The factor of input i in pass 0, which is w^(i s_0)
  SEQCONV_DEVICE c32 twist(int i) const { return tables[i]; }
};
template <int kPoints, int kPasses, int kRadices>
struct KnownTransform {
  typedef KnownColumns Columns;
  static constexpr bool known = true;
  static constexpr i64 n = kPoints, passes = kPasses, radices = kRadices;
  const c32* tables;

  SEQCONV_DEVICE static KnownTransform of(const Transform& t) { return {t.tables}; }
  SEQCONV_DEVICE static int threads(i64) { return kPoints < 512 * 16 ? kPoints / 16 : 512; }
  SEQCONV_DEVICE c32 twist(int i) const { return root<true>(i * 16 / (kRadices & 255)); }
};

struct Team {
  int rank, size;  // of the threads that share a row
};
// f(i) for every number below `count` that is this thread's. Where the team's size is known too,
// the compiler leaves nothing of the loop.
template <class F>
SEQCONV_DEVICE void share(Team team, int count, F&& f) {
#pragma unroll
  for (int first = 0; first < count; first += team.size)
    if (first + team.rank < count) f(first + team.rank);
}

// Combines the team's values by op, with the same result in all threads. `shared` has room for
// each.
template <class T, class Op>
SEQCONV_DEVICE T team_reduce(Team team, T value, T* shared, Op op) {
  store_shared(shared + team.rank, value);
  sync_block();
  for (int width = 256; width > 0; width /= 2) {
    if (team.rank < width && team.rank + width < team.size)
      store_shared(shared + team.rank,
                   op(load_shared(shared + team.rank), load_shared(shared + team.rank + width)));
    sync_block();
  }
  const T all = load_shared(shared);
  sync_block();
  return all;
}

template <class T>
SEQCONV_DEVICE int radix_of(const T& t, int pass) {
  return (int)(t.radices >> (8 * pass)) & 255;
}

// Divides by a number that is a power of two more often than not.
struct Divisor {
  int by, shift;  // shift < 0: not a power of two
  SEQCONV_DEVICE explicit Divisor(int d) : by(d), shift((d & (d - 1)) == 0 ? log2_of(d) : -1) {}
  SEQCONV_DEVICE int quotient(int x) const { return shift >= 0 ? x >> shift : x / by; }
};

// Pass 0, which reads the row from its source. It takes kRadix points at distance s, and the plane
// holds s * kRadix points.
template <class T, class Source, class Columns>
SEQCONV_DEVICE void first_pass(const T& t, Plane plane, int points, Columns columns, Source source,
                               Team team) {
  with_radix(radix_of(t, 0), [&](auto radix) {
    constexpr int R = decltype(radix)::value;
    const int s = points / R, distance = (int)t.n / R;
    share(team, s, [&](int j) {
      const int column = columns.global(j);
      const c32* twiddles = t.tables + 16 + column;
      c32 z[R] = {};
      if constexpr (T::known) {
        float x[R] = {};
        if (source) {
          source.template each<R>(column, distance, [&](int i, auto p) { x[i] = to_float(*p); });
        } else {
#pragma unroll
          for (int i = 0; i < R; ++i) x[i] = load_shared(columns.at(plane, j, i, s)).re;
        }
#pragma unroll
        for (int i = 0; i < R; ++i) z[i] = i == 0 ? to_complex(x[i]) : t.twist(i) * x[i];
      } else {
#pragma unroll
        for (int i = 0; i < R; ++i) {
          const auto x = source(column + i * distance);
          z[i] = i == 0 ? to_complex(x) : t.twist(i) * x;
        }
      }
      dft<false>(z);
#pragma unroll
      for (int p = 0; p < R; ++p) {
        store_shared(columns.at(plane, j, p, s), z[p] * twiddles[p * distance]);
        if (p % 4 == 3) keep_order();
      }
    });
  });
}

// The inverse of pass 0. Real results go to `row`, or all stay in the plane where it is none.
template <class T, class Columns, class Row>
SEQCONV_DEVICE void last_pass(const T& t, Plane plane, int points, Columns columns, Row row,
                              Team team) {
  with_radix(radix_of(t, 0), [&](auto radix) {
    constexpr int R = decltype(radix)::value;
    const int s = points / R, distance = (int)t.n / R;
    share(team, s, [&](int j) {
      const int column = columns.global(j);
      const c32* twiddles = t.tables + 16 + column;
      c32 z[R];
#pragma unroll
      for (int p = 0; p < R; ++p) {
        z[p] = load_shared(columns.at(plane, j, p, s)) * conj(twiddles[p * distance]);
        if (p % 4 == 3) keep_order();
      }
      dft<true>(z);
#pragma unroll
      for (int i = 1; i < R; ++i) z[i] = conj(t.twist(i)) * z[i];
      if (row) {
        row.template each<R>(column, distance, [&](int i, auto p) { from_float(*p, z[i].re); });
      } else {
#pragma unroll
        for (int i = 0; i < R; ++i) store_shared(columns.at(plane, j, i, s), z[i]);
      }
    });
  });
}

// One pass in the middle, over blocks of `block` points in the plane with `block / R` columns each.
template <bool kInverse, class Columns>
SEQCONV_DEVICE void pass(int radix, const c32* twiddles, int distance, Plane plane, int points,
                         int block, Columns columns, Team team) {
  with_radix(radix, [&](auto constant) {
    constexpr int R = decltype(constant)::value;
    const int s = block / R;
    const Divisor by_columns(s);
    share(team, points / R, [&](int c) {
      const int of_block = by_columns.quotient(c), j = c - of_block * s,
                base = of_block * block + j;
      const c32* w = twiddles + columns.global(j);
      c32 z[R];
#pragma unroll
      for (int i = 0; i < R; ++i) {
        z[i] = load_shared(columns.at(plane, base, i, s));
        if (kInverse && i > 0) z[i] = z[i] * conj(w[i * distance]);
        if (i % 2 == 1) keep_order();
      }
      dft<kInverse>(z);
#pragma unroll
      for (int i = 0; i < R; ++i) {
        if (!kInverse && i > 0) z[i] = z[i] * w[i * distance];
        store_shared(columns.at(plane, base, i, s), z[i]);
        if (i % 2 == 1) keep_order();
      }
    });
  });
}

// Passes 1 to last - 1, forwards or backwards.
template <bool kInverse, class T, class Columns>
SEQCONV_DEVICE void middle_passes(const T& t, Plane plane, int points, int last, Columns columns,
                                  Team team) {
  const int first = radix_of(t, 0);
  int block = points / first, distance = (int)t.n / first;
  const c32* twiddles = t.tables + 16 + t.n;
#pragma unroll
  for (int d = 1; d < last; ++d) {
    const int radix = radix_of(t, d);
    if (!kInverse) {
      pass<false>(radix, twiddles, distance / radix, plane, points, block, columns, team);
      sync_block();
    }
    twiddles += distance;
    block /= radix;
    distance /= radix;
  }
  if (!kInverse) return;
#pragma unroll
  for (int d = last - 1; d >= 1; --d) {
    const int radix = radix_of(t, d);
    block *= radix;
    distance *= radix;
    twiddles -= distance;
    pass<true>(radix, twiddles, distance / radix, plane, points, block, columns, team);
    sync_block();
  }
}

// The last pass, op, and the inverse's first pass in registers. op(f, at, z): `at` is the element's
// place in the plane, f its number in the spectrum as it is kept in global memory, neighbours for
// neighbouring threads.
enum Middle { kForwardOnly = 1, kInverseOnly = 2, kBoth = 3 };
template <Middle kWhich, class T, class Op>
SEQCONV_DEVICE void middle(const T& t, Plane plane, Op op, Team team) {
  const int count = (int)t.n / 16;
  share(team, count, [&](int c) {
    c32 z[16];
    if (kWhich & kForwardOnly) {
#pragma unroll
      for (int i = 0; i < 16; ++i) z[i] = load_shared(plane.at(c * 16) + i);
      dft<false>(z);
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      z[i] = op((i64)c + i * count, c * 16 + i, z[i]);
      if (i % 2 == 1) keep_order();
    }
    if (kWhich & kInverseOnly) {
      dft<true>(z);
#pragma unroll
      for (int i = 0; i < 16; ++i) store_shared(plane.at(c * 16) + i, z[i]);
    }
  });
}
