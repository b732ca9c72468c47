// What differs between the compilers of device code: NVRTC, nvcc, and g++ for the tests' emulator,
// which defines SEQCONV_EMULATED and everything below itself. No header of CUDA or of the standard
// library is included anywhere here, so that NVRTC needs no include path.
#pragma once

struct bf16 {
  unsigned short bits;
};
struct fp16 {
  unsigned short bits;
};

#ifndef SEQCONV_EMULATED
#define SEQCONV_DEVICE __device__ __forceinline__
#define SEQCONV_KERNEL(threads, blocks) \
  extern "C" __global__ void __launch_bounds__(threads, blocks)
#define SEQCONV_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

typedef unsigned int u32;
typedef long long i64;

SEQCONV_DEVICE void sync_block() { __syncthreads(); }
SEQCONV_DEVICE void sync_warp() { __syncwarp(); }
// Loads below stay below: hoisted, those of a whole butterfly would not fit in registers.
SEQCONV_DEVICE void keep_order() { asm volatile("" ::: "memory"); }
// x; what follows from it is computed below as well: hoisted out of a branch that few take, it
// would cost all others registers.
SEQCONV_DEVICE int keep_here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
SEQCONV_DEVICE float shuffle_xor(float x, int lanes) {
  return __shfl_xor_sync(0xffffffffu, x, lanes);
}
SEQCONV_DEVICE double shuffle_xor(double x, int lanes) {
  const int high = __shfl_xor_sync(0xffffffffu, __double2hiint(x), lanes);
  return __hiloint2double(high, __shfl_xor_sync(0xffffffffu, __double2loint(x), lanes));
}

// a b + c, rounded once. Where compilers choose which product to fuse, a kernel that knows more
// does not give the same bits.
SEQCONV_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
SEQCONV_DEVICE int log2_of(int power) { return 31 - __clz(power); }

// Every access to shared memory goes through these two (the emulator looks for races there).
template <class T>
SEQCONV_DEVICE void store_shared(T* p, T value) {
  *p = value;
}
template <class T>
SEQCONV_DEVICE T load_shared(const T* p) {
  return *p;
}

SEQCONV_DEVICE float to_float(float x) { return x; }
SEQCONV_DEVICE float to_float(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
SEQCONV_DEVICE float to_float(fp16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
SEQCONV_DEVICE void from_float(float& y, float x) { y = x; }
SEQCONV_DEVICE void from_float(bf16& y, float x) {
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  const u32 bits = __float_as_uint(x);
  y.bits = x != x ? 0x7fff : (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}
SEQCONV_DEVICE void from_float(fp16& y, float x) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
}
#endif
