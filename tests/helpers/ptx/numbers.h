// fp16, bf16 and the roundings that PTX asks for ("Fundamental Types", "Half Precision
// Floating-Point Instructions").
#pragma once
#include <fenv.h>

#include <cmath>

#include "state.h"

template <class To, class From>
To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

inline float half_to_float(u16 x) { return (float)bits_as<_Float16>(x); }
inline u16 float_to_half(float x) { return x != x ? 0x7fff : bits_as<u16>((_Float16)x); }
inline float brain_to_float(u16 x) { return bits_as<float>((u32)x << 16); }
inline u16 float_to_brain(float x) {  // to nearest, ties to even
  const u32 b = bits_as<u32>(x);
  return x != x ? 0x7fff : (u16)((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

// A float32 that is rounded further as the double would be: where it is inexact, it is made odd.
inline float rounded_to_odd(double x) {
  const float y = (float)x;
  if ((double)y == x || x != x) return y;
  u32 b = bits_as<u32>(y);
  if (std::fabs((double)y) > std::fabs(x)) --b;
  return bits_as<float>(b | 1);
}

template <class F>
u32 each_half(u32 a, u32 b, u32 c, F&& f) {
  return f((u16)a, (u16)b, (u16)c) | (u32)f((u16)(a >> 16), (u16)(b >> 16), (u16)(c >> 16)) << 16;
}
inline u32 fma_half2(u32 a, u32 b, u32 c) {  // a product of fp16 numbers is exact in double
  return each_half(a, b, c, [](u16 x, u16 y, u16 z) {
    return float_to_half(
        rounded_to_odd((double)half_to_float(x) * half_to_float(y) + (double)half_to_float(z)));
  });
}
inline u32 multiply_half2(u32 a, u32 b) {
  return each_half(a, b, 0, [](u16 x, u16 y, u16) {
    return float_to_half(half_to_float(x) * half_to_float(y));
  });
}
// The sum of two doubles, rounded to odd as well: far apart they have more bits than a double.
inline double sum_to_odd(double x, double y) {
  const double sum = x + y, part = sum - x, rest = (x - (sum - part)) + (y - part);
  if (rest == 0 || !std::isfinite(rest)) return sum;
  const u64 b = bits_as<u64>(sum) - ((rest < 0) != (sum < 0));
  return bits_as<double>(b | 1);
}
inline u32 fma_brain2(u32 a, u32 b, u32 c) {
  return each_half(a, b, c, [](u16 x, u16 y, u16 z) {
    const double product = (double)brain_to_float(x) * brain_to_float(y);
    return float_to_brain(rounded_to_odd(sum_to_odd(product, brain_to_float(z))));
  });
}
inline u32 multiply_brain2(u32 a, u32 b) { return fma_brain2(a, b, 0x80008000u); }
// max: the number of a number and a NaN; -0 lies below +0.
inline u32 larger2(u32 a, u32 b, u16 infinity) {
  return each_half(a, b, 0, [infinity](u16 x, u16 y, u16) {
    const bool x_is_nan = (x & 0x7fff) > infinity, y_is_nan = (y & 0x7fff) > infinity;
    if (x_is_nan || y_is_nan) return x_is_nan ? (y_is_nan ? (u16)0x7fff : y) : x;
    const auto place = [](u16 v) { return v & 0x8000 ? -1 - (v & 0x7fff) : (int)v; };
    return place(x) > place(y) ? x : y;
  });
}
// max.xorsign.abs: the larger size, under the product of the signs; the number of a number and a
// NaN.
inline u32 larger_size2(u32 a, u32 b, u16 infinity) {
  return each_half(a, b, 0, [infinity](u16 x, u16 y, u16) {
    const u16 p = x & 0x7fff, q = y & 0x7fff;
    const u16 top = p > infinity ? (q > infinity ? 0x7fff : q) : q > infinity ? p : std::max(p, q);
    return (u16)(top | ((x ^ y) & 0x8000));
  });
}

// fma.rm: rounded downward. Volatile, so that no compiler computes it in another rounding mode.
__attribute__((noinline)) inline float fma_downward(float a, float b, float c) {
  fesetround(FE_DOWNWARD);
  volatile float x = a, y = b, z = c;
  volatile float r = std::fma((float)x, (float)y, (float)z);
  fesetround(FE_TONEAREST);
  return r;
}
inline float flush_subnormal(float x) {
  return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x;
}
inline float maximum(float a,
                     float b) {  // "max": the number of a number and a NaN; -0 lies below +0
  if (a != a || b != b) return a == a ? a : b == b ? b : bits_as<float>(0x7fffffffu);
  return a == b ? (std::signbit(a) ? b : a) : a > b ? a : b;
}
inline float minimum(float a, float b) {
  return a != a || b != b ? maximum(a, b) : -maximum(-a, -b);
}
inline s64 truncated(double a) {  // "cvt": saturated; what a NaN gives is the least integer
  return a != a || a < -0x1p63 ? INT64_MIN : a >= 0x1p63 ? INT64_MAX : (s64)a;
}

// Integers, where C++ leaves something undefined.
template <class T>
T divide(T a, T b, bool remainder) {  // by zero: PTX leaves it open
  if (b == 0) return remainder ? a : (T)-1;
  if (b == (T)-1 && (T)-1 < (T)0) return remainder ? 0 : (T)(0 - (u64)a);
  return (T)(remainder ? a % b : a / b);
}
inline u32 insert_bits(u32 a, u32 b, u32 position, u32 length) {  // "bfi"
  position &= 255, length &= 255;
  for (u32 i = 0; i < length && position + i < 32; ++i)
    b = (b & ~(1u << (position + i))) | (a >> i & 1) << (position + i);
  return b;
}
inline u32 extract_bits(u32 a, u32 position, u32 length) {  // "bfe.u32"
  position &= 255, length &= 255;
  const u64 x = position > 31 ? 0 : a >> position;
  return (u32)(length > 31 ? x : x & ((1ull << length) - 1));
}
inline u32 permute_bytes(u32 a, u32 b, u32 selection) {  // "prmt", default mode
  const u64 x = (u64)b << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 s = selection >> (4 * i) & 15;
    u32 byte = (u32)(x >> (8 * (s & 7))) & 255;
    if (s & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << (8 * i);
  }
  return r;
}
inline u32 funnel(u32 low, u32 high, u32 by, bool left, bool wrap) {  // "shf"
  by = wrap ? by & 31 : std::min(by, 32u);
  const u64 x = (u64)high << 32 | low;
  return left ? (u32)(x << by >> 32) : (u32)(x >> by);
}
