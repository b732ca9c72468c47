// The parts of the standalone program. Each prints the worst relative errors, and tells whether
// they are within bounds.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "cpu/fftconv.h"

namespace standalone {

bool convolutions();
bool state_spaces();
bool butterflies();

template <class T>
seqconv::Tensor tensor(std::vector<T>& x, int64_t b, int64_t c, int64_t t) {
  seqconv::Tensor result;
  if (x.empty()) return result;
  result.data = reinterpret_cast<char*>(x.data());
  result.dtype = sizeof(T) == 4 ? seqconv::Dtype::kFloat32 : seqconv::Dtype::kFloat64;
  const int64_t stride[] = {b, 0, c, t};
  std::memcpy(result.stride, stride, sizeof stride);
  return result;
}

// The largest of the errors. Infinite if one is no number, which std::fmax would pass over.
inline double largest(std::initializer_list<double> errors) {
  double result = 0;
  for (double error : errors) result = std::isfinite(error) ? std::fmax(result, error) : HUGE_VAL;
  return result;
}

// The norm of the error over the norm of what is wanted. Infinite if it is no number, which maxima
// would pass over.
template <class T>
double distance(const std::vector<T>& value, const std::vector<double>& wanted) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    error += std::pow(static_cast<double>(value[i]) - wanted[i], 2);
    norm += wanted[i] * wanted[i];
  }
  const double result = std::sqrt(error / std::fmax(norm, 1e-300));
  return std::isfinite(result) ? result : HUGE_VAL;
}

}  // namespace standalone
