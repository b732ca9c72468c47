// The kernels of a unit: their taps on the way to spectra, and the gradients' way back.
#pragma once
#include "work.h"

namespace seqconv::SEQCONV_ISA {

// The row of k_rev of `reach` taps, or of its gradient, backwards.
SEQCONV_INLINE Series reversed(Series row, int64_t reach) {
  row.base += (reach - 1) * row.stride * size_of(row.dtype);
  row.stride = -row.stride;
  return row;
}

// Taps of k_rev, backwards, then those of k, or their gradients.
template <bool kIn, class T>
void move_taps(const Work<T>& w, const Tensor& k, const Tensor& k_rev, int64_t b, int64_t c,
               int64_t g, T* taps) {
  const auto move = [&](const Series& row, int64_t count, T* to) {
    if constexpr (kIn) {
      read(row, 0, count, to);
    } else {
      if (w.adds_kernels()) add_row(row, 0, count, to);
      write(row, 0, count, to);
    }
  };
  if (k_rev && w.reach) move(reversed(w.kernel_row(k_rev, b, c, g), w.reach), w.reach, taps);
  if (k) move(w.kernel_row(k, b, c, g), w.p.taps, taps + w.reach);
}

// Of a skip or a bias; 0 where there is none.
template <class T>
T value_of(const Series& row) {
  T value = 0;
  if (row) read(row, 0, 1, &value);
  return value;
}

// The combined kernel kk of sample b, its skip as part of tap 0.
template <class T>
void combine_taps(Work<T>& w, int64_t b, int64_t c, int64_t g, T* taps) {
  once(w.team, [&] {
    taps[w.reach] = 0;
    move_taps<true>(w, w.p.k, w.p.k_rev, b, c, g, taps);
    taps[w.reach] += value_of<T>(w.kernel_row(w.p.skip, 0, c, g));
  });
}

// The first pass of a kernel that is transformed at the row's own length, and its skip.
template <class T>
void enter_kernel(Work<T>& w, int64_t b, int64_t c, int64_t g) {
  const Plan<T>& plan = w.plan;
  T* to = w.kernel(g, c);
  const Source<T> fore{w.kernel_row(w.p.k, b, c, g), {}, w.p.taps};
  if (w.reach) {
    const Series rev = reversed(w.kernel_row(w.p.k_rev, b, c, g), w.reach);
    const Source<T> back{rev, {}, w.reach, w.reach - plan.n};
    enter(plan, w.team, to, plan.scaled, fore, &back, T(-1));
  } else {
    enter(plan, w.team, to, plan.scaled, fore);
  }
  if (!w.p.skip) return;
  // Tap 0 meets every factor with weight 1.
  const T value = value_of<T>(w.kernel_row(w.p.skip, 0, c, g)) / static_cast<T>(plan.n);
  once(w.team, [&] {
    for (int r = 0; r < plan.radix; ++r)
      for (int q = 0; q < kQuads<T>; ++q) to[r * plan.vectors * kStep<T> + 4 * q] += value;
  });
}

// What to fetch while the kernel of head c and channel g is in work: the next, or the first row.
template <class T>
void fetch_after_kernel(const Work<T>& w, int64_t b, int64_t c, int64_t g, Ahead& ahead) {
  if (c + 1 < w.p.heads) {
    ahead.will_read(w.lines(w.kernel_row(w.p.k, b, c + 1, g)));
  } else if (g + 1 < w.unit.channels) {
    ahead.will_read(w.lines(w.kernel_row(w.p.k, b, 0, g + 1)));
  } else {
    const int64_t sample = w.p.kernel_per_sample ? b : w.unit.batch;
    ahead.will_read(w.lines(w.u, sample, 0, false));
    ahead.will_read(w.lines(w.pre, sample, 0, false));
    if (w.dy.tensor) ahead.will_read(w.lines(w.dy, sample, 0, false));
  }
}

// The kernels of sample b, each with its skip as part of tap 0.
template <class T>
void load_kernels(Work<T>& w, int64_t b) {
  for (int64_t g = 0; g < w.unit.channels; ++g) {
    for (int64_t c = 0; c < w.p.heads; ++c) {
      if (w.method.direct) {
        combine_taps(w, b, c, g, w.kernel(g, c));
        continue;
      }
      if (w.blocked) {
        combine_taps(w, b, c, g, w.kk);
        const Source<T> all{w.own_row(w.kk), {}, w.width};
        enter(w.plan, w.team, w.kernel(g, c), w.plan.scaled, all);
      } else {
        enter_kernel(w, b, c, g);
      }
      Ahead ahead;
      if (w.fetches()) fetch_after_kernel(w, b, c, g, ahead);
      w.finish_spectrum(w.kernel(g, c), ahead);
    }
  }
}

// A row that gets its old values and new ones.
template <class T>
struct AddToRow {
  Series row;
  static void take(const void* context, int64_t t, int64_t n, T* values) {
    const Series& to = static_cast<const AddToRow*>(context)->row;
    add_row(to, t, n, values);
    write(to, t, n, values);
  }
};

// Turns the sum of channel g and head c, a spectrum, into the gradient of the kernel (of sample b).
template <class T>
void leave_kernel_gradient(Work<T>& w, int64_t b, int64_t c, int64_t g) {
  const Plan<T>& plan = w.plan;
  Task<T> task(w.dk(g, c));
  task.split = false;
  run_task(plan, task, w.team);
  if (w.blocked) {
    leave(plan, w.team, task.data, plan.scaled, Sink<T>{w.own_row(w.kk), w.width});
    return;
  }
  const auto leave_to = [&](const Series& row, const T* weights, int64_t count, int64_t shift) {
    const AddToRow<T> add{row};
    leave(plan, w.team, task.data, weights,
          w.adds_kernels() ? Sink<T>{{}, count, shift, AddToRow<T>::take, &add}
                           : Sink<T>{row, count, shift});
  };
  if (w.p.dk) leave_to(w.kernel_row(w.p.dk, b, c, g), plan.scaled, w.p.taps, 0);
  if (w.p.dk_rev && w.reach)
    leave_to(reversed(w.kernel_row(w.p.dk_rev, b, c, g), w.reach), plan.scaled_times_minus_i,
             w.reach, w.reach - plan.n);
}

// Turns the sums of channel g into gradients of the kernels (of sample b).
template <class T>
void store_kernel_gradients(Work<T>& w, int64_t b, int64_t g) {
  for (int64_t c = 0; c < w.p.heads; ++c) {
    if (w.method.direct)
      for (int64_t j = 0; j < w.width; ++j) w.kk[j] = static_cast<T>(w.dots(g, c)[kScalars + j]);
    else
      leave_kernel_gradient(w, b, c, g);
    if (w.method.direct || w.blocked)
      once(w.team, [&] { move_taps<false>(w, w.p.dk, w.p.dk_rev, b, c, g, w.kk); });
  }
}

}  // namespace seqconv::SEQCONV_ISA
