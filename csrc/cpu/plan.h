// Transform lengths and twiddles of the right-angle convolution.
//
// The transform evaluates a polynomial at the roots of x^n = i by splitting x^m - e^{i a} into R
// factors x^{m/R} - e^{i (a + 2 pi j) / R}, stage by stage, the root node being x^n - i (a = pi /
// 2). A product of two such transforms is the product modulo x^n - i, whose real part is the causal
// convolution for every length <= n: no zero padding to 2n, no bit reversal.
#pragma once
#include <cstdint>
#include <memory>

#include "isa.h"

namespace seqconv {

// The cheapest way, by a count of operations, with vectors of `quads` quads of lanes. length >= 1.
Method choose_method(int64_t length, int64_t taps, int64_t taps_rev, int quads);

// Cheapest transform length >= length: 4 quads times a product of 2, 3, 5 and 7.
int64_t choose_fft_size(int64_t length, int quads);

// A transform together with the memory of its twiddles.
template <class T>
struct Plan {
  Transform<T> transform;
  std::unique_ptr<T[], void (*)(T*)> twiddles{nullptr, nullptr};
  size_t bytes = 0;
};

// Shared, immutable; kept in a bounded cache. Null when memory runs out. Thread-safe and fork-safe.
template <class T>
std::shared_ptr<const Plan<T>> get_plan(int64_t n, int quads);

}  // namespace seqconv
