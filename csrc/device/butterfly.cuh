// The learned butterfly (arXiv 2302.06646, section 3.4): the transform of a real row with any
// matrices in the place of the small Fourier matrices, one for each size, shared by all passes of
// that size; the twiddles stay. Its gradient gives that of the matrices too. Spectra are in natural
// order.
#pragma once
#include "memory.cuh"
#include "transform.cuh"

struct ButterflyArgs {
  i64 batch, channels, length;
  i64 groups;         // blocks that share the rows of one channel
  i64 head_channels;  // channels that share the matrices of one head
  Transform transform;
  const c32* matrices;   // (head, kMatrices)
  c32* spectrum;         // (batch, channels, n), the result
  const c32* dspectrum;  // (batch, channels, n), its gradient
  c32* pass_inputs;      // (block, pass, n): what each pass began with
  c32* dmatrices_parts;  // (block, kMatrices): sums of the matrices' gradients
  Tensor x, dx;
};

// Where the matrix of a radix begins among those of a head, which has them for 2, 3, 4, 5, 8 and 16
// points, row by row.
constexpr int kMatrices = 4 + 9 + 16 + 25 + 64 + 256;
SEQCONV_DEVICE int matrix_offset(int radix) {
  return radix == 2   ? 0
         : radix == 3 ? 4
         : radix == 4 ? 13
         : radix == 5 ? 29
         : radix == 8 ? 54
                      : 118;
}

// z = m z, or the adjoint's product
template <bool kAdjoint, int R>
SEQCONV_DEVICE void apply(c32 (&z)[R], const c32* m) {
  c32 out[R];
#pragma unroll
  for (int p = 0; p < R; ++p) {
    out[p] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < R; ++i)
      out[p] = out[p] + (kAdjoint ? conj(m[i * R + p]) : m[p * R + i]) * z[i];
    keep_order();
  }
#pragma unroll
  for (int p = 0; p < R; ++p) z[p] = out[p];
}

// The element's place of frequency f: its digits in the order of the passes.
SEQCONV_DEVICE int position_of(const Transform& t, int f) {
  int at = 0, block = (int)t.n;
  for (int d = 0; d < (int)t.passes; ++d) {
    const int radix = radix_of(t, d);
    block /= radix;
    at += f % radix * block;
    f /= radix;
  }
  return at;
}

// A pass with its matrix. Forwards the twiddles follow; the adjoint is the matrix alone.
template <bool kAdjoint>
SEQCONV_DEVICE void matrix_pass(const Transform& t, Plane plane, int radix, const c32* m,
                                const c32* twiddles, int block, Team team) {
  with_radix(radix, [&](auto constant) {
    constexpr int R = decltype(constant)::value;
    const int s = block / R;
    for (int c = team.rank; c < (int)t.n / R; c += team.size) {
      const int j = c % s, base = c / s * block + j;
      c32 z[R];
#pragma unroll
      for (int i = 0; i < R; ++i) z[i] = load_shared(plane.at(base + i * s));
      apply<kAdjoint>(z, m);
#pragma unroll
      for (int p = 0; p < R; ++p)
        store_shared(plane.at(base + p * s), kAdjoint ? z[p] : z[p] * twiddles[p * s + j]);
    }
  });
  sync_block();
}

struct ButterflyRow {
  Team team;
  Plane plane;
  int h, first, last;  // rows of the batch
  const c32* matrices;
};
// Every channel has `groups` blocks, which share the batch.
SEQCONV_DEVICE ButterflyRow butterfly_row(const ButterflyArgs& a, unsigned char* shared) {
  const int channels = (int)a.channels, h = blockIdx.x % channels, group = blockIdx.x / channels;
  const int share = ((int)a.batch + (int)a.groups - 1) / (int)a.groups, end = (group + 1) * share;
  return {{(int)threadIdx.x, (int)blockDim.x},
          {(c32*)shared},
          h,
          group * share,
          end < (int)a.batch ? end : (int)a.batch,
          a.matrices + h / (int)a.head_channels * kMatrices};
}

// Transforms a row in the plane. `inputs` keeps what every pass begins with, unless it is null.
SEQCONV_DEVICE void butterfly_passes(const ButterflyArgs& a, const ButterflyRow& r, int b,
                                     c32* inputs) {
  const Transform& t = a.transform;
  const int n = (int)t.n;
  const i64 row = b * a.x.batch + r.h * a.x.channel;
  for (int i = r.team.rank; i < n; i += r.team.size) {
    const float x = i < (int)a.length ? load_any(a.x.data, a.x.dtype, row + i * a.x.time) : 0.f;
    store_shared(r.plane.at(i), c32{x, 0.f});
  }
  sync_block();
  const c32* twiddles = t.tables + 16;
  int block = n;
  for (int d = 0; d < (int)t.passes; ++d) {
    if (inputs != nullptr) {
      for (int i = r.team.rank; i < n; i += r.team.size)
        inputs[(i64)d * n + i] = load_shared(r.plane.at(i));
      sync_block();
    }
    const int radix = radix_of(t, d);
    matrix_pass<false>(t, r.plane, radix, r.matrices + matrix_offset(radix), twiddles, block,
                       r.team);
    twiddles += block;
    block /= radix;
  }
}

SEQCONV_DEVICE void butterfly(const ButterflyArgs& a, unsigned char* shared) {
  const ButterflyRow r = butterfly_row(a, shared);
  const Transform& t = a.transform;
  for (int b = r.first; b < r.last; ++b) {
    butterfly_passes(a, r, b, nullptr);
    c32* out = a.spectrum + (b * a.channels + r.h) * t.n;
    for (int f = r.team.rank; f < (int)t.n; f += r.team.size)
      out[f] = load_shared(r.plane.at(position_of(t, f)));
    sync_block();
  }
}

// Computes from the spectrum's gradient the row's, and that of the matrices, summed over the
// block's rows. A thread sums one element of the 16-point matrix and one of the smaller matrix, of
// which a power of two has at most one.
SEQCONV_DEVICE void butterfly_backward(const ButterflyArgs& a, unsigned char* shared) {
  const ButterflyRow r = butterfly_row(a, shared);
  const Transform& t = a.transform;
  const int n = (int)t.n, rank = r.team.rank;
  c32* inputs = a.pass_inputs + (i64)blockIdx.x * t.passes * n;
  c32 sum_of_16{0.f, 0.f}, sum_of_rest{0.f, 0.f};
  int rest = 0;
  for (int b = r.first; b < r.last; ++b) {
    butterfly_passes(a, r, b, inputs);
    const c32* gradient = a.dspectrum + (b * a.channels + r.h) * t.n;
    for (int f = rank; f < n; f += r.team.size)
      store_shared(r.plane.at(position_of(t, f)), gradient[f]);
    sync_block();
    const c32* twiddles = t.tables + 16;
    int block = n;
    for (int d = 0; d < (int)t.passes - 1; ++d) {
      twiddles += block;
      block /= radix_of(t, d);
    }
    for (int d = (int)t.passes - 1; d >= 0; --d) {
      const int radix = radix_of(t, d), s = block / radix;
      for (int i = rank; i < n; i += r.team.size) {
        c32* at = r.plane.at(i);
        store_shared(at, load_shared(at) * conj(twiddles[i % block]));
      }
      sync_block();
      if (rank < radix * radix) {
        const int p = rank / radix, i = rank % radix;
        c32 sum{0.f, 0.f};
        for (int c = 0; c < n / radix; ++c) {
          const int base = c / s * block + c % s;
          sum =
              sum + load_shared(r.plane.at(base + p * s)) * conj(inputs[(i64)d * n + base + i * s]);
        }
        if (radix == 16) {
          sum_of_16 = sum_of_16 + sum;
        } else {
          sum_of_rest = sum_of_rest + sum;
          rest = radix;
        }
      }
      sync_block();
      matrix_pass<true>(t, r.plane, radix, r.matrices + matrix_offset(radix), twiddles, block,
                        r.team);
      if (d > 0) {
        block *= radix_of(t, d - 1);
        twiddles -= block;
      }
    }
    if (a.dx.data != nullptr) {
      const i64 row = b * a.dx.batch + r.h * a.dx.channel;
      for (int i = rank; i < (int)a.length; i += r.team.size)
        store_any(a.dx.data, a.dx.dtype, row + i * a.dx.time, load_shared(r.plane.at(i)).re);
    }
  }
  c32* out = a.dmatrices_parts + (i64)blockIdx.x * kMatrices;
  if (rank < 256) out[matrix_offset(16) + rank] = sum_of_16;
  if (rest > 0) out[matrix_offset(rest) + rank] = sum_of_rest;
}
