// The functions of csrc/device/mma.cuh on the host: products of matrices, and the loads and stores
// of their operands. Products are summed in float32 and rounded once.
#pragma once
#include "numbers.h"
#include "races.h"

namespace emulator {
struct Mma {
  const u32* a;
  u32 b[2];
  float* d;
};
// T is the type of the operands.
template <class T>
void multiply_tiles(void** slots) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& o = *(Mma*)slots[lane];
    const int g = lane >> 2, t = lane & 3;
    for (int q = 0; q < 4; ++q)
      for (int e = 0; e < 2; ++e)
        a[g + 8 * (q & 1)][2 * t + 8 * (q >> 1) + e] = Format<T>::low(o.a[q] >> (16 * e));
    for (int q = 0; q < 2; ++q)
      for (int e = 0; e < 2; ++e) b[2 * t + 8 * q + e][g] = Format<T>::low(o.b[q] >> (16 * e));
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
}  // namespace emulator
// d += a (16 x 16) b (16 x 8). Fragments: PTX ISA, mma.m16n8k16.
template <class T>
void mma_of(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  static const char here = 0;
  emulator::Mma mine{a, {b0, b1}, d};
  emulator::meet(&mine, &here, [](void** slots) {
    ++emulator::products;
    emulator::multiply_tiles<T>(slots);
  });
}
inline void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_of<fp16>(d, a, b0, b1); }
template <class P>
inline void mma(P (&d)[2], const u32 (&a)[4], u32 b0, u32 b1) {
  if constexpr (std::is_same_v<P, u32>) {
    float sum[4] = {(float)half_of(d[0]), (float)half_of(d[0] >> 16), (float)half_of(d[1]),
                    (float)half_of(d[1] >> 16)};
    mma(sum, a, b0, b1);
    d[0] = pack(sum[0], sum[1]);
    d[1] = pack(sum[2], sum[3]);
  } else {
    float sum[4] = {d[0].x, d[0].y, d[1].x, d[1].y};
    mma(sum, a, b0, b1);
    d[0] = {sum[0], sum[1]};
    d[1] = {sum[2], sum[3]};
  }
}
// d = a b
template <class D>
void mma_first(D& d, const u32 (&a)[4], u32 b0, u32 b1) {
  for (auto& x : d) x = 0;
  mma(d, a, b0, b1);
}

namespace emulator {
inline unsigned char* aligned_at(u32 at, size_t bytes, bool write, bool together = false) {
  if (at % bytes) fail("misaligned address in shared memory: " + std::to_string(at));
  unsigned char* p = block().shared.data + at;
  touch(p, bytes, write, access_of(me().linear, together));
  return p;
}
// Tiles of 8 x 8 numbers of 16 bits. Lane 8 m + r gives the address of row r of tile m. Lane 4 r +
// w holds numbers 2 w and 2 w + 1 of row r or, transposed, of column r.
struct Tiles {
  u32 at;
  u32 r[4];
};
template <bool kStore, bool kTransposed>
void move_tiles(Tiles& mine) {
  static const char here = 0;
  meet(&mine, &here, [](void** slots) {
    for (int m = 0; m < 4; ++m) {
      unsigned char* rows[8];
      for (int r = 0; r < 8; ++r)
        rows[r] = aligned_at(((Tiles*)slots[8 * m + r])->at, 16, kStore, true);
      for (int i = 0; i < 64; ++i) {
        const int row = kTransposed ? i % 8 : i / 8, column = kTransposed ? i / 8 : i % 8;
        unsigned char* memory = rows[row] + 2 * column;
        unsigned char* lane = (unsigned char*)&((Tiles*)slots[i / 2])->r[m] + 2 * (i % 2);
        std::memcpy(kStore ? memory : lane, kStore ? lane : memory, 2);
      }
    }
  });
}
}  // namespace emulator
inline void load_transposed(u32 (&r)[4], u32 at) {
  emulator::Tiles mine{at, {}};
  emulator::move_tiles<false, true>(mine);
  std::memcpy(r, mine.r, sizeof r);
}
inline void load_transposed(u32 (&r)[4], const unsigned short* p) {
  load_transposed(r, (u32)emulator::offset_of(p, 16));
}
inline void store_transposed(u32 at, u32 a, u32 b, u32 c, u32 d) {
  emulator::Tiles mine{at, {a, b, c, d}};
  emulator::move_tiles<true, true>(mine);
}
inline void store_matrix(u32 at, u32 a, u32 b, u32 c, u32 d) {
  emulator::Tiles mine{at, {a, b, c, d}};
  emulator::move_tiles<true, false>(mine);
}
