// Tensors of any dtype and stride as the arguments of kernels, and access to global memory by one
// number or by several.
//
// The arguments of an operator's kernels are one structure. Each field has 8 bytes or is a
// structure of such fields, so that a launcher can pack them as 64-bit words. The lists in
// seqconv/backends/cuda/arguments.py must have the same fields.
#pragma once
#include "radix.cuh"

enum Dtype { kFloat32 = 0, kBfloat16 = 2, kFloat16 = 3, kComplex = 4 };

struct Tensor {
  void* data;  // null where there is no such tensor
  i64 dtype;
  i64 batch, head, channel, time;  // strides in elements

  template <class T>
  SEQCONV_DEVICE T* row(i64 b, i64 c, i64 h) const {
    return data == nullptr ? nullptr : (T*)data + b * batch + c * head + h * channel;
  }
};

SEQCONV_DEVICE float load_any(const void* p, i64 dtype, i64 i) {
  if (dtype == kBfloat16) return to_float(((const bf16*)p)[i]);
  if (dtype == kFloat16) return to_float(((const fp16*)p)[i]);
  return ((const float*)p)[i];
}
SEQCONV_DEVICE void store_any(void* p, i64 dtype, i64 i, float value) {
  if (dtype == kBfloat16) return from_float(((bf16*)p)[i], value);
  if (dtype == kFloat16) return from_float(((fp16*)p)[i], value);
  ((float*)p)[i] = value;
}

SEQCONV_DEVICE i64 element_size(i64 dtype) {
  return dtype == kComplex ? 8 : dtype == kFloat32 ? 4 : 2;
}
SEQCONV_DEVICE const void* row_of(const Tensor& t, i64 b, i64 c, i64 h) {
  return (const char*)t.data + (b * t.batch + c * t.head + h * t.channel) * element_size(t.dtype);
}

// Neighbours that one access reads or writes, where they are neighbours in aligned memory.
template <class T>
struct alignas(16) Eight {
  T at[8];
};
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};
template <class T>
SEQCONV_DEVICE bool aligned(const T* p, i64 step, int bytes) {
  return p == nullptr || (step == 1 && ((i64)p & (bytes - 1)) == 0);
}

// 8 numbers of 16 bits, two to a word. The compiler selects them as a whole; it would select the
// numbers of an Eight one by one.
template <class T>
SEQCONV_DEVICE uint4 eight_words(const T* p, bool is_there) {
  uint4 x{0, 0, 0, 0};
  if (is_there) x = *(const uint4*)p;
  return x;
}
template <class T>
SEQCONV_DEVICE void to_floats(uint4 x, float (&v)[8]) {
  const u32 words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = to_float(T{(unsigned short)(words[i / 2] >> (16 * (i & 1)))});
}
