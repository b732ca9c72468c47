// Kernels that are sums of exponentials, k[c, h, l] = sum_n Re(w[c, h, n] exp(a[h, n] l)), and the
// gradients of w and a (S4D, arXiv 2206.11893).
//
// Written in base 8, l = d0 + 8 d1 + 64 d2 + ..., exp(a l) is a product of one power for each
// digit. Only those powers, 8 for each digit of a mode, are formed in float64 and rounded once: the
// error of exp(a l) is that of a few factors and products in float32, however many turns its phase
// has made. A tile of 32 rows of 64 positions is the product of two tables in shared memory, one of
// a row's positions and one of the rows, which holds w too.
//
// Floor: 4 n flops for an element of k, 8 n for one of its gradient (there n counts as a power of
// two, or a multiple of 32), in fused multiply-adds; 4 bytes for an element, in backward once for
// every 32 modes. Prediction, from sm_90's machine code: 42 warp instructions for a mode of 512
// elements of k, 165 for 32 modes of 32 elements of its gradient, over the issue rate; or the bytes
// over the bandwidth, if that is more. Nothing is as large as (h, n, length).
#pragma once
#include "memory.cuh"

constexpr int kRowLength = 64, kTileRows = 32, kTile = kTileRows * kRowLength;
constexpr int kModes = 32;    // shared memory holds the tables of so many at a time
constexpr int kWarpRows = 8;  // rows of a tile that a warp computes: 4 warps

// The arguments. Complex numbers in float64 are pairs.
struct SsmArgs {
  i64 heads, channels, length;
  i64 groups;  // blocks that share the tiles of one channel
  i64 modes, digits;
  const double* exponents;     // a: (channels, modes)
  c32* powers;                 // (channels, modes, digits, 8)
  const c32* rounded_weights;  // w in float32, for k: (heads, channels, modes)
  const double* weights;       // w, for the gradients
  double* sums;                // (group, heads, channels, modes, 4)
  double *dexponents, *dweights;
  Tensor k, dk;
};

struct alignas(16) Two {
  c32 at[2];
};
// powers = exp(a p 8^d) for p below 8: one thread for every (channel, mode, digit d)
SEQCONV_DEVICE void ssm_powers(const SsmArgs& a, unsigned char*) {
  const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= a.channels * a.modes * a.digits) return;
  const double* exponent = a.exponents + i / a.digits * 2;
  const double steps = (double)(1ll << (3 * (i % a.digits)));
  // The phase as turns, so that the whole ones drop out exactly: first those of one step, with
  // 1 / (2 pi) as a sum of two numbers, then those of all steps.
  const double high = 0.15915494309189535, low = -9.839338337591243e-18;
  const double by = exponent[1];
  const double turns = fma(by, low, fma(by, high, -rint(by * high)));
  double sine, cosine;
  sincospi(2. * fma(turns, steps, -rint(turns * steps)), &sine, &cosine);
  const double size = exp(exponent[0] * steps), re = size * cosine, im = size * sine;
  double x = 1., y = 0.;
  for (int p = 0; p < 8; ++p) {
    a.powers[8 * i + p] = {(float)x, (float)y};
    const double next = x * re - y * im;
    y = x * im + y * re;
    x = next;
  }
}

// exp(a l) of one mode
SEQCONV_DEVICE c32 power(const c32* powers, i64 l) {
  c32 z{1.f, 0.f};
  for (; l > 0; l >>= 3, powers += 8)
    if ((l & 7) > 0) z = z * powers[l & 7];
  return z;
}

struct ExponentialsRow {
  int h, first, last;  // tiles
  const c32* powers;   // of the channel's first mode
};
// Every channel has `groups` blocks, which share its tiles.
SEQCONV_DEVICE ExponentialsRow exponentials_row(const SsmArgs& a) {
  const int h = blockIdx.x % (int)a.channels, group = blockIdx.x / (int)a.channels;
  const int tiles = (int)((a.length + kTile - 1) / kTile);
  const int share = (tiles + (int)a.groups - 1) / (int)a.groups;
  const int first = group * share, last = first + share;
  return {h, first, last < tiles ? last : tiles, a.powers + h * a.modes * a.digits * 8};
}

// Where mode m and position t (a column, or a row) of a table lie.
struct Table {
  c32* data;
  int mode_step, step;
  SEQCONV_DEVICE c32* at(int m, int t) const { return data + m * mode_step + t * step; }
};
// start(m) exp(a t 8^digit) for kSize values of t. Zero beyond the row, where a mode that grows
// would overflow and spoil the sums with 0 * inf.
template <int kSize, class F>
SEQCONV_DEVICE void fill(const Table& table, const SsmArgs& a, const c32* powers, int modes,
                         int digit, F&& start) {
  for (int i = threadIdx.x; i < 8 * modes; i += blockDim.x) {
    const int m = i / 8, low = i % 8;
    const c32* p = powers + (m * a.digits + digit) * 8;
    const c32 z = start(m) * p[low];
    for (int high = 0; high < kSize / 8; ++high) {
      const int t = 8 * high + low;
      const bool inside = (i64)t << (3 * digit) < a.length;
      store_shared(table.at(m, t), inside ? z * p[8 + high] : c32{0.f, 0.f});
    }
  }
}
struct One {
  SEQCONV_DEVICE c32 operator()(int) const { return {1.f, 0.f}; }
};

// A lane computes columns `lane` and `lane + 32` of its warp's rows.
SEQCONV_DEVICE void ssm_forward(const SsmArgs& a, unsigned char* shared) {
  const ExponentialsRow r = exponentials_row(a);
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * kWarpRows, n = (int)a.modes;
  const Table columns{(c32*)shared, kRowLength, 1};
  const Table rows{columns.data + kModes * kRowLength, kTileRows, 1};
  bool filled = false;  // columns, with all modes
  for (int tile = r.first; tile < r.last; ++tile) {
    const i64 begin = (i64)tile * kTile + row * kRowLength;  // of the warp
    for (i64 c = 0; c < a.heads; ++c) {
      const c32* weights = a.rounded_weights + (c * a.channels + r.h) * n;
      float total[kWarpRows][2] = {};  // group by group: thousands of modes would add up errors
      for (int first = 0; first < n; first += kModes) {
        const int modes = n - first < kModes ? n - first : kModes;
        const c32* powers = r.powers + first * a.digits * 8;
        sync_block();
        if (!filled) fill<kRowLength>(columns, a, powers, modes, 0, One{});
        filled = n <= kModes;
        fill<kTileRows>(rows, a, powers, modes, 2, [&](int m) {
          return weights[first + m] * power(powers + m * a.digits * 8, (i64)tile * kTile);
        });
        sync_block();
        if (begin >= a.length) continue;
        float sum[kWarpRows][2] = {};
        for (int m = 0; m < modes; ++m) {
          const c32 x = load_shared(columns.at(m, lane)), y = load_shared(columns.at(m, lane + 32));
#pragma unroll
          for (int i = 0; i < kWarpRows; i += 2) {
            const Two w = load_shared((const Two*)rows.at(m, row + i));
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              sum[i + j][0] += w.at[j].re * x.re;
              sum[i + j][0] -= w.at[j].im * x.im;
              sum[i + j][1] += w.at[j].re * y.re;
              sum[i + j][1] -= w.at[j].im * y.im;
            }
          }
        }
#pragma unroll
        for (int i = 0; i < 2 * kWarpRows; ++i) total[i / 2][i % 2] += sum[i / 2][i % 2];
      }
      float* out = a.k.row<float>(0, c, r.h);
#pragma unroll
      for (int i = 0; i < 2 * kWarpRows; ++i) {
        const i64 l = begin + i * 32 + lane;
        if (l < a.length) out[l * a.k.time] = total[i / 2][i % 2];
      }
    }
  }
}

// sums = (S_0, S_1) of the block's tiles, S_p = sum_l l^p dk[l] exp(a l). A lane computes one mode
// of its warp's rows; where there are fewer modes than lanes, lanes share a mode's columns.
SEQCONV_DEVICE void ssm_backward(const SsmArgs& a, unsigned char* shared) {
  const ExponentialsRow r = exponentials_row(a);
  const int rank = threadIdx.x, row = rank / 32 * kWarpRows, n = (int)a.modes;
  int lanes = 2;  // a row has 4 columns for each of the others
  while (lanes < kModes && lanes < n) lanes *= 2;
  const int m = rank % lanes, width = kRowLength / 32 * lanes, begin = rank % 32 / lanes * width;
  const Table columns{(c32*)shared, 1, lanes};
  const Table rows{columns.data + kRowLength * lanes, 1, lanes};
  float* gradient = (float*)(rows.data + kTileRows * lanes);
  double* results = (double*)gradient;  // (thread, 4), when the last tile is done
  for (int first = 0; first < n; first += kModes) {
    const int modes = n - first < kModes ? n - first : kModes;
    const c32* powers = r.powers + first * a.digits * 8;
    fill<kRowLength>(columns, a, powers, modes, 0, One{});
    fill<kTileRows>(rows, a, powers, modes, 2, One{});
    for (i64 c = 0; c < a.heads; ++c) {
      const float* dk = a.dk.row<const float>(0, c, r.h);
      double sums[4] = {};
      for (int tile = r.first; tile < r.last; ++tile) {
        const i64 start = (i64)tile * kTile;
        sync_block();
        for (int i = rank; i < kTile; i += blockDim.x) {
          const i64 l = start + i;
          store_shared(gradient + i, l < a.length ? dk[l * a.dk.time] : 0.f);
        }
        sync_block();
        if (m >= modes || start + row * kRowLength >= a.length) continue;
        c32 z[kWarpRows] = {}, z1[kWarpRows] = {};
        for (int t = begin; t < begin + width; t += 4) {
          c32 x[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) x[j] = load_shared(columns.at(m, t + j));
#pragma unroll
          for (int i = 0; i < kWarpRows; ++i) {
            const Four<float> g =
                load_shared((const Four<float>*)(gradient + (row + i) * kRowLength + t));
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              z[i] = z[i] + x[j] * g.at[j];
              z1[i] = z1[i] + x[j] * (float)(t + j) * g.at[j];
            }
          }
        }
        c32 s{0.f, 0.f}, s1{0.f, 0.f};
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i) {
          const c32 x = load_shared(rows.at(m, row + i));
          s = s + x * z[i];
          s1 = s1 + x * (z1[i] + z[i] * (float)((row + i) * kRowLength));
        }
        const c32 x = power(powers + m * a.digits * 8, start);
        s = s * x;
        s1 = s1 * x + s * (float)start;
        sums[0] += s.re;
        sums[1] += s.im;
        sums[2] += s1.re;
        sums[3] += s1.im;
      }
      sync_block();
      for (int i = 0; i < 4; ++i) store_shared(results + 4 * rank + i, sums[i]);
      sync_block();
      if (rank < modes) {
        const i64 part = blockIdx.x / (int)a.channels;
        double* out = a.sums + (((part * a.heads + c) * a.channels + r.h) * n + first + rank) * 4;
        for (int i = 0; i < 4; ++i) {
          double sum = 0.;
          for (int thread = rank; thread < (int)blockDim.x; thread += lanes)
            sum += load_shared(results + 4 * thread + i);
          out[i] = sum;
        }
      }
    }
  }
}

// dw = conj(S_0) and da = sum_c conj(w S_1), with the blocks' sums added in order: one thread for
// every (channel, mode)
SEQCONV_DEVICE void ssm_gradients(const SsmArgs& a, unsigned char*) {
  const i64 count = a.channels * a.modes, i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  double re = 0., im = 0.;
  for (i64 c = 0; c < a.heads; ++c) {
    double sum[4] = {};
    for (i64 part = 0; part < a.groups; ++part)
      for (int j = 0; j < 4; ++j) sum[j] += a.sums[((part * a.heads + c) * count + i) * 4 + j];
    const i64 at = 2 * (c * count + i);
    const double x = a.weights[at], y = a.weights[at + 1];
    a.dweights[at] = sum[0];
    a.dweights[at + 1] = -sum[1];
    re += x * sum[2] - y * sum[3];
    im -= x * sum[3] + y * sum[2];
  }
  a.dexponents[2 * i] = re;
  a.dexponents[2 * i + 1] = im;
}
