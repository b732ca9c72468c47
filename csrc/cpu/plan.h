// Transform lengths and twiddles of the right-angle convolution.
//
// The transform evaluates a polynomial at the roots of x^n = i by splitting x^m - e^{i a} into R
// factors x^{m/R} - e^{i (a + 2 pi j) / R}, stage by stage, the root node being x^n - i (a = pi /
// 2). A product of two such transforms is the product modulo x^n - i, whose real part is the causal
// convolution for every length <= n: no zero padding to 2n, no bit reversal.
#pragma once
#include <cstdint>
#include <memory>

#include "kernel.h"

namespace seqconv {

// Cheapest n >= length (by a count of butterfly operations) with no prime factor above 5.
int64_t choose_fft_size(int64_t length);

// A transform together with the memory of its twiddles.
template <class T>
struct Plan {
  Transform<T> transform;
  std::unique_ptr<T[]> twiddles;
};

// Shared, immutable; kept in a bounded cache. Null when memory runs out. Thread-safe and fork-safe.
template <class T>
std::shared_ptr<const Plan<T>> get_plan(int64_t n);

}  // namespace seqconv
