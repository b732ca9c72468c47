// Tensor core instructions and pairs of fp16 numbers, one function each (fragment layouts: PTX ISA,
// mma.m16n8k16 and ldmatrix). A lane's group is lane / 4, its thread in the group lane % 4.
#pragma once
#include "radix.cuh"

struct alignas(8) Pair {
  float x, y;
};

#ifndef SEQCONV_EMULATED
SEQCONV_DEVICE u32 pack(float x, float y) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(y), "f"(x));
  return r;
}
SEQCONV_DEVICE Pair unpack(u32 v) {
  Pair p;
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(p.x), "=f"(p.y)
      : "r"(v));
  return p;
}
// d += a (16 x 16) b (16 x 8), in float32: rows group and group + 8 of two neighbouring columns
SEQCONV_DEVICE void mma(Pair (&d)[2], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0].x), "+f"(d[0].y), "+f"(d[1].x), "+f"(d[1].y)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// the same in fp16, whose packed result has the place of an operand
SEQCONV_DEVICE void mma(u32 (&d)[2], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%0,%1};"
      : "+r"(d[0]), "+r"(d[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Four 8 x 8 tiles of 16-bit numbers, transposed; lane i gives the address of row i % 8 of tile i
// / 8.
SEQCONV_DEVICE void load_transposed(u32 (&r)[4], const unsigned short* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"((u32)__cvta_generic_to_shared(p))
               : "memory");
}
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
SEQCONV_DEVICE u32 negate2(u32 a) {  // which goes into the instruction that uses it
  u32 d;
  asm("neg.f16x2 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}
#endif
