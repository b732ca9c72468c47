// Tensors as the CPU kernels see them: plain pointers, sizes and strides.
#pragma once
#include <cstdint>

namespace seqconv {

enum class Dtype : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
// Bytes. Static, so that no instruction set's copy serves the others.
static inline int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// A tensor indexed (batch, head, channel, time); axes it does not have carry stride 0.
// Strides count elements. data is null for an argument that is absent or not asked for.
struct Tensor {
  char* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t stride[4] = {0, 0, 0, 0};
  explicit operator bool() const { return data != nullptr; }
};

// What a call ends with.
enum class Status { kOk, kOutOfMemory };

}  // namespace seqconv
