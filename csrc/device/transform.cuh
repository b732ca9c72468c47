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

// A transform of n points, which is the product of the radices.
struct Transform {
  i64 n, passes;
  i64 radices;  // of one byte each, the first in the lowest byte
  // The constants of the passes, which seqconv/backends/cuda/tables.py makes. In float32 these are
  // 16 factors for the first inputs, then a table of twiddles for each pass but the last.
  // half_plane.cuh says what they are for tensor cores.
  const c32* tables;
};

// A row's place in shared memory. It is one element wider every 16, so that columns of 16
// neighbours meet no bank twice.
struct Plane {
  c32* data;
  SEQCONV_DEVICE c32* at(int i) const { return data + i + (i >> 4); }
};

struct Team {
  int rank, size;  // of the threads that share a row
};

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

SEQCONV_DEVICE int radix_of(const Transform& t, int pass) {
  return (int)(t.radices >> (8 * pass)) & 255;
}

// Divides by a number that is a power of two more often than not.
struct Divisor {
  int by, shift;  // shift < 0: not a power of two
  SEQCONV_DEVICE explicit Divisor(int d) : by(d), shift((d & (d - 1)) == 0 ? log2_of(d) : -1) {}
  SEQCONV_DEVICE int quotient(int x) const { return shift >= 0 ? x >> shift : x / by; }
};

// The columns of a pass that a plane holds: all of them, or a window of neighbours of a row too
// long for shared memory.
struct AllColumns {
  SEQCONV_DEVICE int global(int i) const { return i; }
};
struct SomeColumns {
  int shift, lower, first;  // of `lower` neighbours, 2^shift from `first` on
  SEQCONV_DEVICE int global(int i) const {
    return (i >> shift) * lower + first + (i & ((1 << shift) - 1));
  }
};

// Pass 0, which reads the row from its source. It takes kRadix points at distance s, and the plane
// holds s * kRadix points.
template <class Source, class Columns>
SEQCONV_DEVICE void first_pass(const Transform& t, Plane plane, int points, Columns columns,
                               Source source, Team team) {
  const c32* twist = t.tables;
  const c32* twiddles = t.tables + 16;
  with_radix(radix_of(t, 0), [&](auto radix) {
    constexpr int R = decltype(radix)::value;
    const int s = points / R;
    const int distance = (int)t.n / R;
    for (int j = team.rank; j < s; j += team.size) {
      const int column = columns.global(j);
      c32 z[R];
#pragma unroll
      for (int i = 0; i < R; ++i) z[i] = twist[i] * source(column + i * distance);
      dft<false>(z);
#pragma unroll
      for (int p = 0; p < R; ++p) {
        store_shared(plane.at(p * s + j), z[p] * twiddles[p * distance + column]);
        if (p % 4 == 3) keep_order();
      }
    }
  });
}

// The inverse of pass 0. Its results stay in the plane for one loop over them (inlined here, a sink
// with its gates and activations would be repeated for every radix and point).
template <class Columns>
SEQCONV_DEVICE void last_pass(const Transform& t, Plane plane, int points, Columns columns,
                              Team team) {
  const c32* twist = t.tables;
  const c32* twiddles = t.tables + 16;
  with_radix(radix_of(t, 0), [&](auto radix) {
    constexpr int R = decltype(radix)::value;
    const int s = points / R;
    const int distance = (int)t.n / R;
    for (int j = team.rank; j < s; j += team.size) {
      const int column = columns.global(j);
      c32 z[R];
#pragma unroll
      for (int p = 0; p < R; ++p) {
        z[p] = load_shared(plane.at(p * s + j)) * conj(twiddles[p * distance + column]);
        if (p % 4 == 3) keep_order();
      }
      dft<true>(z);
#pragma unroll
      for (int i = 0; i < R; ++i) store_shared(plane.at(i * s + j), conj(twist[i]) * z[i]);
    }
  });
}

// One pass in the middle, over blocks of `block` points in the plane with `block / R` columns each.
template <bool kInverse, class Columns>
SEQCONV_DEVICE void pass(int radix, const c32* twiddles, int distance, Plane plane, int points,
                         int block, Columns columns, Team team) {
  with_radix(radix, [&](auto constant) {
    constexpr int R = decltype(constant)::value;
    const int s = block / R, count = points / R;
    const Divisor by_columns(s);
    for (int c = team.rank; c < count; c += team.size) {
      const int of_block = by_columns.quotient(c), j = c - of_block * s,
                base = of_block * block + j;
      const c32* w = twiddles + columns.global(j);
      c32 z[R];
#pragma unroll
      for (int i = 0; i < R; ++i) {
        z[i] = load_shared(plane.at(base + i * s));
        if (kInverse) z[i] = z[i] * conj(w[i * distance]);
        if (i % 2 == 1) keep_order();
      }
      dft<kInverse>(z);
#pragma unroll
      for (int i = 0; i < R; ++i) {
        store_shared(plane.at(base + i * s), kInverse ? z[i] : z[i] * w[i * distance]);
        if (i % 2 == 1) keep_order();
      }
    }
  });
}

// Passes 1 to last - 1, forwards or backwards.
template <bool kInverse, class Columns>
SEQCONV_DEVICE void middle_passes(const Transform& t, Plane plane, int points, int last,
                                  Columns columns, Team team) {
  const int first = radix_of(t, 0);
  int block = points / first, distance = (int)t.n / first;
  const c32* twiddles = t.tables + 16 + t.n;
  for (int d = 1; d < last && !kInverse; ++d) {
    const int radix = radix_of(t, d);
    pass<false>(radix, twiddles, distance / radix, plane, points, block, columns, team);
    sync_block();
    twiddles += distance;
    block /= radix;
    distance /= radix;
  }
  if (!kInverse) return;
  for (int d = 1; d < last; ++d) {
    twiddles += distance;
    block /= radix_of(t, d);
    distance /= radix_of(t, d);
  }
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
template <Middle kWhich, class Op>
SEQCONV_DEVICE void middle(const Transform& t, Plane plane, Op op, Team team) {
  const int count = (int)t.n / 16;
  for (int c = team.rank; c < count; c += team.size) {
    c32 z[16];
    if (kWhich & kForwardOnly) {
#pragma unroll
      for (int i = 0; i < 16; ++i) z[i] = load_shared(plane.at(c * 16 + i));
      dft<false>(z);
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      z[i] = op(i * count + c, c * 16 + i, z[i]);
      if (i % 2 == 1) keep_order();
    }
    if (kWhich & kInverseOnly) {
      dft<true>(z);
#pragma unroll
      for (int i = 0; i < 16; ++i) store_shared(plane.at(c * 16 + i), z[i]);
    }
  }
}
