// Rows too long for shared memory, n = outer * lower (FlashButterfly's three passes, arXiv
// 2302.06646 section 3.3): the passes over `outer` points at distance `lower` go through global
// memory, `columns` neighbours to a block; between them every one of the `outer` rows of `lower`
// complex points is convolved by the kernels of fftconv.cuh.
#pragma once
#include "fftconv.cuh"

struct LongWork {
  Team team;
  SomeColumns window;
  int b, head, h, row, part;
};
SEQCONV_DEVICE LongWork long_work(const ConvolutionArgs& a, int heads) {
  const int columns = (int)a.columns, lower = (int)a.lower, channels = (int)a.channels;
  const int tiles = lower / columns, tile = blockIdx.x % tiles, row = blockIdx.x / tiles;
  const int b = row / channels / heads;
  return {{(int)threadIdx.x, (int)blockDim.x},
          {log2_of(columns), lower, tile * columns},
          b,
          row / channels % heads,
          row % channels,
          row,
          b * tiles + tile};
}

template <class Source>
SEQCONV_DEVICE void long_forward(const ConvolutionArgs& a, const LongWork& w, unsigned char* shared,
                                 Source source) {
  const int points = (int)(a.outer * a.columns);
  const Plane plane{(c32*)shared};
  const AnyTransform t{a.transform};
  first_pass(t, plane, points, w.window, source, w.team);
  sync_block();
  middle_passes<false>(t, plane, points, (int)t.passes, w.window, w.team);
  c32* out = a.long_rows + w.row * a.transform.n;
  for (int i = w.team.rank; i < points; i += w.team.size)
    out[w.window.global(i)] = load_shared(plane.at(i));
}
template <class Sink>
SEQCONV_DEVICE void long_inverse(const ConvolutionArgs& a, const LongWork& w, unsigned char* shared,
                                 Sink sink) {
  const int points = (int)(a.outer * a.columns);
  const Plane plane{(c32*)shared};
  const c32* in = a.long_rows + w.row * a.transform.n;
  const float scale = 1.f / (float)a.outer;
  const AnyTransform t{a.transform};
  for (int i = w.team.rank; i < points; i += w.team.size)
    store_shared(plane.at(i), in[w.window.global(i)]);
  sync_block();
  middle_passes<true>(t, plane, points, (int)t.passes, w.window, w.team);
  last_pass(t, plane, points, w.window, PlainRow<float>{}, w.team);
  sync_block();
  for (int i = w.team.rank; i < points; i += w.team.size)
    sink(w.window.global(i), load_shared(plane.at(i)) * scale);
}

template <class T, class Args>
SEQCONV_DEVICE void long_input(const Args& a, unsigned char* shared) {
  const LongWork w = long_work(a, 1);
  long_forward(a, w, shared, input<T>(a, place(a, w.b, w.h, 0, true)));
}
template <class T, class Args>
SEQCONV_DEVICE void long_gradient(const Args& a, unsigned char* shared) {
  const LongWork w = long_work(a, (int)a.heads);
  const Place p = place(a, w.b, w.h, 0, true);
  const Gated<T> dv = gradient<T>(a, p, w.head);
  long_forward(a, w, shared, dv);
  if (a.dskip_parts == nullptr) return;
  const Gated<T> x = input<T>(a, p);
  float sum = 0.f;
  const int points = (int)(a.outer * a.columns);
  for (int i = w.team.rank; i < points; i += w.team.size) {
    const int t = w.window.global(i);
    sum += dv(t) * x(t);
  }
  const i64 row = w.head * a.channels + w.h, rows = a.heads * a.channels;
  a.dskip_parts[(w.part * rows + row) * (i64)blockDim.x + threadIdx.x] = sum;
}
template <class Args>
SEQCONV_DEVICE void long_taps(const Args& a, unsigned char* shared) {
  const LongWork w = long_work(a, (int)a.heads);
  long_forward(a, w, shared, taps(a, w.row));
}
template <class T, class Args>
SEQCONV_DEVICE void long_output(const Args& a, unsigned char* shared) {
  const LongWork w = long_work(a, (int)a.heads);
  long_inverse(a, w, shared, Sinks<T>::output(a, place(a, w.b, w.h, 0, true), w.head));
}
template <class T, class Args>
SEQCONV_DEVICE void long_input_gradient(const Args& a, unsigned char* shared) {
  const LongWork w = long_work(a, 1);
  long_inverse(a, w, shared, input_gradient<T>(a, place(a, w.b, w.h, 0, true)));
}
template <class Args>
SEQCONV_DEVICE void long_taps_gradient(const Args& a, unsigned char* shared) {
  const LongWork w = long_work(a, (int)a.heads);
  long_inverse(a, w, shared, taps_gradient(a, w.row));
}
