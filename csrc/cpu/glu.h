// The gated linear unit of a product z = x W^T, without the product's bias:
//
//   y[n,h] = (z[n,h] + bias[h]) sigmoid(z[n,H+h] + bias[H+h]),  0 <= h < H = channels
//
// and its gradients dz, and dbias, the sum of dz over n. Rows are contiguous, of z and dz 2 H wide;
// those of dy may lie further apart. Arguments arrive validated; all sizes are at least 1.
#pragma once
#include <cstdint>

#include "tensor.h"

namespace seqconv {

struct GluProblem {
  int64_t rows, channels;
  int threads;            // results do not depend on it
  const float *z, *bias;  // bias may be null
  float* y;               // forward only
  const float* dy;
  int64_t dy_stride;  // of rows
  float* dz;
  double* dbias;  // is added to; may be null
};

constexpr int64_t kGluRows = 256;  // of a unit

Status glu_forward(const GluProblem& problem);
Status glu_backward(const GluProblem& problem);

}  // namespace seqconv
