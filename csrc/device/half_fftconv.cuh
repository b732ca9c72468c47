// The convolution of 16-bit rows and its gradients on tensor cores.
//
// The blocks of a launch share the units (half_rows.cuh) evenly, each taking neighbours; a block
// holds tables, and for each unit the taps' spectrum, and its slots take the unit's rows in turn.
// Results do not depend on the number of blocks.
#pragma once
#include "half_rows.cuh"

template <class S>
SEQCONV_DEVICE void load_tables(const Lane<S>& l, const ConvolutionArgs& a) {
  const uint4* from = (const uint4*)a.transform.tables;
  for (int i = threadIdx.x; i < S::tables / 16; i += S::threads * S::slots)
    store4(l.base + 16 * i, from[i]);
  for (int i = threadIdx.x; S::padded && i < 12 * 32; i += S::threads * S::slots)
    store4(l.base + S::tables + S::spectrum + S::pad(i / 32) + S::pitch * (i % 32),
           from[S::padding / 16 + i]);
}
// All of the block's units. run(unit, spectrum, divisor) takes the rows of one.
template <class S, class Run>
SEQCONV_DEVICE void each_unit(const Lane<S>& l, const ConvolutionArgs& a, int heads, Run run) {
  const i64 units = a.channels * a.groups * heads * (a.per_sample ? a.batch : 1);
  const int first = (int)(units * blockIdx.x / gridDim.x);
  const int last = (int)(units * (blockIdx.x + 1) / gridDim.x);
  for (int i = first; i < last; ++i) {
    const Unit unit(a, i, heads);
    const i64 row = unit.taps_row(a);
    const u32* spectrum = (const u32*)a.spectrum + row * S::points;
    if (S::keeps) {
      sync_block();
      for (int at = threadIdx.x; at < S::spectrum / 16; at += S::threads * S::slots)
        store4(l.base + S::tables + 16 * at, ((const uint4*)spectrum)[at]);
      sync_block();
    }
    run(unit, spectrum + l.warp * 256 + 4 * l.lane, a.divisors[row]);
  }
}

// Two words of v times a power of two. bf16 has the range to be multiplied after rounding, which
// takes half the instructions.
template <class T>
SEQCONV_DEVICE void store_scaled(const float (&v)[4], float up, u32& low, u32& high) {
  if (Format<T>::kMantissa == 7) {
    const u32 up2 = Format<T>::pack(up, up);
    low = Format<T>::mul(Format<T>::pack(v[0], v[1]), up2);
    high = Format<T>::mul(Format<T>::pack(v[2], v[3]), up2);
  } else {
    low = Format<T>::pack(v[0] * up, v[1] * up), high = Format<T>::pack(v[2] * up, v[3] * up);
  }
}

// y = post_gate * activation(k * (pre_gate u) + skip pre_gate u + bias), of rows in pieces. Kernels
// that do nothing beside the convolution round before they scale, and add no bias.
template <class T, class S>
SEQCONV_DEVICE void forward_pieces(const Lane<S>& l, const ConvolutionArgs& a,
                                   const OuterMatrix<S>& f, const InnerMatrices<S>& m,
                                   const BackMatrix<S>& g, const Unit& unit, const u32* spectrum,
                                   float divisor) {
  constexpr int kStep = S::slots * S::pair;
  const Stream<T, S> u(l, a.u, unit), pre(l, a.pre_gate, unit), post(l, a.post_gate, unit),
      y(l, a.y, unit);
  const auto of_row = [&](int row) { return S::whole ? Place{} : unit.place_of_row(a, row); };
  // Of those that are worked on together. Where the last one has no partner it is its own.
  const auto each_row = [&](int row, auto op) {
#pragma unroll
    for (int r = 0; r < S::pair; ++r)
      if (row < unit.last) op(r * S::row, row + r < unit.last ? row + r : row);
  };
  const auto fetch = [&](int first) {
    each_row(first, [&](u32 to, int row) {
      u.fetch(l, to + S::raw * S::plane, row, of_row(row));
      if (S::pre) pre.fetch(l, to + (S::raw + 1) * S::plane, row, of_row(row));
    });
    end_of_group();
  };
  int row = unit.first + l.slot * S::pair;
  fetch(row);
  const float bias = S::gelu || S::post ? bias_of(a, unit.head, unit.channel) : 0.f;
  await<0>();
  l.meet();
  for (; row < unit.last; row += kStep) {  // its input has come
    if (S::post) {
      each_row(row, [&](u32 to, int row) {
        post.fetch(l, to + (S::raw + 1 + S::pre) * S::plane, row, of_row(row));
      });
      end_of_group();
    }
    const Raw<S> raw(l);
    int e[S::pair];
    u32 down[S::pair];
    float up[S::pair];
    measure<T, S::pair>(l, raw, divisor, e, down);
#pragma unroll
    for (int r = 0; r < S::pair; ++r) up[r] = power_of_two(e[r]) * divisor;
    outer_forward<T>(l, raw, S::holds ? f : OuterMatrix<S>(l), down);
    l.meet();
    fetch(row + kStep);
    inner(l, S::holds ? m : InnerMatrices<S>(l), spectrum);
    if (S::post) await<1>();
    l.meet();
    const auto finish = [&](int r, float (&v)[4], u32 gate0, u32 gate1, u32& y0, u32& y1) {
      if (!S::gelu && !S::post) return store_scaled<T>(v, up[r], y0, y1);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v[i] = fused(v[i], up[r], bias);
        if (S::gelu) v[i] = S::slope ? slope(v[i], kGelu) : activate(v[i], kGelu);
      }
      if (S::post) {
        v[0] *= Format<T>::low(gate0), v[1] *= Format<T>::high(gate0);
        v[2] *= Format<T>::low(gate1), v[3] *= Format<T>::high(gate1);
      }
      y0 = Format<T>::pack(v[0], v[1]), y1 = Format<T>::pack(v[2], v[3]);
    };
    outer_inverse<S, S::pair>(l, S::holds ? g : BackMatrix<S>(l), finish);
    await<0>();
    l.meet();
    each_row(row, [&](u32 from, int row) {
      y.write(l, from, row, S::whole ? Place{} : inside(a, of_row(row)));
    });
  }
}

// The same, of any rows, and with every option that the sinks of rows.cuh have.
template <class T, class S>
SEQCONV_DEVICE void forward_any(const Lane<S>& l, const ConvolutionArgs& a, const Unit& unit,
                                const u32* spectrum, float divisor) {
  static_assert(S::pair == 1, "a row at a time");
  for (int row = unit.first + l.slot; row < unit.last; row += S::slots) {
    u32 top[1] = {
        __float_as_uint(largest_of(l, input<T>(a, unit.place_of_row(a, keep_here(row)))))};
    team_max(l, top);
    const int e = within_range(exponent_above(__uint_as_float(top[0])), divisor);
    stage(l, 0, input<T>(a, unit.place_of_row(a, keep_here(row))), e);
    outer_forward_any<T>(l);
    inner(l, InnerMatrices<S>(l), spectrum);
    l.meet();
    outer_inverse_any<S, 1>(l);
    l.meet();
    drain(l, power_of_two(e) * divisor,
          Sinks<T>::output(a, inside(a, unit.place_of_row(a, keep_here(row))), unit.head));
  }
}

template <class T, class S>
SEQCONV_DEVICE void half_forward(const ConvolutionArgs& a, unsigned char* shared) {
  const Lane<S> l(shared);
  load_tables(l, a);
  sync_block();
  if constexpr (S::pieces) {
    const OuterMatrix<S> f(l);
    const InnerMatrices<S> m(l);
    const BackMatrix<S> g(l);
    each_unit(l, a, (int)a.heads, [&](const Unit& unit, const u32* spectrum, float divisor) {
      forward_pieces<T>(l, a, f, m, g, unit, spectrum, divisor);
    });
  } else {
    each_unit(l, a, (int)a.heads, [&](const Unit& unit, const u32* spectrum, float divisor) {
      forward_any<T>(l, a, unit, spectrum, divisor);
    });
  }
}
