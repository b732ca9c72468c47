// Instructions that the lanes of a warp carry out together: shuffles, matrix loads and stores,
// matrix products
// ("bar.warp.sync", "shfl.sync", "redux.sync", "ldmatrix", "stmatrix", "mma.sync.aligned").
#pragma once
#include "memory.h"
#include "numbers.h"

inline void warp_sync(u8*, Instruction&, u32) {
  ++machine.warp_time;
}  // orders memory, as the others do not

// shfl.idx and shfl.bfly: c holds a clamp in bits 0 to 4 and, in bits 8 to 12, the mask of the lane
// bits that name a segment.
template <bool kButterfly>
void shuffle(u8* frame, Instruction& i, u32 lanes) {
  u32 value[32], inside = 0;
  std::memcpy(value, lanes_of<u32>(frame, i.a), sizeof value);
  each_lane(lanes, [&](int lane) {
    const u32 by = lanes_of<u32>(frame, i.b)[lane] & 31, c = lanes_of<u32>(frame, i.c)[lane];
    const u32 segment = c >> 8 & 31, last = ((u32)lane & segment) | ((c & 31) & ~segment);
    u32 from = kButterfly ? (u32)lane ^ by : ((u32)lane & segment) | (by & ~segment);
    if (from <= last)
      inside |= 1u << lane;
    else
      from = (u32)lane;
    if (!(lanes >> from & 1)) throw Fault{lane, "shfl from a lane that takes no part"};
    lanes_of<u32>(frame, i.d)[lane] = value[from];
  });
  if (i.second_result >= 0) set_lanes(predicate(frame, i.second_result), inside, lanes);
}
inline void reduce_max(u8* frame, Instruction& i, u32 lanes) {
  u32 top = 0;
  each_lane(lanes, [&](int lane) { top = std::max(top, lanes_of<u32>(frame, i.a)[lane]); });
  each_lane(lanes, [&](int lane) { lanes_of<u32>(frame, i.d)[lane] = top; });
}

// Lane 8 m + r gives the address of row r of matrix m; lane 4 r + w holds word w of row r, or of
// column r with .trans. So it is not the lane that gives an address that reads there or writes.
template <bool kTransposed>
u16& element(u16 (&matrix)[8][8], int lane, int half) {
  const int r = lane >> 2, c = 2 * (lane & 3) + half;
  return kTransposed ? matrix[c][r] : matrix[r][c];
}
inline u8* row_of_matrix(u8* frame, Instruction& i, int lane, bool write) {
  const u64 address = address_in(frame, i.address, lane);
  machine.together = true;
  u8* const row = resolve<Space::kShared>(address, 16, lane, write, i);
  machine.together = false;
  return row;
}
template <bool kTransposed>
void load_matrices(u8* frame, Instruction& i, u32) {
  u32 result[4][32];
  for (int m = 0; m < i.count; ++m) {
    u16 matrix[8][8];
    for (int r = 0; r < 8; ++r) {
      const int lane = 8 * m + r;
      std::memcpy(matrix[r], row_of_matrix(frame, i, lane, false), 16);
    }
    for (int lane = 0; lane < 32; ++lane)
      result[m][lane] =
          element<kTransposed>(matrix, lane, 0) | (u32)element<kTransposed>(matrix, lane, 1) << 16;
  }
  for (int m = 0; m < i.count; ++m) std::memcpy(frame + i.elements[m], result[m], 128);
}
template <bool kTransposed>
void store_matrices(u8* frame, Instruction& i, u32) {
  for (int m = 0; m < i.count; ++m) {
    u16 matrix[8][8];
    const u32* x = lanes_of<u32>(frame, i.elements[m]);
    for (int lane = 0; lane < 32; ++lane)
      for (int half = 0; half < 2; ++half)
        element<kTransposed>(matrix, lane, half) = (u16)(x[lane] >> (16 * half));
    for (int r = 0; r < 8; ++r) {
      const int lane = 8 * m + r;
      std::memcpy(row_of_matrix(frame, i, lane, true), matrix[r], 16);
    }
  }
}
// movmatrix.trans: from one lane to another, as a store and a transposed load would.
inline void transpose_matrix(u8* frame, Instruction& i, u32) {
  u16 matrix[8][8];
  for (int lane = 0; lane < 32; ++lane)
    for (int half = 0; half < 2; ++half)
      element<false>(matrix, lane, half) = (u16)(lanes_of<u32>(frame, i.a)[lane] >> (16 * half));
  for (int lane = 0; lane < 32; ++lane)
    lanes_of<u32>(frame, i.d)[lane] =
        element<true>(matrix, lane, 0) | (u32)element<true>(matrix, lane, 1) << 16;
}

// ---- mma.m16n8k16 ----
// "Matrix Fragments for mma.m16n8k16 with floating point type": with group g = lane / 4 and thread
// t = lane % 4, every register of two 16-bit numbers holds row g (+ 8) and columns 2 t, 2 t + 1 (+
// 8); of b, rows 2 t, 2 t + 1 of column g.
enum Operand { kHalf, kBrain, kFloat };
struct Tile {
  float at[8][8];  // [g][2 t + half]
};
template <Operand kType>
Tile tile_of(const u8* registers) {
  Tile tile;
  for (int e = 0; e < 64; ++e) {
    const u16 x = ((const u16*)registers)[e];
    tile.at[e / 8][e % 8] = kType == kBrain ? brain_to_float(x) : half_to_float(x);
  }
  return tile;
}
// A sum of which the bits below the 24th of the largest term are cut off, and then those below the
// 24th of the sum: no tensor core is known to keep fewer.
inline double cut_sum(const double* x, int n) {
  int top = INT32_MIN;
  double sum = 0;
  for (int i = 0; i < n; ++i) {
    sum += x[i];
    if (x[i] != 0) top = std::max(top, std::ilogb(x[i]));
  }
  if (top == INT32_MIN || !std::isfinite(sum)) return sum;
  const auto cut = [](double y, int exponent) {
    return std::ldexp(std::trunc(std::ldexp(y, 23 - exponent)), exponent - 23);
  };
  sum = 0;
  for (int i = 0; i < n; ++i) sum += cut(x[i], top);
  return sum == 0 ? 0 : cut(sum, std::ilogb(sum));
}
// The ISA leaves open how the 17 terms are rounded; Launch::mma chooses.
template <bool kFloatSums>
void accumulate(float (&c)[16][8], const float (&a)[16][16], const float (&b)[16][8]) {
  if (machine.launch.mma == 1) {
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 16; ++k)
        for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
    return;
  }
  for (int i = 0; i < 16; ++i) {
    if (machine.launch.mma == 0) {
      double sum[8];
      for (int j = 0; j < 8; ++j) sum[j] = c[i][j];
      for (int k = 0; k < 16; ++k)
        for (int j = 0; j < 8; ++j) sum[j] += (double)a[i][k] * (double)b[k][j];
      for (int j = 0; j < 8; ++j) c[i][j] = kFloatSums ? (float)sum[j] : rounded_to_odd(sum[j]);
      continue;
    }
    for (int j = 0; j < 8; ++j)
      for (int half = 0; half < 2; ++half) {
        double x[9] = {c[i][j]};
        for (int k = 0; k < 8; ++k)
          x[1 + k] = (double)a[i][8 * half + k] * (double)b[8 * half + k][j];
        const float sum = (float)cut_sum(x, 9);
        c[i][j] = kFloatSums ? sum : half_to_float(float_to_half(sum));
      }
  }
}
// Elements 0 to 3 are d, 4 to 7 a, 8 and 9 b, 12 to 15 c; with sums in fp16 two registers of d and
// of c.
template <bool kFloatSums, Operand kType>
void multiply(u8* frame, Instruction& i, u32) {
  float a[16][16], b[16][8], c[16][8];
  for (int q = 0; q < 4; ++q) {  // a0: rows g; a1: g + 8; a2 and a3: columns + 8
    const Tile tile = tile_of<kType>(frame + i.elements[4 + q]);
    for (int g = 0; g < 8; ++g) std::memcpy(&a[g + 8 * (q & 1)][8 * (q >> 1)], tile.at[g], 32);
  }
  for (int q = 0; q < 2; ++q) {  // b0: rows 2 t, 2 t + 1; b1: rows + 8
    const Tile tile = tile_of<kType>(frame + i.elements[8 + q]);
    for (int g = 0; g < 8; ++g)
      for (int k = 0; k < 8; ++k) b[8 * q + k][g] = tile.at[g][k];
  }
  if (kFloatSums) {  // c0, c1: row g; c2, c3: row g + 8
    for (int q = 0; q < 4; ++q)
      for (int lane = 0; lane < 32; ++lane)
        c[(lane >> 2) + 8 * (q >> 1)][2 * (lane & 3) + (q & 1)] =
            lanes_of<float>(frame, i.elements[12 + q])[lane];
    accumulate<true>(c, a, b);
    for (int q = 0; q < 4; ++q)
      for (int lane = 0; lane < 32; ++lane)
        lanes_of<float>(frame, i.elements[q])[lane] =
            c[(lane >> 2) + 8 * (q >> 1)][2 * (lane & 3) + (q & 1)];
    return;
  }
  for (int q = 0; q < 2; ++q) {
    const Tile tile = tile_of<kHalf>(frame + i.elements[12 + q]);
    std::memcpy(c[8 * q], tile.at, sizeof tile.at);
  }
  accumulate<false>(c, a, b);
  for (int q = 0; q < 2; ++q)
    for (int e = 0; e < 64; ++e)
      lanes_of<u16>(frame, i.elements[q])[e] = float_to_half(c[8 * q + e / 8][e % 8]);
}
