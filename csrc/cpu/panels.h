// Panels: what a unit reads or writes of a tensor whose neighbours in memory are channels, with
// time innermost.
#pragma once
#include "work.h"

namespace seqconv::SEQCONV_ISA {

// A vector of each of the two channels of a pair, `pitch` apart in the panel; `past` the caches, if
// told so.
template <bool kIn, class T>
SEQCONV_INLINE void move_pair(T* outside, T* inside, int64_t pitch, bool past) {
  if constexpr (kIn) {
    const Vec<T> low = load_vector(outside), high = load_vector(outside + kLanes<T>);
    store_vector(inside, shuffle<Unzip<0>, T>(low, high));
    store_vector(inside + pitch, shuffle<Unzip<1>, T>(low, high));
  } else {
    const Vec<T> even = load_vector(inside), odd = load_vector(inside + pitch);
    const Vec<T> low = shuffle<Zip<0>, T>(even, odd), high = shuffle<Zip<1>, T>(even, odd);
    if (past) {
      stream<T>(outside, low);
      stream<T>(outside + kLanes<T>, high);
    } else {
      store_vector(outside, low);
      store_vector(outside + kLanes<T>, high);
    }
  }
}

// A square of as many times, `along` apart outside, as channels, `pitch` apart inside. Whole lines
// go out, or past the caches, and no line of the panel is written twice.
template <bool kIn, class T>
SEQCONV_INLINE void move_square(T* outside, int64_t along, T* inside, int64_t pitch, bool past) {
  constexpr int kSide = kLanes<T>;
  Vec<T> rows[kSide];
  SEQCONV_UNROLL
  for (int i = 0; i < kSide; ++i)
    rows[i] = load_vector(kIn ? outside + i * along : inside + i * pitch);
  transpose_square<T>(rows);
  SEQCONV_UNROLL
  for (int i = 0; i < kSide; ++i) {
    if (kIn)
      store_vector(inside + i * pitch, rows[i]);
    else if (past)
      stream<T>(outside + i * along, rows[i]);
    else
      store_vector(outside + i * along, rows[i]);
  }
}

// Times [begin, end) of sample b and head c, pairs or squares of elements at a time where it can.
template <bool kIn, class T>
void move_times(const Work<T>& w, const View<T>& v, int64_t b, int64_t c, int64_t begin,
                int64_t end) {
  const Tensor& t = *v.tensor;
  const int64_t across = t.stride[2], along = t.stride[3], channels = w.unit.channels;
  const int64_t pitch = w.pitch;
  dispatch(t.dtype, [&](auto tag) {
    using S = typename decltype(tag)::Type;
    S* outside = reinterpret_cast<S*>(w.row(t, b, c, 0).base);
    T* inside = v.panel + c * w.group * pitch;
    int64_t done = 0, until = begin;  // channels and times that whole vectors have done
    if constexpr (sizeof(S) == sizeof(T)) {
      if (w.is_pair(t)) {
        T* there = reinterpret_cast<T*>(outside) + 2 * until;
        const bool past = v.streamed && reinterpret_cast<uintptr_t>(there) % sizeof(Vec<T>) == 0;
        done = 2;
        for (; until + kLanes<T> <= end; until += kLanes<T>, there += 2 * kLanes<T>)
          move_pair<kIn>(there, inside + until, pitch, past);
      } else if (across == 1 && channels >= kLanes<T>) {
        done = channels / kLanes<T> * kLanes<T>;
        for (; until + kLanes<T> <= end; until += kLanes<T>)
          for (int64_t g = 0; g < done; g += kLanes<T>) {
            T* there = reinterpret_cast<T*>(outside) + until * along + g;
            move_square<kIn>(there, along, inside + g * pitch + until, pitch, v.streamed);
          }
      } else if (across == 1) {
        done = channels / 4 * 4;
        for (; until + 4 <= end; until += 4)
          for (int64_t g = 0; g < done; g += 4) {
            T* there = reinterpret_cast<T*>(outside) + until * along + g;
            T* here = inside + g * pitch + until;
            if constexpr (kIn)
              transpose_block<T>(there, along, here, pitch);
            else
              transpose_block<T>(here, pitch, there, along);
          }
      }
    }
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t g = i < until ? done : 0; g < channels; ++g) {
        S& there = outside[g * across + i * along];
        T& here = inside[g * pitch + i];
        if constexpr (kIn)
          here = static_cast<T>(widen(there));
        else
          narrow(here, there);
      }
    }
  });
}

// Copies sample b of those views that have a panel into it, or back out. Some times of all views
// before the next ones, because several views may be parts of one tensor and share its pages.
template <bool kIn, class T>
void move_panels(Work<T>& w, const View<T>* const (&views)[4], int64_t b) {
  constexpr int64_t kTimes = 256;
  spread(w.team, w.p.length_of(b), kTimes, [&](int64_t begin, int64_t end) {
    for (int64_t from = begin; from < end; from += kTimes)
      for (const View<T>* v : views)
        for (int64_t c = 0; v->panel && c < v->heads; ++c)
          move_times<kIn>(w, *v, b, c, from, end - from < kTimes ? end : from + kTimes);
  });
}
template <class T>
void read_panels(Work<T>& w, int64_t b) {
  move_panels<true>(w, {&w.u, &w.pre, &w.post, &w.dy}, b);
}
template <class T>
void write_panels(Work<T>& w, int64_t b) {
  move_panels<false>(w, {&w.y, &w.du, &w.dpre, &w.dpost}, b);
}

}  // namespace seqconv::SEQCONV_ISA
