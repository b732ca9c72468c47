// The four dtypes of tensors, and their conversion to what is computed in.
#pragma once
#include "target.h"
#include "tensor.h"

namespace seqconv::SEQCONV_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
SEQCONV_INLINE To same_bits(From from) {
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// Without branches, so that loops over them become vector code.
SEQCONV_INLINE float widen(float x) { return x; }
SEQCONV_INLINE double widen(double x) { return x; }
SEQCONV_INLINE float widen(BFloat16 x) {
  return same_bits<float>(static_cast<uint32_t>(x.bits) << 16);
}
SEQCONV_INLINE float widen(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  const uint32_t normal = (rest << 13) + (112u << 23);  // rebiases the exponent
  const uint32_t special = (rest << 13) + (224u << 23);
  // By an integer conversion, in case the processor flushes subnormals to zero.
  const uint32_t subnormal =
      same_bits<uint32_t>(static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-24f);
  const uint32_t finite = rest < 0x400u ? subnormal : normal;
  return same_bits<float>(sign | (rest >= 0x7c00u ? special : finite));
}

// Round to nearest, ties to even.
SEQCONV_INLINE void narrow(float x, float& out) { out = x; }
SEQCONV_INLINE void narrow(float x, double& out) { out = static_cast<double>(x); }
SEQCONV_INLINE void narrow(double x, double& out) { out = x; }
SEQCONV_INLINE void narrow(double x, float& out) { out = static_cast<float>(x); }
SEQCONV_INLINE void narrow(float x, BFloat16& out) {
  const uint32_t bits = same_bits<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(magnitude > 0x7f800000u ? bits >> 16 | 0x40u : rounded);
}
SEQCONV_INLINE void narrow(float x, Float16& out) {
  const uint32_t sign = same_bits<uint32_t>(x) >> 16 & 0x8000u;
  const uint32_t magnitude = same_bits<uint32_t>(x) & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  // Subnormal: adding 0.5 puts the rounding where it belongs.
  const uint32_t subnormal =
      same_bits<uint32_t>(same_bits<float>(magnitude) + 0.5f) - same_bits<uint32_t>(0.5f);
  uint32_t rest = magnitude < 0x38800000u ? subnormal : normal;
  rest = magnitude >= 0x477ff000u ? 0x7c00u : rest;  // rounds to infinity
  out.bits = static_cast<uint16_t>(sign | (magnitude > 0x7f800000u ? 0x7e00u : rest));
}
// A problem computed in double has no narrower output than the gradient of a narrow kernel.
template <class S>
SEQCONV_INLINE void narrow(double x, S& out) {
  narrow(static_cast<float>(x), out);
}

template <class S>
struct Tag {
  using Type = S;
};

// Calls op(Tag<S>{}) with the scalar type S of dtype.
template <class Op>
SEQCONV_INLINE void dispatch(Dtype dtype, const Op& op) {
  switch (dtype) {
    case Dtype::kFloat32:
      return op(Tag<float>{});
    case Dtype::kFloat64:
      return op(Tag<double>{});
    case Dtype::kBFloat16:
      return op(Tag<BFloat16>{});
    case Dtype::kFloat16:
      return op(Tag<Float16>{});
  }
}

// As many conversions as there are instructions for, from the start; how many those were.
SEQCONV_INLINE int64_t convert_many(const void*, int64_t, void*) { return 0; }
#if SEQCONV_AVX
SEQCONV_INLINE int64_t convert_many(const Float16* from, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 x = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    _mm256_storeu_ps(out + i, x);
  }
  return i;
}
SEQCONV_INLINE int64_t convert_many(const float* from, int64_t n, Float16* to) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  return i;
}
#endif

}  // namespace seqconv::SEQCONV_ISA
