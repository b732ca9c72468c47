// Instructions for numbers of 16 bits, one function each: products of matrices on tensor cores,
// loads and stores of their fragments, pairs of numbers, copies that go on by themselves, and
// barriers for a part of a block (PTX ISA). Fragments are those of mma.m16n8k16: a lane's group is
// lane / 4, its thread in the group lane % 4.
//
// Addresses are bytes of shared memory, since a pointer would take two registers.
#pragma once
#include "compat.cuh"

#ifndef SEQCONV_EMULATED
SEQCONV_DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// d += a b with sums in fp16, whose packed result has the place of an operand
SEQCONV_DEVICE void mma(u32 (&d)[2], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%0,%1};"
      : "+r"(d[0]), "+r"(d[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// d = a b
SEQCONV_DEVICE void mma_first(u32 (&d)[2], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%8,%8};"
      : "=r"(d[0]), "=r"(d[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(0));
}
// The same with sums in float32.
SEQCONV_DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
SEQCONV_DEVICE void mma_first(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%10,%10,%10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
}
// The same of operands of type T.
template <class T>
SEQCONV_DEVICE void mma_of(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1);
template <>
SEQCONV_DEVICE void mma_of<bf16>(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
SEQCONV_DEVICE void mma_of<fp16>(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  mma(d, a, b0, b1);
}

// Four 8 x 8 tiles of 16-bit numbers, transposed: lane 8 m + r gives the address of row r of tile
// m.
SEQCONV_DEVICE void load_transposed(u32 (&r)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
#if __CUDA_ARCH__ >= 900
SEQCONV_DEVICE void store_transposed(u32 at, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%4], {%0,%1,%2,%3};" ::"r"(a),
               "r"(b), "r"(c), "r"(d), "r"(at)
               : "memory");
}
SEQCONV_DEVICE void store_matrix(u32 at, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%4], {%0,%1,%2,%3};" ::"r"(a), "r"(b),
               "r"(c), "r"(d), "r"(at)
               : "memory");
}
#else
// Before 9.0 there is no such store. A lane has two numbers of row lane / 4 of every tile, and asks
// the lane that knows that row for its address.
SEQCONV_DEVICE void store_matrix(u32 at, u32 a, u32 b, u32 c, u32 d) {
  const u32 words[4] = {a, b, c, d}, lane = threadIdx.x & 31;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const u32 row = __shfl_sync(0xffffffffu, at, 8 * m + (lane >> 2));
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(row + 4 * (lane & 3)), "r"(words[m]) : "memory");
  }
}
SEQCONV_DEVICE u32 transposed(u32 x) {
  u32 y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
SEQCONV_DEVICE void store_transposed(u32 at, u32 a, u32 b, u32 c, u32 d) {
  store_matrix(at, transposed(a), transposed(b), transposed(c), transposed(d));
}
#endif

SEQCONV_DEVICE u32 load1(u32 at) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
  return v;
}
SEQCONV_DEVICE uint2 load2(u32 at) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at) : "memory");
  return v;
}
SEQCONV_DEVICE uint4 load4(u32 at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at)
               : "memory");
  return v;
}
SEQCONV_DEVICE unsigned short load_short(u32 at) {
  unsigned short v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(at) : "memory");
  return v;
}
SEQCONV_DEVICE void store1(u32 at, u32 v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(v) : "memory");
}
SEQCONV_DEVICE void store4(u32 at, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
SEQCONV_DEVICE void store_short(u32 at, unsigned short v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"(v) : "memory");
}

// Pairs of fp16 numbers.
SEQCONV_DEVICE u32 mul2(u32 a, u32 b) {
  u32 d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
SEQCONV_DEVICE u32 fma2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
SEQCONV_DEVICE u32 add2(u32 a, u32 b) {
  u32 d;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
SEQCONV_DEVICE u32 sub2(u32 a, u32 b) {
  u32 d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
SEQCONV_DEVICE u32 negate2(u32 a) {  // which goes into the instruction that uses it, but for mma
  u32 d;
  asm("neg.f16x2 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}
SEQCONV_DEVICE u32 byte_perm(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }

// All lanes of `threads` threads of the block, a multiple of 32, that come to this barrier.
SEQCONV_DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
SEQCONV_DEVICE u32 warp_max(u32 x) {
  u32 y;
  asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(y) : "r"(x));
  return y;
}

// 16 bytes of global memory to shared memory, some time before `await` returns. Of the second kind,
// those beyond `bytes` become zeros and are not read.
SEQCONV_DEVICE void copy_piece(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
SEQCONV_DEVICE void copy_piece(u32 to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
SEQCONV_DEVICE void end_of_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups of this thread's copies but the last kLater.
template <int kLater>
SEQCONV_DEVICE void await() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
}

// x is not computed again where it is used.
SEQCONV_DEVICE void keep(u32& x) { asm volatile("" : "+r"(x)); }
SEQCONV_DEVICE void keep(int& x) { asm volatile("" : "+r"(x)); }

// What differs between the types: two numbers of a word.
template <class T>
struct Format;
template <>
struct Format<bf16> {
  enum { kMantissa = 7, kBias = 127 };
  // The larger one in size; its sign says nothing, and NaN loses.
  static SEQCONV_DEVICE u32 larger(u32 a, u32 b) {
    u32 d;
#if __CUDA_ARCH__ >= 860
    asm("max.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#else
    asm("max.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a & 0x7fff7fffu), "r"(b & 0x7fff7fffu));
#endif
    return d;
  }
  static SEQCONV_DEVICE u32 mul(u32 a, u32 b) {
    u32 d;
#if __CUDA_ARCH__ >= 900
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
#endif
    return d;
  }
  static SEQCONV_DEVICE float low(u32 x) { return __uint_as_float(x << 16); }
  static SEQCONV_DEVICE float high(u32 x) { return __uint_as_float(x & 0xffff0000u); }
  static SEQCONV_DEVICE u32 pack(float x, float y) {
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(y), "f"(x));
    return d;
  }
};
template <>
struct Format<fp16> {
  enum { kMantissa = 10, kBias = 15 };
  static SEQCONV_DEVICE u32 larger(u32 a, u32 b) {
    u32 d;
#if __CUDA_ARCH__ >= 860
    asm("max.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#else
    asm("max.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a & 0x7fff7fffu), "r"(b & 0x7fff7fffu));
#endif
    return d;
  }
  static SEQCONV_DEVICE u32 mul(u32 a, u32 b) { return mul2(a, b); }
  static SEQCONV_DEVICE float low(u32 x) {
    float y;
    asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(y) : "r"(x));
    return y;
  }
  static SEQCONV_DEVICE float high(u32 x) { return low(x >> 16); }
  static SEQCONV_DEVICE u32 pack(float x, float y) {
    u32 d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(y), "f"(x));
    return d;
  }
};
#endif
