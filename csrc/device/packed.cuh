// Packed rows: row i has the steps [offsets[i], offsets[i + 1]) of signals without an axis of
// samples. The kernels of fftconv.cuh and long_rows.cuh take these arguments in place of the dense
// ones, and find here where a row lies. A launch takes a group of rows that one plan serves; it
// counts them as `batch`. What the plan has beyond a row's end is skipped.
//
// Offsets need not have been checked. Whatever they are, no step outside of the signals is read or
// written: a row begins and ends in [0, length], never ends before it begins, and ends at the
// plan's longest row.
#pragma once
#include "rows.cuh"

struct PackedArgs : ConvolutionArgs {  // `length` is the number of all steps
  i64 longest;                         // steps that a row has at most
  i64 narrow;                          // whether offsets have 32 bits
  const void* offsets;                 // (rows of the pack + 1)
  const i64* rows;                     // of the group; null where it has all rows in their order
};

SEQCONV_DEVICE i64 row_number(const PackedArgs& a, i64 b) {
  return a.rows == nullptr ? b : a.rows[b];
}
SEQCONV_DEVICE i64 offset(const PackedArgs& a, i64 row) {
  const i64 at = a.narrow ? ((const int*)a.offsets)[row] : ((const i64*)a.offsets)[row];
  return at < 0 ? 0 : at > a.length ? a.length : at;
}

struct Span {
  int begin, steps;
};
SEQCONV_DEVICE Span span(const PackedArgs& a, i64 b) {
  const i64 row = row_number(a, b), begin = offset(a, row), steps = offset(a, row + 1) - begin;
  return {(int)begin, (int)(steps < 0 ? 0 : steps > a.longest ? a.longest : steps)};
}

// As the dense one. Signals have no axis of samples, hence sample 0.
SEQCONV_DEVICE Place place(const PackedArgs& a, int b, int h, int window, bool real) {
  const Span row = real ? span(a, b) : Span{0, 0};
  const int before = window * (int)a.step - (int)a.lead, end = row.steps - before,
            n = (int)a.transform.n;
  return {0, h, row.begin + before, real && before < 0 ? -before : 0,
          real ? (end < n ? end : n) : 0};
}

// Taps of their own meet as many lags as their row has.
SEQCONV_DEVICE TapsPlace taps_place(const PackedArgs& a, i64 b) {
  const int steps = span(a, b).steps, later = steps > 0 ? steps - 1 : 0;
  return {row_number(a, b), (int)(a.taps < steps ? a.taps : steps),
          (int)(a.taps_rev < later ? a.taps_rev : later)};
}
