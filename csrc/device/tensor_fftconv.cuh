// The convolution and its gradients on tensor cores, by the passes of tensor.cuh. The grid and the
// work of a block are those of the kernels in fftconv.cuh.
#pragma once
#include "tensor.cuh"

// What a kernel knows of its transform when it is compiled: nothing, or everything but the tables.
struct AnyTransform {
  static SEQCONV_DEVICE Transform of(const Transform& t) { return t; }
};
template <int kPoints, int kCount, int kRadices>
struct FixedTransform {
  static SEQCONV_DEVICE Transform of(const Transform& t) {
    return {kPoints, kCount, kRadices, t.tables};
  }
};

// A slot's planes, and its room for team_max, which lies behind all planes.
struct TensorShared {
  HalfPlane x, g;  // g is x where one is enough
  float* largest;
};
SEQCONV_DEVICE TensorShared tensor_shared(const ConvolutionArgs& a, const Transform& t,
                                          const Work& w, unsigned char* shared, int planes) {
  const int size = half_plane_size((int)t.n);
  unsigned short* first = (unsigned short*)shared + w.slot * planes * size;
  float* largest = (float*)((unsigned short*)shared + (int)a.slots * planes * size);
  return {HalfPlane(first), HalfPlane(planes > 1 ? first + size : first),
          largest + w.slot * (w.team.size / 32)};
}

// A row that results are written to, and the row that they are multiplied by, or null.
template <class T>
struct Product {
  T* to;
  const T* by;

  SEQCONV_DEVICE void four(int t, const float (&v)[4]) const {
    Four<T> out, factor{};
    if (by != nullptr) factor = *(const Four<T>*)(by + t);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      from_float(out.at[i], by == nullptr ? v[i] : v[i] * to_float(factor.at[i]));
    *(Four<T>*)(to + t) = out;
  }
};
template <class T>
SEQCONV_DEVICE Product<T> product_of(const Tensor& to, const Tensor& by, const Place& p, i64 head) {
  return {shifted<T>(to, p, head), to.data == nullptr ? nullptr : shifted<T>(by, p, head)};
}
template <class T>
SEQCONV_DEVICE bool well_placed(const Product<T>& p, const Tensor& to, const Tensor& by) {
  return aligned(p.to, to.time, 8) && aligned(p.by, by.time, 8);
}
SEQCONV_DEVICE bool ends_in_fours(const Place& p) { return p.begin % 4 == 0 && p.end % 4 == 0; }

// Where 4 neighbouring results go at once.
template <class T, int kProducts>
struct Fours {
  bool fit;  // 4 neighbours lie wholly inside or outside of the row, and well in memory
  Product<T> products[kProducts];
  float* dv;      // or null: the gradient of what comes before the activation, of products[0].by
  const T* gate;  // times this, or null
  i64 activation;

  // The row of a call that does nothing but convolve, which takes half the instructions, or null.
  SEQCONV_DEVICE T* plain_row() const {
    const bool alone = kProducts == 1 || products[kProducts - 1].to == nullptr;
    const bool plain = products[0].by == nullptr && dv == nullptr && activation == kNone;
    return fit && alone && plain ? products[0].to : nullptr;
  }
  SEQCONV_DEVICE void operator()(int t, float (&v)[4]) const {
    if (dv != nullptr) {
      const Four<T> g = *(const Four<T>*)(products[0].by + t);
      Four<T> factor{};
      if (gate != nullptr) factor = *(const Four<T>*)(gate + t);
      Four<float> out;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        out.at[i] = to_float(g.at[i]) * slope(v[i], activation);
        if (gate != nullptr) out.at[i] *= to_float(factor.at[i]);
      }
      *(Four<float>*)(dv + t) = out;
    }
    if (activation != kNone && products[0].to != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = activate(v[i], activation);
    }
#pragma unroll
    for (int i = 0; i < kProducts; ++i)
      if (products[i].to != nullptr) products[i].four(t, v);
  }
};

// Takes 4 results. A plain row needs its address alone, which stays in a register. Everything else
// is made anew for each tile.
template <class T, class MakeFours, class MakeSink>
struct Results {
  T* row;  // or null
  bool fit;
  int begin, end;
  float scale;
  MakeFours fours;
  MakeSink sink;

  SEQCONV_DEVICE void plain(int t, Pair low, Pair high) const {
    if (t < begin || t >= end) return;
    Four<T> out;
    from_float(out.at[0], low.x * scale);
    from_float(out.at[1], low.y * scale);
    from_float(out.at[2], high.x * scale);
    from_float(out.at[3], high.y * scale);
    *(Four<T>*)(row + t) = out;
  }
  template <class To>
  SEQCONV_DEVICE void at_once(const To& to, int t, Pair low, Pair high) const {
    if (t < begin || t >= end) return;
    float v[4] = {low.x * scale, low.y * scale, high.x * scale, high.y * scale};
    to(t, v);
  }
  template <class To>
  SEQCONV_DEVICE void one_by_one(const To& to, int t, Pair low, Pair high) const {
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
      const float v = i < 2 ? (i == 0 ? low.x : low.y) : (i == 2 ? high.x : high.y);
      to(t + i, c32{v * scale, 0.f});
    }
  }
};
template <class T, class MakeFours, class MakeSink>
SEQCONV_DEVICE Results<T, MakeFours, MakeSink> results(const Place& p, float scale, MakeFours fours,
                                                       MakeSink sink) {
  const auto made = fours();
  return {made.plain_row(), made.fit, p.begin, p.end, scale, fours, sink};
}

template <class T, class Number, class Known = AnyTransform>
SEQCONV_DEVICE void tensor_forward(const ConvolutionArgs& a, unsigned char* shared) {
  const Work work_ = work(a);
  const Warp w = warp_of(work_.team);
  const Transform t = Known::of(a.transform);
  const TensorShared s = tensor_shared(a, t, work_, shared, a.heads > 1 ? 2 : 1);
  const HalfPlane x = s.x, v = s.g;
  for (int first = work_.first; first < work_.last; first += (int)a.slots) {
    const int exponent =
        stage(x, (int)t.n, input<T>(a, place(a, work_, first)), s.largest, work_.team);
    tensor_forward_passes<Number>(t, x, w);
    for (int head = 0; head < (int)a.heads; ++head) {
      const u32* k = (const u32*)a.spectrum + taps_row(a, work_, head) * t.n * (sizeof(Number) / 4);
      tensor_inverse<Number>(
          t, v, w,
          [&](int tile, const Matrix& f, const auto& twiddles) {
            Result<Number> z = inner_forward<Number>(t, x, tile, f, twiddles, w);
            multiply<false>(z,
                            load_spectrum(k + tile * 256 * (sizeof(Number) / 4), w.lane, Number{}));
            return z;
          },
          [&] {
            const auto fours = [&] {
              const Place p = inside(a, place(a, work_, keep_here(first)));
              const bool is_gradient = a.dy.data != nullptr;  // of post_gate
              const Tensor &to = is_gradient ? a.dpost_gate : a.y,
                           &by = is_gradient ? a.dy : a.post_gate;
              const Product<T> y{shifted<T>(to, p, head), shifted<T>(by, p, head)};
              float* dv = a.dv == nullptr ? nullptr : a.dv + dv_row(a, p, head);
              const T* gate = dv == nullptr ? nullptr : shifted<T>(a.post_gate, p, head);
              const bool fit = ends_in_fours(p) && well_placed(y, to, by) && aligned(dv, 1, 16) &&
                               aligned(gate, a.post_gate.time, 8);
              return Fours<T, 1>{fit, {y}, dv, gate, a.activation};
            };
            return results<T>(inside(a, place(a, work_, first)),
                              power_of_two(exponent) * a.divisors[taps_row(a, work_, head)], fours,
                              [&] {
                                const Place p = inside(a, place(a, work_, keep_here(first)));
                                return Sinks<T>::output(a, p, head);
                              });
          });
    }
  }
}

// There is one head only, since several would need a third plane for the sum of their gradients.
// With `x_spectra` one plane serves x and then dv. x's spectrum waits there, where each slot has
// room for one row.
template <class T, class Number, class Known = AnyTransform>
SEQCONV_DEVICE void tensor_backward(const ConvolutionArgs& a, unsigned char* shared) {
  const Work work_ = work(a);
  const Warp w = warp_of(work_.team);
  const Transform t = Known::of(a.transform);
  const bool with_dk = a.dk_parts != nullptr;
  const TensorShared s =
      tensor_shared(a, t, work_, shared, with_dk && a.x_spectra == nullptr ? 2 : 1);
  const int sums = sums_row(a, work_, 0);
  const auto aside = [&](i64 at) { return a.x_spectra + at * (sizeof(Number) / 4); };
  for (int first = work_.first; first < work_.last; first += (int)a.slots) {
    const bool begins = first == work_.first;
    float up_x = 1.f, up_g = 1.f;  // what undoes the scaling of x and dv
    for (int signal = with_dk ? 0 : 1; signal < 2; ++signal) {
      const Place p = place(a, work_, first);
      const Gated<T> source = signal == 0 ? input<T>(a, inside(a, p)) : gradient<T>(a, p, 0);
      const HalfPlane plane = signal == 0 ? s.x : s.g;
      const float up = power_of_two(stage(plane, (int)t.n, source, s.largest, work_.team));
      signal == 0 ? up_x = up : up_g = up;
      tensor_forward_passes<Number>(t, plane, w);
      if (signal == 0 && a.x_spectra != nullptr) put_aside<Number>(t, plane, aside(sums * t.n), w);
    }
    if (a.dskip_parts != nullptr) {
      const Place p = place(a, work_, first);
      float* mine = a.dskip_parts + sums * a.row_threads + work_.team.rank;
      const float dskip =
          skip_sum(gradient<T>(a, p, 0), input<T>(a, inside(a, p)), (int)t.n, work_.team);
      *mine = begins ? dskip : *mine + dskip;
    }
    tensor_inverse<Number>(
        t, s.g, w,
        [&](int tile, const Matrix& f, const auto& twiddles) {
          Result<Number> z = inner_forward<Number>(t, s.g, tile, f, twiddles, w);
          if (with_dk) {
            const i64 at = sums * t.n + tile * 256;
            const Result<Number> x = a.x_spectra != nullptr
                                         ? load_result<Number>(aside(at), w.lane)
                                         : inner_forward<Number>(t, s.x, tile, f, twiddles, w);
            c32x2* dk = (c32x2*)(a.dk_parts + at) + w.lane * 4;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              Pair re = to_pair(z.re[e >> 1][e & 1]), im = to_pair(z.im[e >> 1][e & 1]);
              multiply<true>(re, im, to_pair(x.re[e >> 1][e & 1]), to_pair(x.im[e >> 1][e & 1]));
              c32x2 d{c32{re.x, im.x} * (up_x * up_g), c32{re.y, im.y} * (up_x * up_g)};
              if (!begins) d = {d.x + dk[e].x, d.y + dk[e].y};
              dk[e] = d;
            }
          }
          const u32* k = (const u32*)a.spectrum +
                         (taps_row(a, work_, 0) * t.n + tile * 256) * (sizeof(Number) / 4);
          multiply<true>(z, load_spectrum(k, w.lane, Number{}));
          return z;
        },
        [&] {
          const auto fours = [&] {
            const Place p = inside(a, place(a, work_, keep_here(first)));
            const Product<T> du = product_of<T>(a.du, a.pre_gate, p, 0),
                             dpre = product_of<T>(a.dpre_gate, a.u, p, 0);
            const bool fit = ends_in_fours(p) && well_placed(du, a.du, a.pre_gate) &&
                             well_placed(dpre, a.dpre_gate, a.u);
            return Fours<T, 2>{fit, {du, dpre}, nullptr, nullptr, kNone};
          };
          return results<T>(
              inside(a, place(a, work_, first)), up_g * a.divisors[taps_row(a, work_, 0)], fours,
              [&] { return input_gradient<T>(a, inside(a, place(a, work_, keep_here(first)))); });
        });
  }
}
