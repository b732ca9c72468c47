// The transform of a row on tensor cores, for 16-bit tensors: the same passes as transform.cuh (so
// the same order of the spectrum), each a product of 16 x 16 matrices, on two planes of fp16
// numbers in shared memory.
//
// A pass of radix r < 16 works on 16 / r groups of 16 columns at once: its matrix has the r-point
// transform as diagonal blocks. The matrices are unitary but for a factor between 0.7 and 1.5,
// which makes their scale a power of two (1/sqrt(3), rounded, would be wrong by the same amount
// everywhere). The row is scaled by a power of two as well, so that nothing leaves fp16's range:
// the largest input is below 1/2, hence every value below sqrt(n). The innermost 256 points never
// leave registers between the first of their products and the last. Twiddles of an outer pass are
// the product of two factors, one for the column in its group of 16, one for the group.
//
// Number is what products accumulate in: u32 (fp16 pairs: fast) or Pair (float32: accurate).
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
// 16 neighbours from a multiple of 16 on: two pieces of 8, the second first every other 64.
struct HalfRow {
  int base, flip;
  // The group-th 16, counted from a tile that is at `base` (16 tiles further on, 8 are to be
  // added).
  SEQCONV_DEVICE HalfRow(int group, int tile)
      : base(tile + 16 * group + (kTileHalves - 256) * (group >> 4)), flip(group << 1 & 8) {}
  SEQCONV_DEVICE int at(int j) const { return base + ((8 * j) ^ flip); }
};
SEQCONV_DEVICE int half_plane_size(int n) { return half_at_tile(n >> 8); }

// Words of the table: the 16-point matrix, the conjugate one with its rows in_time, the twiddles of
// 256 points, and their transpose with its rows in_time; then for each outer pass its matrix and
// the inverse's, and the two sets of twiddle factors.
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

// The same, for one part of the kernel: what follows from the lane is computed there, and needs no
// registers through the others.
SEQCONV_DEVICE Warp for_part(const Warp& w) {
  return warp_of(w.index, w.count, keep_here(w.lane) & 31);  // below 32 to the compiler, too
}

SEQCONV_DEVICE Matrix load_matrix(const u32* words, int lane) {
  const uint4 re = ((const uint4*)words)[lane], im = ((const uint4*)words)[32 + lane];
  return {{re.x, re.y, re.z, re.w}, {im.x, im.y, im.z, im.w}};
}
// Of a 16 x 16 table of complex numbers in row order.
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
// What every tile needs: kept in registers, or, where sums are float32 and twice as large, loaded
// again each time.
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
// Of the taps' spectrum, kept in the order of a result's elements: 256 words of fp16 pairs or
// 512 of float32.
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

// The largest size over the team's threads; all threads of the block come here, and meet where a
// team is more than a warp.
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
// op(t, 8 numbers) for every piece of a row; plain rows by a loop of their own, half as long.
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
// The row, scaled, into plane.im as it lies; returns the exponent that undoes the scaling. It is
// read twice, the second time out of the cache: kept in registers, it would push out other things.
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

// An outer pass: `blocks` blocks of radix points at a distance of `span` times 256; a tile is 16
// rows, (16 / radix) groups of 16 columns.
struct OuterPass {
  const u32* words;
  int radix, span, blocks, groups, tiles;  // tiles of one block
  bool full;                               // every tile has all rows

  SEQCONV_DEVICE Matrix matrix(bool inverse, int lane) const {
    return load_matrix(words + (inverse ? kMatrixWords : 0), lane);
  }
  SEQCONV_DEVICE c32 column_factor(int p, int column) const {
    return ((const c32*)(words + 2 * kMatrixWords))[p * 16 + column];
  }
  SEQCONV_DEVICE c32 group_factor(int p, int group) const {
    return ((const c32*)(words + 2 * kMatrixWords + kColumnWords))[group * radix + p];
  }
};
SEQCONV_DEVICE OuterPass outer_pass(const Transform& t, int d) {
  const u32* words = (const u32*)t.tables + kInnerWords;
  int block = (int)t.n / 256, blocks = 1;
  for (int i = 0; i < d; ++i) {
    words += 2 * kMatrixWords + kColumnWords + block * 32;
    blocks *= radix_of(t, i);
    block /= radix_of(t, i);
  }
  const int radix = radix_of(t, d), span = block / radix, groups = 16 / radix;
  const bool full = 16 % radix == 0 && span * 16 % groups == 0;
  return {words, radix, span, blocks, groups, (span * 16 + groups - 1) / groups, full};
}
// A row of a tile: result p (or input i) of a group of columns, a group that no tile has where
// there is no such row.
struct TileRow {
  int p, group;
};
SEQCONV_DEVICE TileRow tile_row(const OuterPass& pass, int row) {
  const int group = row / pass.radix, p = group < pass.groups ? row - group * pass.radix : 0;
  return {p, group < pass.groups ? group : 1 << 24};
}
// A row's 16 columns in the plane's order.
struct Line {
  int time;
  bool real;
};
// One of the pass's tiles: the first 256 points of its block, its first group of 16 columns, and
// how many there are.
struct Tile {
  int first, columns, span;
  bool full;

  SEQCONV_DEVICE Tile(const OuterPass& pass, const Divisor& by_tiles, int index) {
    const int block = pass.blocks == 1 ? 0 : by_tiles.quotient(index);
    first = block * pass.radix * pass.span;
    columns = (index - block * pass.tiles) * pass.groups;
    span = pass.span;
    full = pass.full;
  }
  SEQCONV_DEVICE bool has(const TileRow& row) const {
    return full || columns + row.group < 16 * span;
  }
  // The row's group of 16 columns; the first where there are no more.
  SEQCONV_DEVICE int group(const TileRow& row) const {
    return has(row) ? columns + row.group : columns;
  }
  SEQCONV_DEVICE HalfRow place(const TileRow& row) const {
    const int c = group(row), tile = row.p * span, at = first + tile + (c >> 4);
    return HalfRow(c, kTileHalves * tile + kTileHalves * first + 8 * (at >> 4));
  }
  SEQCONV_DEVICE Line line(const TileRow& row) const {
    return {(first + row.p * span) * 256 + group(row) * 16, has(row)};
  }
};

template <class Number>
SEQCONV_DEVICE void store_tile(const HalfPlane& plane, const Tile& at, const TileRow (&rows)[2],
                               const Result<Number>& x, const Warp& w) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (!at.has(rows[half])) continue;
    const HalfRow row = at.place(rows[half]);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int place = row.at(j) + 2 * w.thread;
      store_shared((u32*)(plane.re + place), to_operand(x.re[j][half]));
      store_shared((u32*)(plane.im + place), to_operand(x.im[j][half]));
    }
  }
}

template <class Number, bool kReal>
SEQCONV_DEVICE void outer_forward(const HalfPlane& plane, const OuterPass& pass, const Warp& all) {
  const Warp w = for_part(all);
  const Matrix f = pass.matrix(false, w.lane);
  const TileRow loaded = tile_row(pass, w.lane & 15);
  const TileRow rows[2] = {tile_row(pass, w.group), tile_row(pass, w.group + 8)};
  const auto column = every_tile<Number>([&] {
    Factors<Number> factors;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int p = rows[half].p, c = 8 * j + 2 * w.thread;
        factors.set(j, half, pass.column_factor(p, c), pass.column_factor(p, c + 1));
      }
    return factors;
  });
  const Divisor by_tiles(pass.tiles);
  for (int i = w.index; i < pass.blocks * pass.tiles; i += w.count) {
    const Tile at(pass, by_tiles, i);
    const int from = at.place(loaded).at(w.lane >> 4);
    u32 re[4], im[4];
    load_transposed(im, plane.im + from);
    if (!kReal) load_transposed(re, plane.re + from);
    sync_warp();
    const u32 x_im[2][2] = {{im[0], im[1]}, {im[2], im[3]}};
    Result<Number> x;
    if (kReal) {
      x = product_of_real<Number>(f, x_im);
    } else {
      x = product<Number>(
          f, Columns{{{re[0], re[1]}, {re[2], re[3]}}, {{im[0], im[1]}, {im[2], im[3]}}});
    }
    multiply<false>(x, column());
    Factors<Number> group;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const c32 v = pass.group_factor(rows[half].p, at.group(rows[half]));
      group.set(0, half, v, v);
      group.set(1, half, v, v);
    }
    multiply<false>(x, group);
    store_tile(plane, at, rows, x, w);
  }
}

// The mirror image; store(at, matrix, columns) takes the last product: to the plane, or as real
// numbers out of it.
template <class Number, class Store>
SEQCONV_DEVICE void outer_inverse(const HalfPlane& plane, const OuterPass& pass, const Warp& all,
                                  Store store) {
  const Warp w = for_part(all);
  const auto matrix = every_tile<Number>([&] { return pass.matrix(true, w.lane); });
  const TileRow loaded = tile_row(pass, w.lane & 15);
  TileRow rows[2]
              [2];  // of a right operand: 2 thread and 2 thread + 1, and 8 below, in column `group`
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    rows[half][0] = tile_row(pass, 2 * w.thread + 8 * half);
    rows[half][1] = tile_row(pass, 2 * w.thread + 1 + 8 * half);
  }
  const auto column = every_tile<Number>([&] {
    Factors<Number> factors;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        factors.set(j, half, pass.column_factor(rows[half][0].p, in_time(8 * j + w.group)),
                    pass.column_factor(rows[half][1].p, in_time(8 * j + w.group)));
    return factors;
  });
  const Divisor by_tiles(pass.tiles);
  for (int i = w.index; i < pass.blocks * pass.tiles; i += w.count) {
    const Tile at(pass, by_tiles, i);
    const int from = at.place(loaded).at(w.lane >> 4);
    u32 re[4], im[4];
    load_transposed(re, plane.re + from);
    load_transposed(im, plane.im + from);
    sync_warp();
    Columns x{{{re[0], re[1]}, {re[2], re[3]}}, {{im[0], im[1]}, {im[2], im[3]}}};
    Factors<Number> group;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const TileRow &p = rows[half][0], &q = rows[half][1];
      group.set(0, half, pass.group_factor(p.p, at.group(p)), pass.group_factor(q.p, at.group(q)));
      group.re[1][half] = group.re[0][half];
      group.im[1][half] = group.im[0][half];
    }
    multiply<true>(x, group);
    multiply<true>(x, column());
    store(at, matrix(), x);
  }
}

// All outer passes of a staged row.
template <class Number>
SEQCONV_DEVICE void tensor_forward_passes(const Transform& t, const HalfPlane& plane,
                                          const Warp& w) {
  const int outer = (int)t.passes - 2;
  if (outer == 0) return;
  outer_forward<Number, true>(plane, outer_pass(t, 0), w);
  sync_block();
  for (int d = 1; d < outer; ++d) {
    outer_forward<Number, false>(plane, outer_pass(t, d), w);
    sync_block();
  }
}

// The 256 points of a tile of the plane to their spectrum. Alone (n = 256), they are the real row
// itself.
template <class Number, class Twiddles>
SEQCONV_DEVICE Result<Number> inner_forward(const Transform& t, const HalfPlane& plane, int tile,
                                            const Matrix& f, const Twiddles& twiddles,
                                            const Warp& w) {
  const int from = half_at_tile(tile) + half_at((w.lane & 15) * 16 + (w.lane >> 4) * 8);
  u32 re[4], im[4];
  load_transposed(im, plane.im + from);
  Result<Number> x;
  if (t.passes == 2) {
    const u32 x_im[2][2] = {{im[0], im[1]}, {im[2], im[3]}};
    x = product_of_real<Number>(load_matrix((const u32*)t.tables + kInnerWords, w.lane), x_im);
  } else {
    load_transposed(re, plane.re + from);
    x = product<Number>(
        f, Columns{{{re[0], re[1]}, {re[2], re[3]}}, {{im[0], im[1]}, {im[2], im[3]}}});
  }
  multiply<false>(x, twiddles());
  // its rows are the first digit of the frequency, its columns the time still to be transformed
  const Matrix rows = to_operand(x);
  return product<Number>(rows, transposed(f));
}
// A tile's spectrum in global memory: 16 bytes of every lane beside the other lanes', and only the
// lane that wrote them reads them back.
template <class Number>
struct alignas(16) Piece {
  Number at[16 / sizeof(Number)];
};
template <class Number>
SEQCONV_DEVICE void store_result(u32* tile, const Result<Number>& x, int lane) {
  constexpr int kEach = 16 / sizeof(Number);
#pragma unroll
  for (int p = 0; p < 8 / kEach; ++p) {
    Piece<Number> piece;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int e = p * kEach + i;
      piece.at[i] = (e < 4 ? x.re : x.im)[e >> 1 & 1][e & 1];
    }
    ((Piece<Number>*)tile)[p * 32 + lane] = piece;
  }
}
template <class Number>
SEQCONV_DEVICE Result<Number> load_result(const u32* tile, int lane) {
  constexpr int kEach = 16 / sizeof(Number);
  Result<Number> x;
#pragma unroll
  for (int p = 0; p < 8 / kEach; ++p) {
    const Piece<Number> piece = ((const Piece<Number>*)tile)[p * 32 + lane];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int e = p * kEach + i;
      (e < 4 ? x.re : x.im)[e >> 1 & 1][e & 1] = piece.at[i];
    }
  }
  return x;
}
// The spectra of all tiles, which frees the plane.
template <class Number>
SEQCONV_DEVICE void put_aside(const Transform& t, const HalfPlane& plane, u32* to, const Warp& w) {
  const u32* table = (const u32*)t.tables;
  const Matrix f = load_matrix(table, w.lane);
  const auto twiddles = twiddles_of<Number>(table + 2 * kMatrixWords, w);
  for (int tile = w.index; tile < (int)t.n / 256; tile += w.count)
    store_result(to + tile * 64 * (int)sizeof(Number),
                 inner_forward<Number>(t, plane, tile, f, twiddles, w), w.lane);
  sync_warp();  // a team of more warps meets before it writes to the plane again: team_max
}
// And back, as the right operand of the last product.
template <class Number, class Twiddles>
SEQCONV_DEVICE Columns inner_inverse(const Result<Number>& spectrum, const Matrix& f,
                                     const Twiddles& twiddles) {
  Result<Number> x = product<Number>(f, transposed(to_operand(spectrum)));
  multiply<true>(x, twiddles());
  return transposed(to_operand(x));
}

// A tile of results out of the product's registers: with columns in the order of in_time, a lane
// has 4 neighbours in each of two rows.
template <class Sink>
SEQCONV_DEVICE void emit(const Pair (&v)[2][2], const Warp& w, const Line& first,
                         const Line& second, const Sink& sink) {
  const int times[2] = {first.time + 4 * w.thread, second.time + 4 * w.thread};
  if (sink.row != nullptr) {
    if (first.real) sink.plain(times[0], v[0][0], v[1][0]);
    if (second.real) sink.plain(times[1], v[0][1], v[1][1]);
  } else if (sink.fit) {
    const auto to = sink.fours();
    if (first.real) sink.at_once(to, times[0], v[0][0], v[1][0]);
    if (second.real) sink.at_once(to, times[1], v[0][1], v[1][1]);
  } else {
    const auto to = sink.sink();
    if (first.real) sink.one_by_one(to, times[0], v[0][0], v[1][0]);
    if (second.real) sink.one_by_one(to, times[1], v[0][1], v[1][1]);
  }
}

// Everything from the innermost 256 points on: `spectra(tile, f, twiddles)` gives the product with
// the taps' spectrum; the sink takes 4 results from time t on. What a loop needs is made for it
// alone, the sink at the end: kept any longer, it would cost the others registers.
template <class Number, class Spectra, class MakeSink>
SEQCONV_DEVICE void tensor_inverse(const Transform& t, const HalfPlane& plane, const Warp& all,
                                   Spectra spectra, MakeSink make_sink) {
  const Warp w = for_part(all);
  const int outer = (int)t.passes - 2, tiles = (int)t.n / 256;
  const u32* table = (const u32*)t.tables;
  {
    const Matrix f = load_matrix(table, w.lane);
    const auto back_in_time =
        every_tile<Number>([&] { return load_matrix(table + kMatrixWords, w.lane); });
    const auto there = twiddles_of<Number>(table + 2 * kMatrixWords, w),
               back = twiddles_of<Number>(table + 2 * kMatrixWords + 512, w);
    for (int tile = w.index; tile < tiles; tile += w.count) {
      const Columns x = inner_inverse<Number>(spectra(tile, f, there), back_in_time(), back);
      if (outer == 0) {
        const Warp own = for_part(w);
        Pair v[2][2];
        real_product(v, load_matrix(table + kInnerWords + kMatrixWords, own.lane), x);
        emit(v, own, {own.group * 16, true}, {(own.group + 8) * 16, true}, make_sink());
        continue;
      }
      sync_warp();
      const Result<Number> y = product<Number, true>(f, x);
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // half_at(16 (group + 8 half) + 8 j + 2 thread), of which most is the lane's alone
          const int row = (2 * w.group + (j ^ ((w.group >> 2) & 1))) * 8 + 2 * w.thread;
          const int at = half_at_tile(tile) + row + 128 * half;
          store_shared((u32*)(plane.re + at), to_operand(y.re[j][half]));
          store_shared((u32*)(plane.im + at), to_operand(y.im[j][half]));
        }
    }
  }
  sync_block();
  for (int d = outer - 1; d > 0; --d) {
    const OuterPass pass = outer_pass(t, d);
    const TileRow rows[2] = {tile_row(pass, w.group), tile_row(pass, w.group + 8)};
    outer_inverse<Number>(plane, pass, w, [&](const Tile& at, const Matrix& m, const Columns& x) {
      store_tile(plane, at, rows, product<Number>(m, x), w);
    });
    sync_block();
  }
  if (outer == 0) return;
  const OuterPass pass = outer_pass(t, 0);
  const TileRow first = tile_row(pass, w.group), second = tile_row(pass, w.group + 8);
  const auto sink = make_sink();
  outer_inverse<Number>(plane, pass, w, [&](const Tile& at, const Matrix& m, const Columns& x) {
    Pair v[2][2];
    real_product(v, m, x);
    emit(v, w, at.line(first), at.line(second), sink);
  });
  sync_block();
}
