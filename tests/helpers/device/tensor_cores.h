// The functions of csrc/device/mma.cuh on the host: pairs of fp16 numbers, products of matrices and
// the loads of their operands. Products are summed in float32 and rounded once. Conversions of
// 16-bit numbers stand here as well.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "block.h"

struct bf16;
struct fp16;
struct Pair;
inline _Float16 half_of(u32 bits) {
  const unsigned short low = (unsigned short)bits;
  _Float16 y;
  std::memcpy(&y, &low, 2);
  return y;
}
inline u32 bits_of(_Float16 x) {
  unsigned short y;
  std::memcpy(&y, &x, 2);
  return y;
}
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
namespace emulator {
struct Mma {
  const u32* a;
  u32 b[2];
  float* d;
};
inline void multiply_tiles(void** slots) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& o = *(Mma*)slots[lane];
    const int g = lane >> 2, t = lane & 3;
    for (int q = 0; q < 4; ++q)
      for (int e = 0; e < 2; ++e)
        a[g + 8 * (q & 1)][2 * t + 8 * (q >> 1) + e] = (float)half_of(o.a[q] >> (16 * e));
    for (int q = 0; q < 2; ++q)
      for (int e = 0; e < 2; ++e) b[2 * t + 8 * q + e][g] = (float)half_of(o.b[q] >> (16 * e));
    for (int q = 0; q < 4; ++q) d[g + 8 * (q >> 1)][2 * t + (q & 1)] = o.d[q];
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane >> 2, t = lane & 3;
    for (int q = 0; q < 4; ++q) ((Mma*)slots[lane])->d[q] = d[g + 8 * (q >> 1)][2 * t + (q & 1)];
  }
}
inline long products = 0;  // tensor core instructions of all warps
inline void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  static const char here = 0;
  Mma mine{a, {b0, b1}, d};
  meet(&mine, &here, [](void** slots) {
    ++products;
    multiply_tiles(slots);
  });
}
}  // namespace emulator
template <class P>
inline void mma(P (&d)[2], const u32 (&a)[4], u32 b0, u32 b1) {
  if constexpr (std::is_same_v<P, u32>) {
    float sum[4] = {(float)half_of(d[0]), (float)half_of(d[0] >> 16), (float)half_of(d[1]),
                    (float)half_of(d[1] >> 16)};
    emulator::mma(sum, a, b0, b1);
    d[0] = pack(sum[0], sum[1]);
    d[1] = pack(sum[2], sum[3]);
  } else {
    float sum[4] = {d[0].x, d[0].y, d[1].x, d[1].y};
    emulator::mma(sum, a, b0, b1);
    d[0] = {sum[0], sum[1]};
    d[1] = {sum[2], sum[3]};
  }
}
inline void load_transposed(u32 (&r)[4], const unsigned short* p) {
  static const char here = 0;
  struct Op {
    u32* r;
    const unsigned short* p;
  } mine{r, p};
  emulator::meet(&mine, &here, [](void** slots) {
    for (int tile = 0; tile < 4; ++tile) {
      unsigned short t[8][8];
      for (int row = 0; row < 8; ++row) {
        const unsigned short* from = ((Op*)slots[8 * tile + row])->p;
        if ((uintptr_t)from % 16)
          emulator::fail("ldmatrix from an address that is no multiple of 16");
        emulator::touch(from, 16, false, emulator::me().linear / 32 * 32 + 8 * tile + row);
        std::memcpy(t[row], from, 16);
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane >> 2, q = lane & 3;
        ((Op*)slots[lane])->r[tile] = t[2 * q][g] | (u32)t[2 * q + 1][g] << 16;
      }
    }
  });
}

inline float to_float(float x) { return x; }
template <class T>
inline float to_float(T x) {
  if constexpr (std::is_same_v<T, bf16>) {
    const u32 bits = (u32)x.bits << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
  } else {
    _Float16 y;
    std::memcpy(&y, &x.bits, 2);
    return (float)y;
  }
}
template <class T>
inline void from_float(T& y, float x) {
  if constexpr (std::is_same_v<T, float>) {
    y = x;
  } else if constexpr (std::is_same_v<T, bf16>) {
    u32 bits;
    std::memcpy(&bits, &x, 4);
    y.bits = (bits & 0x7fffffffu) > 0x7f800000u
                 ? 0x7fff
                 : (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  } else {
    const _Float16 half = (_Float16)x;
    std::memcpy(&y.bits, &half, 2);
  }
}
