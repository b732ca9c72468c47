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
#pragma once
#include "outer_pass.cuh"

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

// Transforms the 256 points of a tile of the plane. Where n is 256, they are the real row itself.
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
// A piece of a tile's spectrum in global memory. 16 bytes of every lane lie beside the other
// lanes', and only the lane that wrote them reads them.
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
// Writes the spectra of all tiles to global memory, which frees the plane.
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
// The inverse, as the right operand of the last product.
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

// Everything from the innermost 256 points on. `spectra(tile, f, twiddles)` gives the product with
// the taps' spectrum, and the sink takes 4 results from time t on. Each loop makes what it needs,
// and the sink is made at the end, since they would cost the other loops registers.
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
