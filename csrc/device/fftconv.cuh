// The kernels that make the taps' spectra, convolve, compute the gradients, and take the passes of
// rows that are too long for shared memory. The grid has `groups` blocks for every channel, and
// where samples have taps of their own, for every channel of every sample. A block goes through its
// rows, `slots` at a time. Each slot has `row_threads` threads and planes of its own.
#pragma once
#include "skip.cuh"

struct Work {
  Team team;
  int slot;
  int set, channel, group;  // set: the sample whose taps they are, or 0
  int first, last;          // rows of the group
};

template <class Shape = AnyTransform>
SEQCONV_DEVICE Work work(const ConvolutionArgs& a) {
  const int row_threads = Shape::threads(a.row_threads), slot = threadIdx.x / row_threads,
            channels = (int)a.channels, groups = (int)a.groups;
  const int channel = blockIdx.x % channels, group = blockIdx.x / channels % groups,
            set = blockIdx.x / channels / groups;
  const int rows = (int)((a.per_sample ? 1 : a.batch) * a.windows),
            share = (rows + groups - 1) / groups;
  const int end = (group + 1) * share;
  const Team team{(int)threadIdx.x % row_threads, row_threads};
  return {team, slot, set, channel, group, group * share, end < rows ? end : rows};
}
template <class Args>
SEQCONV_DEVICE Place place(const Args& a, const Work& w, int first) {
  const int row = first + w.slot;
  int sample = row, window = 0;
  if (a.windows > 1) {  // division is slow
    sample = row / (int)a.windows;
    window = row - sample * (int)a.windows;
  }
  return place(a, a.per_sample ? w.set : sample, w.channel, window, row < w.last);
}
// Whether no slot has a step of a row in this turn, for the whole block alike. Dense rows have some
// in every turn.
SEQCONV_DEVICE bool is_empty(const ConvolutionArgs&, const Work&, int) { return false; }
SEQCONV_DEVICE bool is_empty(const PackedArgs& a, const Work& w, int first) {
  const int windows = (int)a.windows, next = first + (int)a.slots,
            end = next < w.last ? next : w.last;
  for (int row = first; row < end;) {  // the first window of each sample that is in this turn
    const int sample = windows > 1 ? row / windows : row, window = row - sample * windows;
    if (span(a, a.per_sample ? w.set : sample).steps > window * (int)a.step) return false;
    row += windows - window;
  }
  return true;
}
SEQCONV_DEVICE int taps_row(const ConvolutionArgs& a, const Work& w, int head) {
  return (w.set * (int)a.heads + head) * (int)a.channels + w.channel;
}
// The row of sums over rows that a slot writes; every slot of a group has one.
SEQCONV_DEVICE int sums_row(const ConvolutionArgs& a, const Work& w, int head) {
  const int part = w.group * (int)a.slots + w.slot,
            rows = (int)((a.per_sample ? a.batch : 1) * a.heads * a.channels);
  return part * rows + taps_row(a, w, head);
}
SEQCONV_DEVICE int plane_size(i64 n) { return (int)(n + (n >> 4) + 1); }

// Kernels that know their length read and write rows that are as they must be in pass 0 itself, and
// stage others in the plane (inlined in a pass, gates and activations would be repeated for every
// point). A thread stages those points that are its own in pass 0 too.
template <class Shape, class Source>
SEQCONV_DEVICE void forward_passes(const Shape& t, Plane plane, Source source, Team team) {
  const int n = (int)t.n;
  if constexpr (Shape::known) {
    const auto row = source.plain_row();
    for (int i = team.rank; i < n && !row; i += team.size)
      store_shared(plane.at(i), to_complex(source(i)));
    first_pass(t, plane, n, KnownColumns(), row, team);
  } else {
    first_pass(t, plane, n, AllColumns(), source, team);
  }
  sync_block();
  middle_passes<false>(t, plane, n, (int)t.passes - 1, typename Shape::Columns(), team);
}
// The sink is made at the end, since it would cost the passes registers.
template <class Shape, class MakeSink>
SEQCONV_DEVICE void inverse_passes(const Shape& t, Plane plane, MakeSink make_sink, Team team) {
  const int n = (int)t.n;
  sync_block();
  middle_passes<true>(t, plane, n, (int)t.passes - 1, typename Shape::Columns(), team);
  if constexpr (Shape::known) {
    const auto row = make_sink().plain_row();
    last_pass(t, plane, n, KnownColumns(), row, team);
    if (row) return;
  } else {
    last_pass(t, plane, n, AllColumns(), PlainRow<float>{}, team);
    sync_block();
  }
  const auto sink = make_sink();
  for (int i = team.rank; i < n; i += team.size) sink(i, load_shared(plane.at(i)));
  if (!Shape::known) sync_block();
}

// How spectra are kept. In kColumns neighbouring threads of the float32 kernels have neighbours.
// kTiles is the order of the tensor cores' results: 256 frequencies to a tile, of which each lane
// has 8. The taps' spectrum is divided by a power of two and kept as fp16 numbers there.
enum Order { kColumns = 0, kTiles = 1 };
// Where the element at position `at` of a row of n points lies, in elements of its tiles. A lane's
// elements are `each` neighbours in all, and its imaginary parts lie half a tile behind.
struct TilePlace {
  int tile, lane, pair, odd;

  SEQCONV_DEVICE TilePlace(int at, int n) {
    const int tiles = n >> 8, place = at >> 8, row = at >> 4 & 15, column = at & 15;
    tile = tiles <= 16 ? place : (place & 15) * (tiles >> 4) + (place >> 4);
    lane = (row & 7) * 4 + (column & 7) / 2;
    pair = (column >> 3) * 2 + (row >> 3), odd = column & 1;
  }
  SEQCONV_DEVICE int of_taps() const { return tile * 512 + (lane * 4 + pair) * 2 + odd; }
  SEQCONV_DEVICE int of_sums() const {
    return tile * 512 + (pair >> 1) * 128 + lane * 4 + (pair & 1) * 2 + odd;
  }
};

SEQCONV_DEVICE float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }
// The exponent e of the power of two with size / 2^e in [1/4, 1/2)
SEQCONV_DEVICE int exponent_above(float size) {
  const int e = ((__float_as_int(size) >> 23) & 255) - 127 + 2;
  return e < -124 ? -124 : e > 125 ? 125 : e;
}

// One slot for each row of taps.
struct TapsRow {
  Team team;
  int slot;
  i64 row;
  bool real;  // false: a slot without a row, which repeats the last and writes nothing
};
SEQCONV_DEVICE TapsRow taps_row(const ConvolutionArgs& a) {
  const int slot = threadIdx.x / (int)a.row_threads;
  const i64 rows = (a.per_sample ? a.batch : 1) * a.heads * a.channels,
            row = (i64)blockIdx.x * a.slots + slot;
  const Team team{(int)threadIdx.x % (int)a.row_threads, (int)a.row_threads};
  return {team, slot, row < rows ? row : rows - 1, row < rows};
}

// A row that is one of `outer` pieces of a row of taps.
struct Piece {
  i64 first;  // the first element of the whole row
  int before, n;

  SEQCONV_DEVICE Piece(const ConvolutionArgs& a, i64 row)
      : first(row / a.outer * a.outer * a.transform.n),
        before((int)(row % a.outer * a.transform.n)),
        n((int)(a.outer * a.transform.n)) {}
  SEQCONV_DEVICE TilePlace tile(int at) const { return TilePlace(before + at, n); }
};

// The power of two above the Euclidean norm of the taps, which is the root mean square of their
// spectrum, for tensor cores. The taps are brought near 1 first: their squares may leave float32's
// range.
SEQCONV_DEVICE float taps_divisor(const TapsRow& r, const Taps& source, float* shared) {
  float* mine = shared + r.slot * r.team.size;
  float largest = 0.f;
  for (int t = r.team.rank; t < source.n; t += r.team.size) {
    const c32 z = source(t);
    const float size = fabsf(z.re) > fabsf(z.im) ? fabsf(z.re) : fabsf(z.im);
    largest = size > largest ? size : largest;
  }
  largest = team_reduce(r.team, largest, mine, [](float a, float b) { return a > b ? a : b; });
  const int exponent = exponent_above(largest);
  const float near = power_of_two(-exponent);
  float sum = 0.f;
  for (int t = r.team.rank; t < source.n; t += r.team.size) {
    const c32 z = source(t) * near;
    sum += z.re * z.re + z.im * z.im;
  }
  sum = team_reduce(r.team, sum, mine, [](float a, float b) { return a + b; });
  const int all = exponent + exponent_above(sqrtf(sum));
  return power_of_two(all < -124 ? -124 : all > 125 ? 125 : all);
}
SEQCONV_DEVICE void taps_divisors(const ConvolutionArgs& a, unsigned char* shared) {
  const TapsRow r = taps_row(a);
  const float scale = taps_divisor(r, taps(a, r.row), (float*)shared);
  if (r.real && r.team.rank == 0) a.divisors[r.row] = scale;
}

template <class Args>
SEQCONV_DEVICE void spectrum(const Args& a, unsigned char* shared) {
  const TapsRow r = taps_row(a);
  const AnyTransform t{a.transform};
  const Plane plane{(c32*)shared + r.slot * plane_size(t.n)};
  const Taps source = taps(a, r.row);
  float scale = (float)a.spectrum_scale;
  if (a.order != kColumns && a.k.dtype == kComplex) {
    scale /= a.divisors[r.row / a.outer];  // the row is one of `outer` pieces of a row of taps
  } else if (a.order != kColumns) {
    const float divisor = taps_divisor(r, source, (float*)shared);
    if (r.real && r.team.rank == 0) a.divisors[r.row] = divisor;
    scale /= divisor;
  }
  forward_passes(t, plane, source, r.team);
  const Piece piece(a, r.row);
  middle<kForwardOnly>(
      t, plane,
      [&](i64 f, int at, c32 z) {
        if (!r.real) return z;
        if (a.order == kColumns) {
          a.spectrum[r.row * t.n + f] = z * scale;
        } else {
          fp16* to = (fp16*)a.spectrum + 2 * piece.first + piece.tile(at).of_taps();
          from_float(to[0], z.re * scale);
          from_float(to[256], z.im * scale);
        }
        return z;
      },
      r.team);
}

// Adds up the parts in their order and transforms the sum back to the taps.
template <class Args>
SEQCONV_DEVICE void taps_gradients(const Args& a, unsigned char* shared) {
  const TapsRow r = taps_row(a);
  const AnyTransform t{a.transform};
  const i64 rows = (a.per_sample ? a.batch : 1) * a.heads * a.channels;
  const Plane plane{(c32*)shared + r.slot * plane_size(t.n)};
  const float scale = (float)a.gradient_scale;
  const Piece piece(a, r.row);
  middle<kInverseOnly>(
      t, plane,
      [&](i64 f, int at, c32) {
        // The real part and, `apart` numbers further on, the imaginary one.
        const bool tiles = a.order != kColumns;
        const i64 first =
            tiles ? 2 * piece.first + piece.tile(at).of_sums() : 2 * (r.row * t.n + f);
        const float* from = (const float*)a.dk_parts + first;
        const int apart = tiles ? 256 : 1;
        c32 sum{from[0], from[apart]};
        for (i64 part = 1; part < a.parts; ++part) {
          from += 2 * rows * t.n;
          sum = sum + c32{from[0], from[apart]};
        }
        return sum * scale;
      },
      r.team);
  inverse_passes(
      t, plane,
      [&] {
        return [&, sink = taps_gradient(a, r.row)](int at, c32 z) {
          if (r.real) sink(at, z);
        };
      },
      r.team);
}

// y = post_gate * activation(k * (pre_gate u) + skip pre_gate u + bias)
template <class T, class Shape = AnyTransform, class Args>
SEQCONV_DEVICE void forward(const Args& a, unsigned char* shared) {
  const Work w = work<Shape>(a);
  const Shape t = Shape::of(a.transform);
  const int heads = Shape::known ? 1 : (int)a.heads;
  const int size = plane_size(t.n);
  const Plane x{(c32*)shared + w.slot * size}, v{heads > 1 ? x.data + a.slots * size : x.data};
  for (int first = w.first; first < w.last; first += (int)a.slots) {
    if (is_empty(a, w, first)) continue;
    forward_passes(t, x, input<T>(a, place(a, w, first)), w.team);
    if (heads > 1) {
      middle<kForwardOnly>(
          t, x,
          [&](i64, int at, c32 z) {
            store_shared(x.at(at), z);
            return z;
          },
          w.team);
    }
    for (int head = 0; head < heads; ++head) {
      const c32* k = a.spectrum + taps_row(a, w, head) * t.n;
      if (heads > 1) {
        middle<kInverseOnly>(
            t, v, [&](i64 f, int at, c32) { return load_shared(x.at(at)) * k[f]; }, w.team);
      } else {
        middle<kBoth>(t, v, [&](i64 f, int, c32 z) { return z * k[f]; }, w.team);
      }
      inverse_passes(
          t, v, [&] { return Sinks<T>::output(a, inside(a, place(a, w, first)), head); }, w.team);
    }
  }
}

// Computes from x and dv the gradients of u and pre_gate, and those of the taps as sums of spectra,
// of which every slot of a group has one.
template <class T, class Shape = AnyTransform, class Args>
SEQCONV_DEVICE void backward(const Args& a, unsigned char* shared) {
  const Work w = work<Shape>(a);
  const Shape t = Shape::of(a.transform);
  const int heads = Shape::known ? 1 : (int)a.heads;
  const int size = plane_size(t.n);
  const int stride = (int)a.slots * size;
  const bool with_dk = a.dk_parts != nullptr,
             with_dx = a.du.data != nullptr || a.dpre_gate.data != nullptr;
  // Places are selected, and no pointers, of which the compiler would not know that they are
  // shared.
  const int g_at = w.slot * size, x_at = g_at + (with_dk ? stride : 0),
            sum_at = heads > 1 ? x_at + stride : g_at;
  const Plane g{(c32*)shared + g_at}, x{(c32*)shared + x_at}, sum{(c32*)shared + sum_at};
  for (int first = w.first; first < w.last; first += (int)a.slots) {
    // These are made where they are needed, since they would cost the butterflies registers.
    const auto whole = [&] { return place(a, w, keep_here(first)); };
    const auto outputs = [&] { return inside(a, whole()); };
    const bool begins = first == w.first;
    if (!begins && is_empty(a, w, first)) continue;  // the first turn writes the sums in any case
    for (int signal = with_dk ? -1 : 0; signal < heads; ++signal) {  // x, then dv of every head
      const bool is_x = signal < 0;
      const Plane plane{(c32*)shared + (is_x ? x_at : g_at)};
      forward_passes(t, plane, is_x ? input<T>(a, outputs()) : gradient<T>(a, whole(), signal),
                     w.team);
      if (!is_x && a.dskip_parts != nullptr) {
        float* mine = a.dskip_parts + sums_row(a, w, signal) * a.row_threads + w.team.rank;
        const float dskip =
            skip_sum(gradient<T>(a, whole(), signal), input<T>(a, outputs()), (int)t.n, w.team);
        *mine = begins ? dskip : *mine + dskip;
      }
      const c32* k = a.spectrum + taps_row(a, w, is_x ? 0 : signal) * t.n;
      c32* dk = with_dk && !is_x ? a.dk_parts + sums_row(a, w, signal) * t.n : nullptr;
      const auto product = [&](i64 f, int at, c32 z) {
        if (with_dk) {
          const c32 d = z * conj(load_shared(x.at(at)));
          dk[f] = begins ? d : dk[f] + d;
        }
        return with_dx ? z * conj(k[f]) : z;
      };
      if (!is_x && with_dx && heads == 1) {
        middle<kBoth>(t, g, product, w.team);
        continue;
      }
      const Plane to{(c32*)shared + (is_x ? x_at : sum_at)};
      middle<kForwardOnly>(
          t, plane,
          [&](i64 f, int at, c32 z) {
            c32* kept = to.at(at);
            if (!is_x) z = product(f, at, z);
            if (is_x || with_dx)
              store_shared(kept, is_x || signal == 0 ? z : load_shared(kept) + z);
            return z;
          },
          w.team);
      sync_block();
    }
    if (!with_dx) continue;
    if (heads > 1) {
      middle<kInverseOnly>(
          t, sum, [&](i64, int at, c32) { return load_shared(sum.at(at)); }, w.team);
    }
    inverse_passes(t, sum, [&] { return input_gradient<T>(a, outputs()); }, w.team);
  }
}
