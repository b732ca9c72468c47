// The numbers of csrc/device on the host: bf16 and fp16, alone and in pairs, and their conversions.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

typedef uint32_t u32;

struct alignas(8) uint2 {
  u32 x, y;
};
struct alignas(16) uint4 {
  u32 x, y, z, w;
};
namespace emulator {
template <class To, class From>
To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
}  // namespace emulator
struct bf16;
struct fp16;
struct Pair;
inline _Float16 half_of(u32 bits) { return emulator::bits_as<_Float16>((unsigned short)bits); }
inline u32 bits_of(_Float16 x) { return emulator::bits_as<unsigned short>(x); }
inline u32 pack(float x, float y) { return bits_of((_Float16)x) | bits_of((_Float16)y) << 16; }
template <class P = Pair>
inline P unpack(u32 v) {
  return {(float)half_of(v), (float)half_of(v >> 16)};
}
inline u32 fma2(u32 a, u32 b, u32 c) {
  const auto one = [](u32 x, u32 y, u32 z) {
    return bits_of((_Float16)std::fma((double)half_of(x), (double)half_of(y), (double)half_of(z)));
  };
  return one(a, b, c) | one(a >> 16, b >> 16, c >> 16) << 16;
}
inline u32 negate2(u32 a) { return a ^ 0x80008000u; }
inline u32 mul2(u32 a, u32 b) {
  return bits_of((_Float16)((float)half_of(a) * (float)half_of(b))) |
         bits_of((_Float16)((float)half_of(a >> 16) * (float)half_of(b >> 16))) << 16;
}
inline u32 add2(u32 a, u32 b) { return fma2(a, 0x3c003c00u, b); }
inline u32 sub2(u32 a, u32 b) { return fma2(b, 0xbc00bc00u, a); }
// Byte i of the result is byte (selector >> 4 i) & 7 of the eight of a and b, a's first.
inline u32 byte_perm(u32 a, u32 b, u32 selector) {
  const unsigned long long bytes = (unsigned long long)b << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; ++i) r |= (u32)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return r;
}

inline float to_float(float x) { return x; }
template <class T>
inline float to_float(T x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return emulator::bits_as<float>((u32)x.bits << 16);
  } else {
    return (float)emulator::bits_as<_Float16>(x.bits);
  }
}
template <class T>
inline void from_float(T& y, float x) {
  if constexpr (std::is_same_v<T, float>) {
    y = x;
  } else if constexpr (std::is_same_v<T, bf16>) {
    const u32 bits = emulator::bits_as<u32>(x);
    y.bits = (bits & 0x7fffffffu) > 0x7f800000u
                 ? 0x7fff
                 : (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  } else {
    y.bits = (unsigned short)bits_of((_Float16)x);
  }
}

// What differs between bf16 and fp16. Both have a sign and 15 bits of size, NaN beyond infinity.
template <class T, int kMantissaBits, int kInfinity>
struct FormatOf {
  enum {
    kMantissa = kMantissaBits,
    kExponents = kInfinity >> kMantissaBits,
    kBias = kExponents / 2
  };
  static float low(u32 x) { return to_float(T{(unsigned short)x}); }
  static float high(u32 x) { return low(x >> 16); }
  static u32 pack(float x, float y) {
    T a, b;
    from_float(a, x), from_float(b, y);
    return a.bits | (u32)b.bits << 16;
  }
  static u32 mul(u32 a, u32 b) { return pack(low(a) * low(b), high(a) * high(b)); }
  // The larger size under the product of the signs; the number of a number and a NaN
  // ("max.xorsign.abs").
  static u32 larger(u32 a, u32 b) {
    const auto one = [](u32 x, u32 y) {
      const u32 p = x & 0x7fff, q = y & 0x7fff;
      const u32 top = p > kInfinity   ? (q > kInfinity ? 0x7fff : q)
                      : q > kInfinity ? p
                      : p > q         ? p
                                      : q;
      return top | ((x ^ y) & 0x8000);
    };
    return one(a, b) | one(a >> 16, b >> 16) << 16;
  }
};
template <class T>
struct Format;
template <>
struct Format<bf16> : FormatOf<bf16, 7, 0x7f80> {};
template <>
struct Format<fp16> : FormatOf<fp16, 10, 0x7c00> {};
