// The gradients of the convolution of 16-bit rows on tensor cores: du by the conjugate spectrum, dk
// as a sum over rows of spectra, and the skip's as a sum of products.
#pragma once
#include "half_fftconv.cuh"

// dk's spectrum, summed over rows in registers. Tensor cores add up in float32: a tile of products
// is a left operand, and the right one has a power of two on its diagonal, which brings all rows to
// one scale.
template <class S>
struct KernelSums {
  float re[S::inner][2][4], im[S::inner][2][4];
  int exponent;  // of the power of two that they are to be multiplied by

  template <class Op>
  SEQCONV_DEVICE void each(Op op) {
#pragma unroll
    for (int tile = 0; tile < S::inner; ++tile)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) op(re[tile][j][i]), op(im[tile][j][i]);
  }
  SEQCONV_DEVICE void clear() {
    each([](float& x) { x = 0.f; });
    exponent = -1000;
  }
  // The diagonal for a row of this exponent. What is there gives way to a larger one.
  SEQCONV_DEVICE u32 diagonal(int e, int lane) {
    if (e > exponent) {
      const float down = exponent - e < -126 ? 0.f : power_of_two(exponent - e);
      each([=](float& x) { x *= down; });
      exponent = e;
    }
    // 2^15 for the largest rows, down to fp16's smallest number: float32 sums hold no wider range.
    const int below = exponent - e;
    const u32 bits = below < 30 ? (u32)(30 - below) << 10 : below < 40 ? 1u << (39 - below) : 0u;
    const int group = lane >> 2, thread = lane & 3;
    return 2 * thread == group ? bits : 2 * thread + 1 == group ? bits << 16 : 0u;
  }
  SEQCONV_DEVICE void add(int tile, const Pairs& x, u32 diagonal, u32 zero) {
    mma(re[tile][0], x.re, diagonal, zero), mma(re[tile][1], x.re, zero, diagonal);
    mma(im[tile][0], x.im, diagonal, zero), mma(im[tile][1], x.im, zero, diagonal);
  }
  SEQCONV_DEVICE void write(const Lane<S>& l, float* to) {
    // The diagonal began at 2^15, and 2^e may be no float32.
    const int e = exponent < -225 ? -240 : exponent - 15, half = e / 2;
    each([=](float& x) { x = x * power_of_two(half) * power_of_two(e - half); });
#pragma unroll
    for (int tile = 0; tile < S::inner; ++tile) {
      Four<float>* at = (Four<float>*)(to + (l.warp + S::warps * tile) * 512) + l.lane;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        at[32 * j] = {re[tile][j][0], re[tile][j][1], re[tile][j][2], re[tile][j][3]};
        at[64 + 32 * j] = {im[tile][j][0], im[tile][j][1], im[tile][j][2], im[tile][j][3]};
      }
    }
  }
};
// The skip's gradient as the diagonal of dy^T u, whose products are exact and whose sums are
// float32. Any fragments serve in which dy's and u's numbers have the same places.
template <class T>
SEQCONV_DEVICE void add_skip(float (&d)[2][4], const u32 (&dy)[4], const u32 (&u)[4]) {
  const u32 a[4] = {dy[0], dy[2], dy[1], dy[3]};
  mma_of<T>(d[0], a, u[0], u[1]), mma_of<T>(d[1], a, u[2], u[3]);
}
// This lane's part of the trace.
SEQCONV_DEVICE float of_diagonal(const float (&d)[2][4], int lane) {
  const int group = lane >> 2, thread = lane & 3;
  return 2 * thread == group       ? d[0][0] + d[1][2]
         : 2 * thread + 1 == group ? d[0][1] + d[1][3]
                                   : 0.f;
}

// Inner points of dv (row 0) and x (row 1) together: dv's turn into those of dx.
template <class S>
SEQCONV_DEVICE void inner_gradients(const Lane<S>& l, const InnerMatrices<S>& m,
                                    const u32* spectrum, KernelSums<S>& sums, u32 diagonal) {
  u32 zero = 0;
  keep(zero);  // in a register, where it has to be anyway beside the diagonal
#pragma unroll
  for (int tile = 0; tile < S::inner; ++tile) {
    const u32 at = inner_tile(l, tile);
    TileSpectrum<S> k(spectrum, tile);
    Pairs g = inner_forward<S>(m, at), p = g;
    const Pairs x = inner_forward<S>(m, at + S::row);
    sync_warp();
    multiply<true>(p, as_words(x.re), as_words(x.im));
    sums.add(tile, p, diagonal, zero);
    k.arrive(l, tile);
    multiply<true>(g, k.re, k.im);
    inner_inverse<S>(m, g, at);
  }
}
// Takes dx, of which the gradients of u and pre_gate are made, or its sum over heads so far.
template <class T>
struct HeadGradient {
  InputGradient<T> to;
  float* dx;  // null where there is one head
  bool begins, ends;

  SEQCONV_DEVICE void operator()(int t, c32 z) const {
    if (t < to.begin || t >= to.end) return;
    if (!begins) z.re += dx[t];
    if (ends)
      to(t, z);
    else
      dx[t] = z.re;
  }
};
template <class T>
SEQCONV_DEVICE HeadGradient<T> head_gradient(const ConvolutionArgs& a, const Place& p) {
  float* dx = a.dx == nullptr ? nullptr : a.dx + (p.b * a.channels + p.h) * a.length + p.shift;
  return {input_gradient<T>(a, p), dx, a.head == 0, a.head == a.heads - 1};
}

// Where a slot's sums go.
template <class S>
struct Parts {
  float *dk, *dskip;  // dskip's for this thread
  u32* x_spectrum;

  SEQCONV_DEVICE Parts(const Lane<S>& l, const ConvolutionArgs& a, const Unit& unit) {
    const i64 row = unit.sums_row(a, l.slot);
    dk = (float*)(a.dk_parts + row * S::points);
    dskip = a.dskip_parts == nullptr ? nullptr : a.dskip_parts + row * S::threads + l.rank;
    x_spectrum = S::pair == 1 ? a.x_spectra + row * S::points : nullptr;
  }
};

// The last pass of dx, which becomes numbers of T.
template <class T, class S>
SEQCONV_DEVICE void inverse_pieces(const Lane<S>& l, float up) {
  outer_inverse<S, 1>(l, BackMatrix<S>(l), [&](int, float (&v)[4], u32, u32, u32& low, u32& high) {
    store_scaled<T>(v, up, low, high);
  });
}
// 8 numbers of T: dx, which is fp16 numbers times a scale, times those of a gate
template <class T>
SEQCONV_DEVICE uint4 gated_piece(const uint4& dx, float scale, const uint4& by) {
  typedef Format<fp16> Half;
  const u32 x[4] = {dx.x, dx.y, dx.z, dx.w}, g[4] = {by.x, by.y, by.z, by.w};
  u32 y[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    y[i] = Format<T>::pack(Half::low(x[i]) * scale * Format<T>::low(g[i]),
                           Half::high(x[i]) * scale * Format<T>::high(g[i]));
  return uint4{y[0], y[1], y[2], y[3]};
}
template <class T, class S>
SEQCONV_DEVICE void backward_pieces(const Lane<S>& l, const ConvolutionArgs& a, const Unit& unit,
                                    const u32* spectrum, float divisor) {
  const Parts<S> parts(l, a, unit);
  const Stream<T, S> u(l, a.u, unit), pre(l, a.pre_gate, unit), dy(l, a.dy, unit),
      post(l, a.post_gate, unit), du(l, a.du, unit), dpre(l, a.dpre_gate, unit);
  KernelSums<S> sums;
  sums.clear();
  float skip[2][4] = {}, gated_skip = 0.f;
  const auto whole = [&](int row) { return S::whole ? Place{} : unit.place_of_row(a, row); };
  const auto outputs = [&](int row) { return S::whole ? Place{} : inside(a, whole(row)); };
  const auto fetch = [&](int row) {
    if (row < unit.last) {
      dy.fetch(l, S::raw * S::plane, row, whole(row));
      if (S::pre) post.fetch(l, (S::raw + 1) * S::plane, row, whole(row));
      u.fetch(l, S::row + S::raw * S::plane, row, outputs(row));
      if (S::pre) pre.fetch(l, S::row + (S::raw + 1) * S::plane, row, outputs(row));
    }
    end_of_group();
  };
  int row = unit.first + l.slot;
  fetch(row);
  await<0>();
  l.meet();
  for (; row < unit.last; row += S::slots) {
    const Raw<S> raw(l);
    int e[2];
    u32 down[2];
    measure<T, 1>(l, raw, divisor, e, down);
    if (!S::pre || parts.dskip != nullptr) {
#pragma unroll
      for (int tile = 0; tile < S::outer; ++tile)
#pragma unroll
        for (int s = 0; s < S::split; ++s)
          if constexpr (S::pre)
            gated_skip += raw.template dot<T>(tile, s);
          else
            add_skip<T>(skip, raw.x[0][tile][s], raw.x[1][tile][s]);
    }
    outer_forward<T>(l, raw, OuterMatrix<S>(l), down);
    l.meet();
    fetch(row + S::slots);
    inner_gradients(l, InnerMatrices<S>(l), spectrum, sums, sums.diagonal(e[0] + e[1], l.lane));
    l.meet();
    const float up = power_of_two(e[0]) * divisor;
    if (S::pre)
      outer_inverse_any<S, 1>(l);
    else
      inverse_pieces<T, S>(l, up);
    await<0>();
    l.meet();
    if constexpr (S::pre) {
      const auto write = [&](const Stream<T, S>& to, const Stream<T, S>& by) {
        if (to.tensor->data == nullptr) return;
        const T* factors = by.begin(l, row, outputs(row));  // they are in the cache
        to.each(l, row, outputs(row), [&](int i, T* piece) {
          if (!S::whole && piece == nullptr) return;
          const uint4 factor = *(const uint4*)(factors + 256 * S::warps * i);
          *(uint4*)piece = gated_piece<T>(load4(l.own + to.piece_place(i)), up, factor);
        });
      };
      write(du, pre), write(dpre, u);
    } else if (a.du.data != nullptr) {
      du.write(l, 0, row, outputs(row));
    }
  }
  sums.write(l, parts.dk);
  if (parts.dskip != nullptr) *parts.dskip = S::pre ? gated_skip : of_diagonal(skip, l.lane);
}

template <class T, class S>
SEQCONV_DEVICE void backward_any(const Lane<S>& l, const ConvolutionArgs& a, const Unit& unit,
                                 const u32* spectrum, float divisor) {
  const Parts<S> parts(l, a, unit);
  KernelSums<S> sums;
  sums.clear();
  float skip = 0.f;
  for (int row = unit.first + l.slot; row < unit.last; row += S::slots) {
    const auto of_row = [&] { return unit.place_of_row(a, keep_here(row)); };
    const auto dv = [&] { return gradient<T>(a, of_row(), unit.head); };
    const auto x = [&] { return input<T>(a, inside(a, of_row())); };
    u32 top[2] = {__float_as_uint(largest_of(l, dv())), __float_as_uint(largest_of(l, x()))};
    team_max(l, top);
    const int e[2] = {within_range(exponent_above(__uint_as_float(top[0])), divisor),
                      exponent_above(__uint_as_float(top[1]))};
    stage(l, 0, dv(), e[0]), stage(l, 1, x(), e[1]);
    if (parts.dskip != nullptr) skip += skip_sum(dv(), x(), S::points, Team{l.rank, S::threads});
    outer_forward_any<T>(l);
    inner_gradients(l, InnerMatrices<S>(l), spectrum, sums, sums.diagonal(e[0] + e[1], l.lane));
    l.meet();
    if (a.du.data == nullptr && a.dpre_gate.data == nullptr) continue;
    outer_inverse_any<S, 1>(l);
    l.meet();
    drain(l, power_of_two(e[0]) * divisor, head_gradient<T>(a, inside(a, of_row())));
  }
  sums.write(l, parts.dk);
  if (parts.dskip != nullptr) *parts.dskip = skip;
}

// Longer rows go one after the other, since a block's memory and registers do not hold two and dk's
// sums: x's spectrum waits in global memory for dv's, and the sums are there, too.
template <class S>
SEQCONV_DEVICE void put_aside(const Lane<S>& l, const InnerMatrices<S>& m, u32* x_spectrum) {
#pragma unroll(S::inner < 8 ? S::inner : 4)
  for (int tile = 0; tile < S::inner; ++tile) {
    const Pairs x = inner_forward<S>(m, inner_tile(l, tile));
    uint4* to = (uint4*)(x_spectrum + (l.warp + S::warps * tile) * 256) + l.lane;
    to[0] = as_words(x.re), to[32] = as_words(x.im);
  }
}
// *to += 2^e x, or = where this is the first row
SEQCONV_DEVICE void add_to(Four<float>* to, u32 low, u32 high, float scale, bool begins) {
  Four<float> sum{};
  if (!begins) sum = *to;
  typedef Format<fp16> Half;
  *to = {sum.at[0] + Half::low(low) * scale, sum.at[1] + Half::high(low) * scale,
         sum.at[2] + Half::low(high) * scale, sum.at[3] + Half::high(high) * scale};
}
template <class S>
SEQCONV_DEVICE void inner_gradients_aside(const Lane<S>& l, const InnerMatrices<S>& m,
                                          const u32* spectrum, const Parts<S>& parts, float scale,
                                          bool begins) {
#pragma unroll(S::inner < 8 ? S::inner : 4)
  for (int tile = 0; tile < S::inner; ++tile) {
    const u32 at = inner_tile(l, tile);
    TileSpectrum<S> k(spectrum, tile);
    const int all = l.warp + S::warps * tile;
    const uint4* aside = (const uint4*)(parts.x_spectrum + all * 256) + l.lane;
    const uint4 xr = aside[0], xi = aside[32];
    Pairs g = inner_forward<S>(m, at), p = g;
    sync_warp();
    multiply<true>(p, xr, xi);
    Four<float>* dk = (Four<float>*)(parts.dk + all * 512) + l.lane;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      add_to(dk + 32 * j, p.re[2 * j], p.re[2 * j + 1], scale, begins);
      add_to(dk + 64 + 32 * j, p.im[2 * j], p.im[2 * j + 1], scale, begins);
    }
    k.arrive(l, tile);
    multiply<true>(g, k.re, k.im);
    inner_inverse<S>(m, g, at);
  }
}
template <class T, class S>
SEQCONV_DEVICE void backward_aside(const Lane<S>& l, const ConvolutionArgs& a, const Unit& unit,
                                   const u32* spectrum, float divisor) {
  const Parts<S> parts(l, a, unit);
  const bool with_dx = a.du.data != nullptr || a.dpre_gate.data != nullptr;
  const Stream<T, S> u(l, a.u, unit), dy(l, a.dy, unit), du(l, a.du, unit);
  const auto of_row = [&](int row) { return unit.place_of_row(a, keep_here(row)); };
  const auto dv = [&](int row) { return gradient<T>(a, of_row(row), unit.head); };
  const auto x = [&](int row) { return input<T>(a, inside(a, of_row(row))); };
  const auto fetch_x = [&](int row) {
    if constexpr (S::pieces) {
      const Place p = S::whole ? Place{} : inside(a, of_row(row));
      if (row < unit.last) u.fetch(l, S::raw * S::plane, row, p);
      end_of_group();
    }
  };
  // Transforms what came of a row, up to the inner 256 points, and returns its exponent.
  const auto outer = [&](auto source) {
    if constexpr (S::pieces) {
      const Raw<S> raw(l);
      int e[1];
      u32 down[1];
      measure<T, 1>(l, raw, divisor, e, down);
      outer_forward<T>(l, raw, OuterMatrix<S>(l), down);
      l.meet();
      return e[0];
    } else {
      u32 top[1] = {__float_as_uint(largest_of(l, source()))};
      team_max(l, top);
      const int e = within_range(exponent_above(__uint_as_float(top[0])), divisor);
      stage(l, 0, source(), e);
      outer_forward_any<T>(l);
      return e;
    }
  };
  int row = unit.first + l.slot;
  float trace[2][4] = {}, skip = 0.f;
  bool begins = true;
  if (row >= unit.last) {
    for (int i = l.rank; i < 2 * S::points; i += S::threads) parts.dk[i] = 0.f;
  } else {
    fetch_x(row);
  }
  for (; row < unit.last; row += S::slots, begins = false) {
    if constexpr (S::pieces) {
      await<0>();
      l.meet();
    }
    const float up_x = power_of_two(outer([&] { return x(row); }));
    if constexpr (S::pieces) {
      dy.fetch(l, S::raw * S::plane, row, S::whole ? Place{} : of_row(row));
      end_of_group();
    }
    put_aside(l, InnerMatrices<S>(l), parts.x_spectrum);
    if constexpr (S::pieces) {
      await<0>();
      if (parts.dskip != nullptr) {
        u.each(l, row, S::whole ? Place{} : inside(a, of_row(row)), [&](int i, const T* piece) {
          const uint4 g = load4(l.own + S::raw * S::plane + Stream<T, S>::piece_place(i));
          uint4 v{0, 0, 0, 0};
          if (S::whole || piece != nullptr) v = *(const uint4*)piece;  // from the cache
          add_skip<T>(trace, {g.x, g.y, g.z, g.w}, {v.x, v.y, v.z, v.w});
        });
      }
      l.meet();
    } else if (parts.dskip != nullptr) {
      skip += skip_sum(dv(row), x(row), S::points, Team{l.rank, S::threads});
    }
    const float up_g = power_of_two(outer([&] { return dv(row); }));
    fetch_x(row + S::slots);
    inner_gradients_aside(l, InnerMatrices<S>(l), spectrum, parts, up_x * up_g, begins);
    l.meet();
    if constexpr (S::pieces) {
      inverse_pieces<T, S>(l, up_g * divisor);
      l.meet();
      if (with_dx) du.write(l, 0, row, S::whole ? Place{} : inside(a, of_row(row)));
    } else if (with_dx) {
      outer_inverse_any<S, 1>(l);
      l.meet();
      drain(l, up_g * divisor, head_gradient<T>(a, inside(a, of_row(row))));
    }
  }
  if (parts.dskip != nullptr) *parts.dskip = S::pieces ? of_diagonal(trace, l.lane) : skip;
}

template <class T, class S>
SEQCONV_DEVICE void half_backward(const ConvolutionArgs& a, unsigned char* shared) {
  const Lane<S> l(shared);
  load_tables(l, a);
  // A team meets before it reads the tables. Several teams have met for the spectrum as well.
  static_assert(S::keeps || S::slots == 1, "the block has met");
  each_unit(l, a, 1, [&](const Unit& unit, const u32* spectrum, float divisor) {
    if constexpr (S::pair == 1)
      backward_aside<T>(l, a, unit, spectrum, divisor);
    else if constexpr (S::pieces)
      backward_pieces<T>(l, a, unit, spectrum, divisor);
    else
      backward_any<T>(l, a, unit, spectrum, divisor);
  });
}
