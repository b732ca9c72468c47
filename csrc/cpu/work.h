// A unit's memory: scratch, panels of channels-last tensors, spectra of the kernels, sums; and its
// rows' way into a transform.
#pragma once
#include "ends.h"
#include "isa.h"
#include "prefetch.h"
#include "scratch.h"
#include "transform.h"

namespace seqconv::SEQCONV_ISA {

// What a sum over the batch keeps: spectra of the kernels' gradients and, in double, dot products.
constexpr int64_t kSkip = 0, kBias = 1, kScalars = 2;
template <class T>
struct Sums {
  T* dk = nullptr;         // a spectrum per head
  double* dots = nullptr;  // per head: d skip, d bias and, of a direct sum, every tap's gradient

  Sums() = default;
  Sums(const Problem& p, const Plan<T>& plan, int64_t dot_count, int64_t channels, Scratch& scratch)
      : dk(scratch.take<T>(channels * p.heads * plan.spectrum)),
        dots(scratch.take<double>(channels * p.heads * dot_count)) {}
};

// A tensor as the rows of a unit see it.
template <class T>
struct View {
  const Tensor* tensor = nullptr;
  int64_t heads = 1;
  T* panel = nullptr;     // transposed copy, (heads, channels, length), of one sample of the unit
  bool streamed = false;  // a result too large to be found in cache by whoever reads it
};

constexpr int64_t kDotPieces = 32;
// Results from so many bytes on are streamed, where rows are not short and there is more to write
// than what the last pass leaves in passing; with gates, for which lines wait, shorter rows, too.
constexpr int64_t kStreamBytes = 1 << 23;
constexpr int64_t kStreamLength = 1024, kStreamGated = 256;
// Rows up to here are fetched while the last is in work; with gates there is more to wait for.
constexpr int64_t kFetchAhead = 1 << 15, kFetchGated = 1 << 18;
constexpr int64_t kFetchPanel = 3 << 17;  // bytes of a panel: with the next, beside spectra, in L2

template <class T>
struct Work {
  const Problem& p;
  const Method& method;
  const Plan<T>& plan;
  const Unit& unit;
  Team& team;
  int64_t group;         // channels that the memory is for
  int64_t pitch;         // of a panel's rows: not a power of two, or they would share cache sets
  int64_t width, reach;  // of the combined kernel kk
  int64_t dot_count;
  bool gated, blocked;
  bool by_lines;  // as direct_lines.h has it
  bool wants_dx, wants_dk, wants_dskip, wants_dbias;
  T *a, *x, *sum;  // spectra
  T* kernels;      // spectra per channel and head, or, of a direct sum, kk
  T* kk;           // a combined kernel's taps, where it is transformed
  T* dv;           // rows of the gradient of v, per head
  double* pieces;  // of one long dot product
  Sums<T> sums;
  View<T> u, pre, post, y, dy, du, dpre, dpost;

  Work(const Problem& problem, const Method& m, const Plan<T>& of_method, const Unit& of,
       bool backward, Scratch& scratch)
      : p(problem), method(m), plan(of_method), unit(of), team(*of.team), group(of.channels) {
    pitch = (p.length + 31) / 16 * 16;
    reach = p.taps_rev;
    width = reach + (p.taps ? p.taps : p.skip ? 1 : 0);
    dot_count = kScalars + (method.direct ? width : 0);
    // A bias alone changes an output, but no gradient.
    gated = p.post_gate || p.activation != Activation::kNone || (p.bias && !backward);
    blocked = method.blocks > 1;
    by_lines = method.direct && takes_lines(p, backward);
    wants_dx = p.du || p.dpre_gate;
    wants_dk = p.dk || p.dk_rev;
    wants_dskip = static_cast<bool>(p.dskip);
    wants_dbias = static_cast<bool>(p.dbias);
    const int64_t spectrum = plan.spectrum;
    a = scratch.take<T>(spectrum);
    x = scratch.take<T>(backward || p.heads > 1 ? spectrum : 0);
    sum = scratch.take<T>(backward && p.heads > 1 ? spectrum : 0);
    kernels = scratch.take<T>(group * p.heads * (method.direct ? width + 1 : spectrum));
    kk = scratch.take<T>(method.direct || blocked ? width + 1 : 0);
    dv = scratch.take<T>(backward && gated ? p.heads * p.length : 0);
    pieces = scratch.take<double>(backward ? kDotPieces : 0);
    if (backward) {
      Scratch elsewhere(of.partial);
      sums = Sums<T>(p, plan, dot_count, group, of.partial ? elsewhere : scratch);
    }
    const auto view = [&](const Tensor& t, int64_t heads) {
      const bool copied = is_transposed(t) && !by_lines;
      return View<T>{&t, heads, copied ? scratch.take<T>(heads * group * pitch) : nullptr};
    };
    const auto result = [&](const Tensor& t, int64_t heads, const View<T>* lender = nullptr) {
      const bool borrows = lender && is_transposed(*lender->tensor) && is_transposed(t);
      View<T> v = borrows ? View<T>{&t, heads, lender->panel} : view(t, heads);
      v.streamed = is_streamed(t, heads);
      return v;
    };
    // A row that is consumed before the result appears lends it its place.
    const bool lends = !method.direct && !blocked && p.heads == 1;
    u = view(p.u, 1);
    pre = view(p.pre_gate, 1);
    post = view(p.post_gate, p.heads);
    if (!backward) {
      y = result(p.y, p.heads, lends ? &u : nullptr);
    } else {
      dy = view(p.dy, p.heads);
      du = result(p.du, 1, lends ? &dy : nullptr);
      dpre = result(p.dpre_gate, 1, lends ? &pre : nullptr);
      dpost = result(p.dpost_gate, p.heads, lends ? &post : nullptr);
    }
  }

  // Rows whose neighbours in memory are other channels are transposed a few at a time.
  bool is_transposed(const Tensor& t) const { return t && group > 1 && t.stride[3] != 1; }
  // Whether the unit's rows are two channels that are all there are.
  bool is_pair(const Tensor& t) const {
    return unit.channels == 2 && t.stride[2] == 1 && t.stride[3] == 2;
  }
  bool is_streamed(const Tensor& t, int64_t heads) const {
    const int64_t shortest = p.pre_gate || p.post_gate ? kStreamGated : kStreamLength;
    const bool more = gated || p.pre_gate || p.heads > 1;
    return kStreams && p.length >= shortest && t.dtype == kDtype<T> &&
           p.batch * heads * p.channels * p.length * size_of(t.dtype) >= kStreamBytes &&
           (is_transposed(t) ? is_pair(t) || fills_lines(t) : more && t.stride[3] == 1);
  }
  // Whether the unit's channels are whole lines at every time.
  bool fills_lines(const Tensor& t) const {
    constexpr int64_t kLine = 64, kStrides = 4;
    if (sizeof(Vec<T>) != kLine || unit.channels % kLanes<T> || t.stride[2] != 1) return false;
    const uintptr_t start = reinterpret_cast<uintptr_t>(t.data + unit.channel * size_of(t.dtype));
    int64_t apart = 0;
    for (int axis = 0; axis < kStrides; ++axis)
      if (axis != 2) apart |= t.stride[axis] * size_of(t.dtype);
    return start % kLine == 0 && apart % kLine == 0;
  }

  T* kernel(int64_t g, int64_t c) {
    return kernels + (g * p.heads + c) * (method.direct ? width + 1 : plan.spectrum);
  }
  T* dk(int64_t g, int64_t c) { return sums.dk + (g * p.heads + c) * plan.spectrum; }
  double* dots(int64_t g, int64_t c) { return sums.dots + (g * p.heads + c) * dot_count; }

  Series series(const Tensor& t, int64_t at, int64_t c, int64_t g, bool streamed = false) const {
    at += c * t.stride[1] + (unit.channel + g) * t.stride[2];
    return t ? Series{t.data + at * size_of(t.dtype), t.dtype, t.stride[3], streamed} : Series{};
  }
  // Made where they are wanted: a row copied soon after it was written would wait for the writes.
  Series row(const Tensor& t, int64_t b, int64_t c, int64_t g, bool streamed = false) const {
    return series(t, p.offset_of(t, b), c, g, streamed);
  }
  // Of a kernel, a skip, a bias or their gradients.
  Series kernel_row(const Tensor& t, int64_t b, int64_t c, int64_t g) const {
    return series(t, p.number_of(b) * t.stride[0], c, g);
  }
  Series row(const View<T>& v, int64_t b, int64_t c, int64_t g) const {
    return v.panel ? own_row(v.panel + (c * group + g) * pitch)
                   : row(*v.tensor, b, c, g, v.streamed);
  }
  static Series own_row(T* at) { return {reinterpret_cast<char*>(at), kDtype<T>, 1}; }

  bool fetches() const {
    return !blocked && p.length <= (p.pre_gate || p.post_gate ? kFetchGated : kFetchAhead);
  }
  bool fetches_blocks() const { return blocked && plan.n <= kFetchAhead; }
  // What to fetch while channel g of sample b is in work. Of a view that is read as it lies: the
  // row itself, or the one after it, in the next channel or sample. Of a panel: its part of the
  // lines that the panel is copied to, or that the next is copied from.
  Ahead::Lines lines(const View<T>& v, int64_t b, int64_t g, bool after, int64_t c = 0) const {
    const Tensor& t = *v.tensor;
    if (!t || v.streamed) return {};
    if (v.panel) {
      const int64_t bytes = group * pitch * static_cast<int64_t>(sizeof(T));
      if (t.stride[2] != 1 || p.heads > 1 || bytes > kFetchPanel) return {};
      Series s = row(t, after && b + 1 < unit.batch_end ? b + 1 : b, c, 0);
      const int64_t step = s.stride * size_of(s.dtype);
      return {s.base + g * (p.length / group) * step, step};
    }
    if (after && ++g == unit.channels) {
      g = 0;
      ++b;
    }
    if (b >= unit.batch_end) return {};
    const Series s = row(t, b, c, g);
    return {s.stride == 1 ? s.base : nullptr, 64 * size_of(s.dtype) / static_cast<int>(sizeof(T))};
  }

  // A row as it lies, from time t on.
  static Ahead::Lines lines(const Series& s, int64_t t = 0) {
    if (!s || s.stride != 1 || s.streamed) return {};
    const int64_t size = size_of(s.dtype);
    return {s.base + t * size, 64 * size / static_cast<int>(sizeof(T))};
  }

  // What follows the last row of a unit.
  Ahead::Lines next_kernel(int64_t b, int64_t g) const {
    if (unit.next < 0 || b + 1 < unit.batch_end || g + 1 < unit.channels) return {};
    return lines(
        kernel_row(p.k, p.kernel_per_sample ? unit.batch : 0, 0, unit.next - unit.channel));
  }

  Source<T> input(int64_t b, int64_t g) const {
    return {row(u, b, 0, g), row(pre, b, 0, g), p.length_of(b)};
  }
  bool adds_kernels() const { return p.adds && !p.kernel_per_sample; }
  int64_t blocks(int64_t b) const {
    return blocked ? (p.length_of(b) + plan.n - 1) / plan.n : method.blocks;
  }

  // Spectra are started by the first row.
  void clear_dots(bool scalars_too) {
    once(team, [&] {
      for (int64_t i = 0; i < group * p.heads; ++i)
        for (int64_t j = scalars_too ? 0 : kScalars; j < dot_count; ++j)
          sums.dots[i * dot_count + j] = 0;
    });
  }

  // d skip is also the gradient of tap 0, which a direct sum has at hand.
  void move_skip_sums() {
    for (int64_t i = 0; method.direct && p.skip && i < group * p.heads; ++i)
      sums.dots[i * dot_count + kSkip] += sums.dots[i * dot_count + kScalars + reach];
  }

  // data <- the spectrum of what the first pass left there.
  void finish_spectrum(T* data, const Ahead& ahead) {
    Task<T> task(data);
    task.join = false;
    task.ahead = &ahead;
    run_task(plan, task, team);
  }

  // The first pass of block j of a row.
  void enter_block(T* to, const Source<T>& in, int64_t j) {
    enter(plan, team, to, plan.plain, in.at(j * plan.n));
  }
  // The same of the input of v, for v.
  void enter_input(T* to, const Source<T>& in, int64_t j) {
    if (!blocked) return enter(plan, team, to, plan.plain, in);
    const Source<T> now = in.at(j * plan.n + reach), before = now.at(-plan.n);
    enter(plan, team, to, plan.plain, now, &before, T(-1));
  }
  // The same of the gradient of v, for the gradient of its input.
  void enter_gradient(T* to, const Source<T>& in, int64_t j) {
    if (!blocked) return enter(plan, team, to, plan.plain, in);
    const Source<T> now = in.at(j * plan.n - reach), after = now.at(plan.n);
    enter(plan, team, to, plan.plain, now, &after);
  }
};

}  // namespace seqconv::SEQCONV_ISA
