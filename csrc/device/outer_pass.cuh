// The outer passes of the transform in tensor.cuh: those before the innermost 256 points, and their
// inverses.
#pragma once
#include "half_plane.cuh"

// An outer pass over `blocks` blocks of radix points at a distance of `span` times 256. A tile is
// 16 rows, which are (16 / radix) groups of 16 columns.
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
// A row of a tile, which is result p (or input i) of a group of columns. Where there is no such
// row, its group is one that no tile has.
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
// the number of groups.
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

// The mirror image. store(at, matrix, columns) takes the last product and writes it to the plane,
// or as real numbers out of it.
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
