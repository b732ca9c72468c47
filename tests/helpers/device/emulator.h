// What stands for CUDA where csrc/device is compiled for the host: the indices of a thread,
// barriers, access to shared memory, and functions of single numbers.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>

#include "block.h"
#include "tensor_cores.h"

#define SEQCONV_EMULATED
#define SEQCONV_DEVICE inline
#define SEQCONV_SHARED(name) unsigned char* name = emulator::block().shared.data

struct alignas(16) uint4 {
  u32 x, y, z, w;
};

#define threadIdx (emulator::me().index)
#define blockIdx (emulator::block().index)
#define blockDim (emulator::block().size)
#define gridDim (emulator::block().grid)

// Whether a mutation leaves this barrier out. Barriers are known by their place in the source.
inline bool left_out(const char* file, int line) {
  const char* slash = std::strrchr(file, '/');
  const std::string site = std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
  emulator::visited.insert(site);
  return site == emulator::block().without;
}
inline void sync_block(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (!left_out(file, line)) emulator::sync_all();
}
inline void sync_warp(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static const char here = 0;
  if (left_out(file, line)) return;
  emulator::meet(nullptr, &here, [](void**) { ++emulator::warp().syncs; });
}
inline void keep_order() {}
inline int keep_here(int x) { return x; }
inline int log2_of(int power) { return 31 - __builtin_clz(power); }
inline float shuffle_xor(float x, int lanes) {
  static const char here = 0;
  struct Op {
    float in, out;
    int lanes;
  } op{x, 0.f, lanes};
  emulator::meet(&op, &here, [](void** slots) {
    for (int i = 0; i < 32; ++i)
      ((Op*)slots[i])->out = ((Op*)slots[i ^ ((Op*)slots[i])->lanes])->in;
  });
  return op.out;
}

template <class T>
void store_shared(T* p, T value) {
  emulator::touch(p, sizeof value, true, emulator::me().linear);
  *p = value;
}
template <class T>
T load_shared(const T* p) {
  emulator::touch(p, sizeof *p, false, emulator::me().linear);
  return *p;
}

inline float __int_as_float(int x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline void sincospi(double x, double* sine, double* cosine) {
  *sine = std::sin(M_PI * x);
  *cosine = std::cos(M_PI * x);
}
inline int __float_as_int(float x) {
  int y;
  std::memcpy(&y, &x, 4);
  return y;
}
