// How a convolution is carried out: the transform's length, its radices, and where its twiddles
// lie.
//
// The right-angle transform evaluates a polynomial at the roots of x^n = i by splitting x^m -
// e^{i a} into R factors x^{m/R} - e^{i (a + 2 pi j) / R}, stage by stage, the root node being x^n
// - i (a = pi / 2). A product of two such transforms is the product modulo x^n - i, whose real part
// is the causal convolution for every length <= n: no zero padding to 2n, no bit reversal.
#pragma once
#include <cstdint>
#include <memory>

namespace seqconv {

constexpr int kDirectTaps = 32;  // up to here the direct sum is at least as fast as the transform

// `blocks` transforms of n points each, or, with n = 0, a direct sum.
struct Method {
  bool direct;
  int64_t n, blocks;
};

// The cheapest way, by a count of operations, with vectors of `quads` quads of lanes. length >= 1.
Method choose_method(int64_t length, int64_t taps, int64_t taps_rev, int quads);

constexpr int kMaxStages = 32;

// Quads of the vectors that the first and last pass use. The widest vectors are taken by halves
// there: splitting a row by butterflies costs half of splitting it into lanes.
constexpr int end_quads(int quads, int scalar_bytes) {
  return 4 * quads * scalar_bytes > 32 ? quads / 2 : quads;
}

struct Stage {
  int radix;
  int64_t twiddle;  // index of the stage's first twiddle, see Plan
};

// The transform of n points. A vector holds the same four neighbouring positions of `quads`
// branches: the factors into which the first pass splits x^n - i, quads at a time in the lanes,
// then `radix` at a time in memory. `quads * radix` segments of the row meet in that pass.
template <class T>
struct Plan {
  int64_t n = 0;
  int quads = 1, radix = 1;
  int64_t vectors = 0;   // complex vectors of one child of the first pass: n / (4 quads radix)
  int64_t spectrum = 0;  // scalars of a spectrum, complex vectors rounded up to whole groups of 4
  int stages = 0;
  Stage stage[kMaxStages];
  bool compact = false;         // radix 4 nodes keep w only; w^2 and w^3 are computed
  const T* twiddles = nullptr;  // per node w, w^2, ...: one complex vector each
  int64_t middle = 0;  // index of the last four positions' twiddles, per group of four nodes
  // Coefficients of the first and last pass: the segments' weights w, w / n, and -i w / n.
  const T *plain, *scaled, *scaled_times_minus_i;
};

// Shared, immutable; kept in a bounded cache. Null when memory runs out. Thread-safe and fork-safe.
template <class T>
std::shared_ptr<const Plan<T>> get_plan(int64_t n, int quads);

}  // namespace seqconv
