// The right-angle transform (see plan.h) of one row: passes of butterflies. A spectrum is left in
// the order in which the nodes split, and the inverse takes it in that order: nothing is ever
// reordered.
#pragma once
#include "plan.h"
#include "prefetch.h"
#include "radix.h"
#include "spread.h"

namespace seqconv::SEQCONV_ISA {

// One stage of `nodes` nodes of m vectors each; positions [begin, end) of their segments.
template <int R, bool kCompact, bool kForward, class T>
void run_stage(T* data, int64_t nodes, int64_t m, const T* twiddles, int64_t begin, int64_t end) {
  const int64_t apart = m / R * kStep<T>;
  for (int64_t node = 0; node < nodes; ++node) {
    Complex<T> w[R];
    load_twiddles<R, kCompact, T>(twiddles, w);
    for (int64_t i = begin; i < end; ++i) {
      T* x = data + i * kStep<T>;
      Complex<T> a[R];
      SEQCONV_UNROLL
      for (int r = 0; r < R; ++r) a[r] = load<T>(x + r * apart);
      if constexpr (kForward)
        split_node<R, T>(a, w);
      else
        join_node<R, T>(a, w);
      SEQCONV_UNROLL
      for (int r = 0; r < R; ++r) store<T>(x + r * apart, a[r]);
    }
    data += m * kStep<T>;
    twiddles += (kCompact ? 1 : R - 1) * kStep<T>;
  }
}

// Stage `stage` of `nodes` nodes from node `first` on, the first of which starts at data.
template <bool kForward, class T>
void pass(const Plan<T>& plan, int stage, int64_t first, int64_t nodes, T* data, int64_t m,
          int64_t begin, int64_t end) {
  const int radix = plan.stage[stage].radix;
  const bool compact = plan.compact && radix == 4;
  const T* w =
      plan.twiddles + plan.stage[stage].twiddle + first * (compact ? 1 : radix - 1) * kStep<T>;
  with_radix<2, 3, 4, 5, 7, 8>(radix, [&](auto number) {
    constexpr int R = decltype(number)::value;
    if constexpr (R == 4) {
      if (compact) return run_stage<4, true, kForward, T>(data, nodes, m, w, begin, end);
    }
    run_stage<R, false, kForward, T>(data, nodes, m, w, begin, end);
  });
}

// The middle of a transform: the last split, of nodes of four positions, and its inverse. The
// positions of four nodes in a row are transposed, so that the lanes of a quad are the nodes. With
// kDeep the last stage, which makes those four nodes from one, is part of it.
template <class T>
struct Middle {
  const T* stage;  // twiddles of the last stage
  const T* last;   // and of the last split
};
template <class T>
SEQCONV_INLINE void transpose(Complex<T>* a) {
  transpose<T>(a[0].re, a[1].re, a[2].re, a[3].re);
  transpose<T>(a[0].im, a[1].im, a[2].im, a[3].im);
}

// Calls put(at, value) with the complex vector at scalar `at`.
template <bool kDeep, bool kCompact, class T, class Put>
SEQCONV_INLINE void middle_forward(const T* data, int64_t groups, Middle<T> twiddles,
                                   const Ahead& ahead, int64_t line, const Put& put) {
  constexpr int64_t kLines = 4 * kLanes<T> * sizeof(T) / 64;  // of a row that a group stands for
  constexpr int64_t kTwiddles = (kCompact ? 1 : 3) * kStep<T>;
  for (int64_t g = 0; g < groups; ++g) {
    fetch<kLines>(ahead, line + g * kLines);
    Complex<T> w[4], a[4];
    SEQCONV_UNROLL
    for (int r = 0; r < 4; ++r) a[r] = load<T>(data + (4 * g + r) * kStep<T>);
    if constexpr (kDeep) {
      load_twiddles<4, kCompact, T>(twiddles.stage + g * kTwiddles, w);
      split_node<4, T>(a, w);
    }
    transpose(a);
    load_twiddles<4, kCompact, T>(twiddles.last + g * kTwiddles, w);
    split_node<4, T>(a, w);
    SEQCONV_UNROLL
    for (int r = 0; r < 4; ++r) put((4 * g + r) * kStep<T>, a[r]);
  }
}

enum class Factor { kOne, kPlain, kConjugate };

// data <- inverse of source * factor.
template <Factor kFactor, bool kDeep, bool kCompact, class T>
void middle_inverse(const T* source, const T* factor, T* data, int64_t groups, Middle<T> twiddles) {
  constexpr int64_t kTwiddles = (kCompact ? 1 : 3) * kStep<T>;
  for (int64_t g = 0; g < groups; ++g) {
    Complex<T> w[4], a[4];
    SEQCONV_UNROLL
    for (int r = 0; r < 4; ++r) {
      a[r] = load<T>(source + r * kStep<T>);
      if constexpr (kFactor == Factor::kPlain) a[r] = a[r] * load<T>(factor + r * kStep<T>);
      if constexpr (kFactor == Factor::kConjugate)
        a[r] = times_conj(a[r], load<T>(factor + r * kStep<T>));
    }
    load_twiddles<4, kCompact, T>(twiddles.last + g * kTwiddles, w);
    join_node<4, T>(a, w);
    transpose(a);
    if constexpr (kDeep) {
      load_twiddles<4, kCompact, T>(twiddles.stage + g * kTwiddles, w);
      join_node<4, T>(a, w);
    }
    SEQCONV_UNROLL
    for (int r = 0; r < 4; ++r) store(data + r * kStep<T>, a[r]);
    source += 4 * kStep<T>;
    factor += 4 * kStep<T>;
    data += 4 * kStep<T>;
  }
}

// to (+)= a conj(b)
template <class T>
SEQCONV_INLINE void accumulate(T* to, Complex<T> a, Complex<T> b, bool add) {
  const Complex<T> product = times_conj(a, b);
  store(to, add ? load<T>(to) + product : product);
}

// What becomes of the children that the first pass left in data. All pointers are to spectra.
template <class T>
struct Task {
  explicit Task(T* spectrum) : data(spectrum) {}
  T* data;
  bool split = true, join = true;  // forward and inverse
  // Between the two, where not null:
  T* x = nullptr;             // dk (+)= data conj(x)
  bool split_x = false;       // x is still to be split, like data
  bool keep_x = true;         // and wanted afterwards
  T* dk = nullptr;            //
  bool add_dk = true;         //
  const T* other = nullptr;   // sum (+)= data conj(other)
  T* sum = nullptr;           //
  bool add_sum = true;        //
  const T* source = nullptr;  // the inverse's input in place of data
  const T* factor = nullptr;  // multiplies it, conjugated on demand
  bool conjugate = false;
  const Ahead* ahead = nullptr;  // fetched by the middle of the split

  // What the middle takes from other spectra after the split, in the same order.
  void fetch_spectra(Ahead& to) const {
    to.will_read_spectrum(factor);
    to.will_read_spectrum(dk);
    to.will_read_spectrum(sum);
    to.will_read_spectrum(sum ? other : split_x ? nullptr : x);
  }
};

// From here on spectra lie far beyond the second-level cache.
constexpr int64_t kFarPoints = 1 << 18;

template <bool kDeep, bool kCompact, class T>
void middle(const Plan<T>& plan, const Task<T>& task, int64_t at, int64_t groups) {
  const int64_t from = at * kStep<T>;
  T* data = task.data + from;
  const int64_t skipped = at / 4 * (kCompact ? 1 : 3) * kStep<T>;
  const T* stage = kDeep ? plan.twiddles + plan.stage[plan.stages - 1].twiddle + skipped : nullptr;
  const Middle<T> w{stage, plan.twiddles + plan.middle + skipped};
  if (task.split) {
    const int64_t row = at * kLanes<T> * static_cast<int64_t>(sizeof(T)) / 64;
    Ahead far;
    const bool is_far = plan.n >= kFarPoints;
    if (is_far) {
      if (task.ahead) far = *task.ahead;
      task.fetch_spectra(far);
    }
    const Ahead& ahead = task.ahead && !is_far ? *task.ahead : far;
    const auto keep = [](T* spectrum) {
      return [=](int64_t i, Complex<T> a) { store(spectrum + i, a); };
    };
    const auto here = [from](auto* spectrum) { return spectrum ? spectrum + from : spectrum; };
    T *x = here(task.x), *dk = here(task.dk), *sum = here(task.sum);
    const T* other = here(task.other);
    const bool early = task.split_x && task.keep_x, late = task.split_x && !task.keep_x;
    if (early) middle_forward<kDeep, kCompact, T>(x, groups, w, Ahead{}, 0, keep(x));
    if (late || !(task.dk || task.sum)) {
      middle_forward<kDeep, kCompact, T>(data, groups, w, ahead, row, keep(data));
    } else {
      // While it is in registers.
      middle_forward<kDeep, kCompact, T>(data, groups, w, ahead, row, [&](int64_t i, Complex<T> a) {
        if (task.join) store(data + i, a);
        if (task.dk) accumulate<T>(dk + i, a, load<T>(x + i), task.add_dk);
        if (task.sum) accumulate<T>(sum + i, a, load<T>(other + i), task.add_sum);
      });
    }
    if (late)
      middle_forward<kDeep, kCompact, T>(x, groups, w, Ahead{}, 0, [&](int64_t i, Complex<T> b) {
        accumulate<T>(dk + i, load<T>(data + i), b, task.add_dk);
      });
  }
  if (!task.join) return;
  const T* source = task.source ? task.source + from : data;
  const T* factor = task.factor ? task.factor + from : source;
  if (!task.factor)
    middle_inverse<Factor::kOne, kDeep, kCompact, T>(source, factor, data, groups, w);
  else if (task.conjugate)
    middle_inverse<Factor::kConjugate, kDeep, kCompact, T>(source, factor, data, groups, w);
  else
    middle_inverse<Factor::kPlain, kDeep, kCompact, T>(source, factor, data, groups, w);
}

constexpr int64_t kCacheBytes = 16 << 10;  // of data that stay in the first-level cache

// Everything between the first and the last pass, of `nodes` nodes of m vectors at stage `stage`,
// from node `first` on, at vector `at`. Depth first: nodes that fit in cache are finished before
// their neighbours start.
template <class T>
void run_nodes(const Plan<T>& plan, const Task<T>& task, int stage, int64_t first, int64_t nodes,
               int64_t at, int64_t m) {
  T* data = task.data + at * kStep<T>;
  if (nodes * m * kStep<T> * static_cast<int64_t>(sizeof(T)) <= kCacheBytes || m % 4) {
    int64_t count = nodes, index = first, size = m;
    int s = stage;
    // A last stage of radix 4 is left to the middle.
    const bool deep = stage < plan.stages && plan.stage[plan.stages - 1].radix == 4;
    for (; s < plan.stages - deep; ++s) {
      const int radix = plan.stage[s].radix;
      if (task.split) pass<true>(plan, s, index, count, data, size, 0, size / radix);
      if (task.split_x)
        pass<true>(plan, s, index, count, task.x + at * kStep<T>, size, 0, size / radix);
      count *= radix;
      index *= radix;
      size /= radix;
    }
    const int64_t groups = deep ? count : (count + 3) / 4;
    if (plan.compact)
      deep ? middle<true, true, T>(plan, task, at, groups)
           : middle<false, true, T>(plan, task, at, groups);
    else
      deep ? middle<true, false, T>(plan, task, at, groups)
           : middle<false, false, T>(plan, task, at, groups);
    while (task.join && s-- > stage) {
      const int radix = plan.stage[s].radix;
      count /= radix;
      index /= radix;
      size *= radix;
      pass<false>(plan, s, index, count, data, size, 0, size / radix);
    }
    return;
  }
  if (nodes > 1) {
    for (int64_t j = 0; j < nodes; ++j) run_nodes(plan, task, stage, first + j, 1, at + j * m, m);
    return;
  }
  const int radix = plan.stage[stage].radix;
  if (task.split) pass<true>(plan, stage, first, 1, data, m, 0, m / radix);
  if (task.split_x) pass<true>(plan, stage, first, 1, task.x + at * kStep<T>, m, 0, m / radix);
  run_nodes(plan, task, stage + 1, first * radix, radix, at, m / radix);
  if (task.join) pass<false>(plan, stage, first, 1, data, m, 0, m / radix);
}

template <class T>
void run_task(const Plan<T>& plan, const Task<T>& task, Team& team) {
  if (!team.board) return run_nodes<T>(plan, task, 0, 0, plan.radix, 0, plan.vectors);
  // Stage by stage, each cut across its positions, until there are nodes enough to share out
  // evenly.
  int64_t nodes = plan.radix, m = plan.vectors;
  int top = 0;
  const auto wide = [&](bool forward, T* spectrum) {
    const int radix = plan.stage[top].radix;
    const int64_t pieces = (8 * team.threads + nodes - 1) / nodes, length = m / radix;
    spread(team, nodes * pieces, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t node = i / pieces, piece = i % pieces;
        const int64_t from = piece * length / pieces, to = (piece + 1) * length / pieces;
        T* data = spectrum + node * m * kStep<T>;
        if (forward)
          pass<true>(plan, top, node, 1, data, m, from, to);
        else
          pass<false>(plan, top, node, 1, data, m, from, to);
      }
    });
  };
  const auto few = [&] { return nodes < 8 * team.threads && nodes % team.threads != 0; };
  while (few() && top < plan.stages && m / plan.stage[top].radix % 4 == 0) {
    if (task.split) wide(true, task.data);
    if (task.split_x) wide(true, task.x);
    const int radix = plan.stage[top++].radix;
    nodes *= radix;
    m /= radix;
  }
  spread(team, nodes, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) run_nodes<T>(plan, task, top, j, 1, j * m, m);
  });
  while (task.join && top > 0) {
    const int radix = plan.stage[--top].radix;
    nodes /= radix;
    m *= radix;
    wide(false, task.data);
  }
}

}  // namespace seqconv::SEQCONV_ISA
