// The passes of a transform of 16-bit rows on tensor cores, there and back; half_shape.cuh says how
// they are laid out.
//
// The convolution is a product modulo x^n - i, as in transform.cuh, and the twist is part of the
// first matrix and of the first twiddles. Every matrix is scaled by a power of two which is about
// the inverse of its root, so that nothing leaves fp16's range: the largest input is below 1/2,
// hence every value below sqrt(n). seqconv/backends/cuda/half_tables.py makes matrices and
// twiddles.
#pragma once
#include "half_products.cuh"

// ---- the outer pass ----
// A tile of columns of each of kRows rows that are worked on together.
template <class S, int kRows>
struct Columns {
  Pairs z[kRows][S::split];

  template <bool kInverse>
  SEQCONV_DEVICE void butterflies() {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        u32 re[S::split], im[S::split];
#pragma unroll
        for (int s = 0; s < S::split; ++s) re[s] = z[r][s].re[e], im[s] = z[r][s].im[e];
        butterfly<kInverse>(re, im);
#pragma unroll
        for (int s = 0; s < S::split; ++s) z[r][s].re[e] = re[s], z[r][s].im[e] = im[s];
      }
  }
  template <bool kConj>
  SEQCONV_DEVICE void times(int s, const uint4& re, const uint4& im) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) multiply<kConj>(z[r][s], re, im);
  }
  // The factors between products and butterflies, which are the same for all columns.
  template <bool kConj>
  SEQCONV_DEVICE void turn(const Lane<S>& l) {
    if (S::absorbs) return;
#pragma unroll
    for (int s = 1; s < S::split; ++s) {
      const uint4 w = load4(l.turns + 64 * (s - 1));
      times<kConj>(s, uint4{w.x, w.x, w.y, w.y}, uint4{w.z, w.z, w.w, w.w});
    }
  }
  // The twiddles: whole, or a factor for each result q of any product times one for each product.
  template <bool kConj>
  SEQCONV_DEVICE void twiddle(const Lane<S>& l, int tile) {
    if (S::keeps) {
#pragma unroll
      for (int s = 0; s < S::split; ++s) {
        const u32 at = l.tables + (S::warps * tile * S::split + s) * 1024;
        times<kConj>(s, load4(at), load4(at + 512));
      }
      return;
    }
    const u32 at = l.tables + S::warps * tile * 1024;
    const uint4 re = load4(at), im = load4(at + 512);
    times<kConj>(0, re, im);
#pragma unroll
    for (int s = 1; s < S::split; ++s) {
      times<kConj>(s, re, im);
      const u32 of_columns = ((s - 1) * 16 + S::warps * tile + l.warp) * 64 + 8 * (l.lane >> 2);
      const uint2 w = load2(l.base + 4 * 4096 + of_columns);
      const u32 r0 = byte_perm(w.x, w.x, 0x1010), i0 = byte_perm(w.x, w.x, 0x3232);
      const u32 r1 = byte_perm(w.y, w.y, 0x1010), i1 = byte_perm(w.y, w.y, 0x3232);
      times<kConj>(s, uint4{r0, r1, r0, r1}, uint4{i0, i1, i0, i1});
    }
  }
};

// The columns of a warp as they came, in the place of left operands.
template <class S>
struct Raw {
  u32 x[S::pair][S::outer][S::split][4];
  u32 gate[S::pair][S::outer][S::split][S::pre ? 4 : 1];

  SEQCONV_DEVICE explicit Raw(const Lane<S>& l) {
#pragma unroll
    for (int r = 0; r < S::pair; ++r)
#pragma unroll
      for (int tile = 0; tile < S::outer; ++tile)
#pragma unroll
        for (int s = 0; s < S::split; ++s) {
          const u32 at = l.at(tile) + r * S::row + S::raw * S::plane + 16 * s * S::pitch;
          load_transposed(x[r][tile][s], at);
          if constexpr (S::pre) load_transposed(gate[r][tile][s], at + S::plane);
        }
  }
  // The largest size of row r, as the bits of a T. What is gated is measured as T's product.
  template <class T>
  SEQCONV_DEVICE u32 largest(int r) const {
    u32 m[2] = {0, 0};  // two chains, since each step waits for the one before
#pragma unroll
    for (int tile = 0; tile < S::outer; ++tile)
#pragma unroll
      for (int s = 0; s < S::split; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          u32 v = x[r][tile][s][i];
          if constexpr (S::pre) v = Format<T>::mul(v, gate[r][tile][s][i]);
          m[i & 1] = Format<T>::larger(m[i & 1], v);
        }
    const u32 both = Format<T>::larger(m[0], m[1]) & 0x7fff7fffu;
    return both >> 16 > (both & 0xffffu) ? both >> 16 : both & 0xffffu;
  }
  // The same in float32: the product of two fp16 numbers may be more than fp16 holds.
  SEQCONV_DEVICE float largest_product(int r) const {
    float m = 0.f;
#pragma unroll
    for (int tile = 0; tile < S::outer; ++tile)
#pragma unroll
      for (int s = 0; s < S::split; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const u32 v = x[r][tile][s][i], g = gate[r][tile][s][S::pre ? i : 0];
          m = fmaxf(m, fabsf(Format<fp16>::low(v) * Format<fp16>::low(g)));
          m = fmaxf(m, fabsf(Format<fp16>::high(v) * Format<fp16>::high(g)));
        }
    return m;
  }
  // The sum of the products of both rows' gated numbers in a tile, in float32.
  template <class T>
  SEQCONV_DEVICE float dot(int tile, int s) const {
    typedef Format<T> F;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 v = x[0][tile][s][i], w = x[S::pair - 1][tile][s][i];
      const u32 g = gate[0][tile][s][S::pre ? i : 0];
      const u32 h = gate[S::pair - 1][tile][s][S::pre ? i : 0];
      sum += F::low(v) * F::low(g) * (F::low(w) * F::low(h));
      sum += F::high(v) * F::high(g) * (F::high(w) * F::high(h));
    }
    return sum;
  }
  // Two numbers as fp16, times the power of two that `measure` found. Rows that threads bring are
  // fp16 and scaled already.
  template <class T>
  SEQCONV_DEVICE u32 scaled(int r, int tile, int s, int i, u32 down) const {
    const u32 v = x[r][tile][s][i];
    if (!S::pieces) return v;
    if constexpr (S::pre) {
      const u32 g = gate[r][tile][s][i];
      const float scale = __uint_as_float(down);
      return halves(Format<T>::low(v) * Format<T>::low(g) * scale,
                    Format<T>::high(v) * Format<T>::high(g) * scale);
    }
    const u32 w = Format<T>::mul(v, down);
    return Format<T>::kMantissa == 10 ? w : halves(Format<T>::low(w), Format<T>::high(w));
  }
};

template <class T, class S>
SEQCONV_DEVICE void outer_forward(const Lane<S>& l, const Raw<S>& raw, const OuterMatrix<S>& f,
                                  const u32 (&down)[S::pair]) {
#pragma unroll
  for (int tile = 0; tile < S::outer; ++tile) {
    Columns<S, S::pair> c;
#pragma unroll
    for (int r = 0; r < S::pair; ++r)
#pragma unroll
      for (int s = 0; s < S::split; ++s) {
        u32 a[4];
#pragma unroll
        for (int i = 0; i < 4;
             ++i)  // a transposed load has its middle registers the other way round
          a[i] = raw.template scaled<T>(r, tile, s, i == 1 ? 2 : i == 2 ? 1 : i, down[r]);
        const int m = S::absorbs ? s : 0;
        Pairs& z = c.z[r][s];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          u32 re[2], im[2];
          mma_first(re, a, f.re[m][2 * j], f.re[m][2 * j + 1]);
          mma_first(im, a, f.im[m][2 * j], f.im[m][2 * j + 1]);
          z.re[2 * j] = re[0], z.re[2 * j + 1] = re[1];
          z.im[2 * j] = im[0], z.im[2 * j + 1] = im[1];
        }
      }
    c.template turn<false>(l);
    c.template butterflies<false>();
    c.template twiddle<false>(l, tile);
#pragma unroll
    for (int r = 0; r < S::pair; ++r)
#pragma unroll
      for (int s = 0; s < S::split; ++s) {
        const Pairs& z = c.z[r][s];
        const u32 at = l.at(tile) + r * S::row + 16 * s * S::pitch;
        store_transposed(at, z.re[0], z.re[2], z.re[1], z.re[3]);
        store_transposed(at + S::plane, z.im[0], z.im[2], z.im[1], z.im[3]);
      }
  }
}
// The mirror image of kRows rows, of which real parts are wanted only. `finish(r, v, gate)` makes
// two words, for columns group and group + 8, of the float32 numbers in v.
template <class S, int kRows, class Finish>
SEQCONV_DEVICE void outer_inverse(const Lane<S>& l, const BackMatrix<S>& g, Finish finish) {
#pragma unroll
  for (int tile = 0; tile < S::outer; ++tile) {
    Columns<S, kRows> c;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int s = 0; s < S::split; ++s) {
        const u32 at = l.at(tile) + r * S::row + 16 * s * S::pitch;
        u32 re[4], im[4];
        load_transposed(re, at), load_transposed(im, at + S::plane);
        c.z[r][s] = {{re[0], re[2], re[1], re[3]}, {im[0], im[2], im[1], im[3]}};
      }
    sync_warp();
    c.template twiddle<true>(l, tile);
    c.template butterflies<true>();
    c.template turn<true>(l);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int s = 0; s < S::split; ++s) {
        const u32 at = l.at(tile) + r * S::row + 16 * s * S::pitch;
        const Pairs& z = c.z[r][s];
        const int m = S::absorbs ? s : 0;
        u32 gate[4] = {}, y[4];
        if (S::post) load_transposed(gate, at + (S::raw + 1 + S::pre) * S::plane);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float v[4];
          mma_first(v, z.re, g.re[m][2 * j], g.re[m][2 * j + 1]);
          mma(v, z.im, g.im[m][2 * j], g.im[m][2 * j + 1]);
          finish(r, v, gate[j], gate[j + 2], y[2 * j], y[2 * j + 1]);
        }
        store_transposed(at, y[0], y[2], y[1], y[3]);
      }
  }
}

// ---- the inner 256 points ----
template <class S>
SEQCONV_DEVICE u32 inner_tile(const Lane<S>& l, int tile) {
  return l.inner + tile * S::warps * S::pitch;
}
// The transform of a tile of the planes that begin at `at`.
template <class S>
SEQCONV_DEVICE Pairs inner_forward(const InnerMatrices<S>& m, u32 at) {
  u32 re[4], im[4];
  load_transposed(re, at), load_transposed(im, at + S::plane);
  Pairs z = left_product(m.left_re, m.left_im, m.left_minus, re, im);
  multiply<false>(z, as_words(m.twiddle_re), as_words(m.twiddle_im));
  return right_product(z, m.right_re, m.right_im, m.right_minus);
}
// Back to the planes. The table of twiddles is symmetric, and so are the matrices.
template <class S>
SEQCONV_DEVICE void inner_inverse(const InnerMatrices<S>& m, Pairs z, u32 at) {
  z = product_of_transpose(m.left_re, m.left_minus, m.left_im, z);
  multiply<true>(z, as_words(m.twiddle_re), as_words(m.twiddle_im));
  z = product_of_transpose(m.left_re, m.left_minus, m.left_im, z);
  store_matrix(at, z.re[0], z.re[1], z.re[2], z.re[3]);
  store_matrix(at + S::plane, z.im[0], z.im[1], z.im[2], z.im[3]);
}
// The taps' spectrum of a tile, which is 128 words of real parts and 128 of imaginary ones.
template <class S>
struct TileSpectrum {
  uint4 re, im;

  // Begins what comes from L2 early.
  SEQCONV_DEVICE TileSpectrum(const u32* spectrum, int tile) {
    if (S::keeps) return;
    const uint4* k = (const uint4*)spectrum + S::warps * tile * 64;
    re = k[0], im = k[32];
  }
  SEQCONV_DEVICE void arrive(const Lane<S>& l, int tile) {
    if (!S::keeps) return;
    const u32 at = l.spectrum + S::warps * tile * 1024;
    re = load4(at), im = load4(at + 512);
  }
};
// There, the product with the taps' spectrum, and back, for all of a team's rows.
template <class S>
SEQCONV_DEVICE void inner(const Lane<S>& l, const InnerMatrices<S>& m, const u32* spectrum) {
#pragma unroll(S::inner < 8 ? S::inner : 4)
  for (int tile = 0; tile < S::inner; ++tile) {
    const u32 at = inner_tile(l, tile);
    TileSpectrum<S> k(spectrum, tile);
    Pairs z[S::pair];
#pragma unroll
    for (int r = 0; r < S::pair; ++r) z[r] = inner_forward<S>(m, at + r * S::row);
    sync_warp();
    k.arrive(l, tile);
#pragma unroll
    for (int r = 0; r < S::pair; ++r) {
      multiply<false>(z[r], k.re, k.im);
      inner_inverse<S>(m, z[r], at + r * S::row);
    }
  }
}
