// What stands for CUDA where csrc/device is compiled for the host: the indices of a thread,
// barriers, access to shared memory, and functions of single numbers.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>

#include "asynchronous.h"
#include "tensor_cores.h"

#define SEQCONV_EMULATED
#define SEQCONV_DEVICE inline
#define SEQCONV_SHARED(name) unsigned char* name = emulator::block().shared.data

#define threadIdx (emulator::me().index)
#define blockIdx (emulator::block().index)
#define blockDim (emulator::block().size)
#define gridDim (emulator::block().grid)

// Whether a mutation leaves this barrier or wait out. They are known by their place in the source.
inline bool left_out(const char* file, int line) {
  const char* slash = std::strrchr(file, '/');
  const std::string site = std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
  emulator::visited.insert(site);
  return site == emulator::block().options.without;
}
inline void sync_block(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (!left_out(file, line)) emulator::sync(0, (int)blockDim.x);
}
inline void named_barrier(int id, int threads, const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
  if (id < 1 || id > 15 || threads <= 0 || threads % 32 || threads > (int)blockDim.x)
    emulator::fail("no such barrier: " + std::to_string(id) + " of " + std::to_string(threads));
  if (!left_out(file, line)) emulator::sync(id, threads);
}
inline void sync_warp(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static const char here = 0;
  if (left_out(file, line)) return;
  emulator::meet(nullptr, &here, [](void**) { ++emulator::warp().syncs; });
}

// What the innermost functions of csrc/device/mma.cuh do with addresses in shared memory, in bytes
// from its beginning.
inline u32 shared_address(const void* p) { return (u32)emulator::offset_of(p, 0); }
template <class T>
T load_at(u32 at) {
  T value;
  std::memcpy(&value, emulator::aligned_at(at, sizeof value, false), sizeof value);
  return value;
}
template <class T>
void store_at(u32 at, T value) {
  std::memcpy(emulator::aligned_at(at, sizeof value, true), &value, sizeof value);
}
inline u32 load1(u32 at) { return load_at<u32>(at); }
inline uint2 load2(u32 at) { return load_at<uint2>(at); }
inline uint4 load4(u32 at) { return load_at<uint4>(at); }
inline unsigned short load_short(u32 at) { return load_at<unsigned short>(at); }
inline void store1(u32 at, u32 v) { store_at(at, v); }
inline void store4(u32 at, uint4 v) { store_at(at, v); }
inline void store_short(u32 at, unsigned short v) { store_at(at, v); }
inline void copy_piece(u32 to, const void* from) { emulator::copy(to, from, 16); }
inline void copy_piece(u32 to, const void* from, int bytes) { emulator::copy(to, from, bytes); }
inline void end_of_group() { emulator::end_of_group(); }
template <int kLater>
void await(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (!left_out(file, line)) emulator::await(kLater);
}

inline void keep(u32&) {}
inline void keep(int&) {}
inline void keep_order() {}
inline int keep_here(int x) { return x; }
inline float fused(float a, float b, float c) { return a * b + c; }
inline int log2_of(int power) { return 31 - __builtin_clz(power); }
template <class T>
T shuffle_xor(T x, int lanes) {
  static const char here = 0;
  struct Op {
    T in, out;
    int lanes;
  } op{x, T(0), lanes};
  emulator::meet(&op, &here, [](void** slots) {
    for (int i = 0; i < 32; ++i)
      ((Op*)slots[i])->out = ((Op*)slots[i ^ ((Op*)slots[i])->lanes])->in;
  });
  return op.out;
}
inline u32 warp_max(u32 x) {
  static const char here = 0;
  emulator::meet(&x, &here, [](void** slots) {
    u32 top = 0;
    for (int i = 0; i < 32; ++i) top = std::max(top, *(u32*)slots[i]);
    for (int i = 0; i < 32; ++i) *(u32*)slots[i] = top;
  });
  return x;
}

template <class T>
void store_shared(T* p, T value) {
  emulator::touch(p, sizeof value, true);
  *p = value;
}
template <class T>
T load_shared(const T* p) {
  emulator::touch(p, sizeof *p, false);
  return *p;
}

inline float __int_as_float(int x) { return emulator::bits_as<float>(x); }
inline float __uint_as_float(u32 x) { return emulator::bits_as<float>(x); }
inline int __float_as_int(float x) { return emulator::bits_as<int>(x); }
inline u32 __float_as_uint(float x) { return emulator::bits_as<u32>(x); }
inline void sincospi(double x, double* sine, double* cosine) {
  *sine = std::sin(M_PI * x);
  *cosine = std::cos(M_PI * x);
}
