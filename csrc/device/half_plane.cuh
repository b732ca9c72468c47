// A row of complex fp16 numbers in shared memory, the matrices and factors of the table that a warp
// works on it with, and how the row gets there.
//
// Products are summed in Number: u32, pairs of fp16 numbers, is fast, and Pair, float32, is
// accurate.
#pragma once
#include "fftconv.cuh"
#include "tile.cuh"

// The real parts of 256 points, then their imaginary parts, so that one address serves both. Rows
// of 8 numbers move by one place every 256 points and every 4096, and swap every 64, so that the 8
// rows that an instruction reads lie in different banks for the distances of long rows.
struct HalfPlane {
  unsigned short *re, *im;
  SEQCONV_DEVICE explicit HalfPlane(unsigned short* p) : re(p), im(p + 256) {}
};
enum { kTileHalves = 2 * 256 + 8 };  // halves
// half_at(256 tile + i) for i < 256 is this and half_at(i).
SEQCONV_DEVICE int half_at_tile(int tile) { return kTileHalves * tile + (tile >> 4) * 8; }
SEQCONV_DEVICE int half_at(int i) {
  return half_at_tile(i >> 8) + ((((i & 255) >> 3) ^ ((i >> 6) & 1)) * 8) + (i & 7);
}
// 16 neighbours from a multiple of 16 on. They are two pieces of 8, which swap every other 64.
struct HalfRow {
  int base, flip;
  // The group-th 16, counted from a tile that is at `base` (16 tiles further on, 8 are to be
  // added).
  SEQCONV_DEVICE HalfRow(int group, int tile)
      : base(tile + 16 * group + (kTileHalves - 256) * (group >> 4)), flip(group << 1 & 8) {}
  SEQCONV_DEVICE int at(int j) const { return base + ((8 * j) ^ flip); }
};
SEQCONV_DEVICE int half_plane_size(int n) { return half_at_tile(n >> 8); }

// The words of the table. They hold the 16-point matrix, the conjugate one with its rows in_time,
// the twiddles of 256 points, and their transpose with its rows in_time. Each outer pass follows
// with its matrix, the inverse's, and two sets of twiddle factors.
enum { kMatrixWords = 256, kInnerWords = 2 * kMatrixWords + 2 * 512, kColumnWords = 512 };

// The column of a group of 16 that the inverse keeps at place i, so that the last result of a lane,
// places 2 thread and 2 thread + 1 of both halves, are four neighbours.
SEQCONV_DEVICE int in_time(int i) { return 4 * (i >> 1 & 3) + 2 * (i >> 3) + (i & 1); }

struct Warp {
  int index, count, lane, group, thread;
};
SEQCONV_DEVICE Warp warp_of(int index, int count, int lane) {
  return {index, count, lane, lane >> 2, lane & 3};
}
SEQCONV_DEVICE Warp warp_of(Team team) {
  return warp_of(team.rank >> 5, team.size >> 5, team.rank & 31);
}

// The same warp for one part of the kernel. What follows from the lane is computed in that part,
// and takes no registers in the others.
SEQCONV_DEVICE Warp for_part(const Warp& w) {
  return warp_of(w.index, w.count, keep_here(w.lane) & 31);  // below 32 to the compiler, too
}

SEQCONV_DEVICE Matrix load_matrix(const u32* words, int lane) {
  const uint4 re = ((const uint4*)words)[lane], im = ((const uint4*)words)[32 + lane];
  return {{re.x, re.y, re.z, re.w}, {im.x, im.y, im.z, im.w}};
}
// The factors in a 16 x 16 table of complex numbers in row order.
template <class Number>
SEQCONV_DEVICE Factors<Number> load_factors(const u32* words, const Warp& w) {
  Factors<Number> f;
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const c32x2 v = ((const c32x2*)words)[((w.group + 8 * half) * 16 + 8 * j) / 2 + w.thread];
      f.set(j, half, v.x, v.y);
    }
  return f;
}
// What every tile needs. It is kept in registers; where sums are float32 and take twice as many, it
// is loaded again each time.
template <class Number, class Load>
struct EveryTile {
  Load load;
  decltype(load()) kept;
  SEQCONV_DEVICE explicit EveryTile(Load l) : load(l), kept(l()) {}
  SEQCONV_DEVICE auto operator()() const {
    if (sizeof(Number) == sizeof(u32)) return kept;
    keep_order();
    return load();
  }
};
template <class Number, class Load>
SEQCONV_DEVICE EveryTile<Number, Load> every_tile(Load load) {
  return EveryTile<Number, Load>(load);
}
template <class Number>
SEQCONV_DEVICE auto twiddles_of(const u32* words, const Warp& w) {
  return every_tile<Number>([=] { return load_factors<Number>(words, w); });
}
// A tile of the taps' spectrum, which is kept in the order of a result's elements, as 256 words of
// fp16 pairs or 512 of float32.
SEQCONV_DEVICE Factors<u32> load_spectrum(const u32* tile, int lane, u32) {
  const uint4 re = ((const uint4*)tile)[2 * lane], im = ((const uint4*)tile)[2 * lane + 1];
  return {{{re.x, re.y}, {re.z, re.w}}, {{im.x, im.y}, {im.z, im.w}}};
}
SEQCONV_DEVICE Factors<Pair> load_spectrum(const u32* tile, int lane, Pair) {
  Factors<Pair> f;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const c32x2 v = ((const c32x2*)tile)[4 * lane + q];
    f.set(q >> 1, q & 1, v.x, v.y);
  }
  return f;
}

// The largest size over the team's threads. All threads of the block must come here, and they meet
// where a team is more than a warp.
SEQCONV_DEVICE float team_max(float x, float* shared, Team team) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const float other = shuffle_xor(x, lanes);
    x = x > other ? x : other;
  }
  if (team.size == 32) return x;
  if ((team.rank & 31) == 0) store_shared(shared + (team.rank >> 5), x);
  sync_block();
  float all = load_shared(shared);
  for (int i = 1; i < team.size / 32; ++i) {
    const float other = load_shared(shared + i);
    all = all > other ? all : other;
  }
  return all;
}
// Calls op(t, 8 numbers) for every piece of a row. Plain rows have a loop of their own, which has
// half the instructions.
template <class T, class Op>
SEQCONV_DEVICE void each_piece(const Gated<T>& source, int n, Team team, Op op) {
  float v[8];
  if (source.plain) {
    for (int t = team.rank * 8; t < n; t += team.size * 8) {
      to_floats<T>(source.plain_piece(t), v);
      op(t, v);
    }
    return;
  }
  for (int t = team.rank * 8; t < n; t += team.size * 8) {
    source.piece(t, v);
    op(t, v);
  }
}
// Writes the row, scaled, to plane.im, and returns the exponent that undoes the scale. The row is
// read twice, the second time from the cache, since registers do not suffice to keep it.
template <class T>
SEQCONV_DEVICE int stage(const HalfPlane& plane, int n, const Gated<T>& source, float* shared,
                         Team team) {
  const bool in_pieces = source.in_pieces();
  float largest = 0.f;
  const auto measure = [&](float x) { largest = fmaxf(largest, fabsf(x)); };
  if (in_pieces) {
    each_piece(source, n, team, [&](int, const float (&v)[8]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) measure(v[i]);
    });
  } else {
    for (int t = team.rank; t < n; t += team.size) measure(source(t));
  }
  const int exponent = exponent_above(team_max(largest, shared, team));
  const float scale = power_of_two(-exponent);
  if (in_pieces) {
    each_piece(source, n, team, [&](int t, const float (&v)[8]) {
      const uint4 packed{pack(v[0] * scale, v[1] * scale), pack(v[2] * scale, v[3] * scale),
                         pack(v[4] * scale, v[5] * scale), pack(v[6] * scale, v[7] * scale)};
      store_shared((uint4*)(plane.im + half_at(t)), packed);
    });
  } else {
    for (int t = 2 * team.rank; t < n; t += 2 * team.size)
      store_shared((u32*)(plane.im + half_at(t)), pack(source(t) * scale, source(t + 1) * scale));
  }
  sync_block();
  return exponent;
}
