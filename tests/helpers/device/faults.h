// Small programs of one block of four warps, each of them right or, where it is broken, with one
// fault that the emulator must find.
#pragma once
#include "emulator.h"

namespace faults {

inline void expect(bool right) {
  if (!right) emulator::fail("another value");
}
inline void numbers(bool broken) {
  using Brain = Format<bf16>;
  const u32 a = pack(1, 2), b = pack(3, -5);
  expect((broken ? sub2(b, a) : add2(a, b)) == pack(4, -3) && sub2(a, b) == pack(-2, 7));
  expect(byte_perm(0x33221100, 0x77665544, 0x7610) == 0x77661100);
  expect(byte_perm(0x83221100, 0x77665544, 0xb) == 0x00000083);  // without the sign
  const u32 x = Brain::pack(3, -0.5f), y = Brain::pack(-1.0078125f, 4);
  expect(x == 0xbf004040 && Brain::low(x) == 3 && Brain::high(x) == -0.5f);
  expect(Brain::mul(x, y) == Brain::pack(-3.03125f, -2));  // 3.0234375 lies between, and is even
  expect(Brain::larger(x, y) == Brain::pack(-3, -4));
  expect(Brain::larger(0x7fc0ffc0, y) == Brain::pack(1.0078125f, 4));  // NaN loses
  expect(Format<fp16>::larger(a, b) == pack(3, -5));
  expect(Format<fp16>::larger(pack(__int_as_float(0x7f800000), 0), 0x7e007e00) == 0x00007c00);
  expect(Brain::kBias == 127 && Brain::kExponents == 255 && Brain::kMantissa == 7);
  expect(Format<fp16>::kBias == 15 && Format<fp16>::kExponents == 31);
  expect(warp_max(threadIdx.x % 32 * 3) == 93);
}
inline void program(int which, bool broken) {
  const u32 thread = threadIdx.x, own = 4 * thread, warp = thread / 32;
  alignas(16) static const u32 given[4 * 128] = {5, 6, 7, 8};
  const u32* mine = given + 4 * (thread % 2);
  const auto ask = [&] { copy_piece(16 * thread, mine), end_of_group(); };
  switch (which) {
    case 0:
      return store1(broken ? 0 : own, thread);
    case 1:
      store1(own, thread);
      if (!broken) sync_block();
      return expect(load1(own ^ 128) == (thread ^ 32) || broken);
    case 2:
      store1(own, thread);
      sync_block();
      load1(own ^ 128);
      if (!broken) sync_block();
      return store1(own, 1);
    case 3:
      return store1(own + (broken ? 2048 - 256 : 0), 1);
    case 4:
      if (!broken || thread < 40) sync_block();
      return;
    case 5:
      if (broken && thread % 32 < 16)
        sync_warp();
      else
        shuffle_xor(1.f, broken ? 16 : 1);
      return;
    case 6:  // lanes of a warp
      store1(own, thread);
      if (broken)
        warp_max(1);  // orders nothing
      else
        sync_warp();
      return expect(load1(own ^ 4) == (thread ^ 1) || broken);
    case 7:  // two barriers, each of two warps
      store1(own, thread);
      named_barrier(1 + warp / 2, 64);
      return expect(load1(own ^ (broken ? 256 : 128)) == (thread ^ 32) || broken);
    case 8:  // from warp 0 to warp 1, and from there to warp 2
      if (warp == 0) store1(own, thread);
      if (warp < 2 && !broken) named_barrier(1, 64);
      if (warp == 1 || warp == 2) named_barrier(2, 64);
      if (warp < 2 && broken) named_barrier(1, 64);
      if (warp == 2) expect(load1(own - 256) == thread - 64 || broken);
      return;
    case 9:
      return named_barrier(broken ? 1 + thread % 2 : 1, 128);
    case 10:
      return named_barrier(1, broken && warp == 0 ? 64 : 128);
    case 11:
      return named_barrier(broken ? 0 : 1, 128);
    case 12:
      return named_barrier(1, broken ? 96 : 128);
    case 13:  // neighbours of two bytes
      store_short(2 * (broken ? thread / 2 : thread), (unsigned short)thread);
      return;
    case 14:
      ask();
      if (!broken) await<0>();
      load1(16 * thread);
      return await<0>();
    case 15:  // waits for all but the last
      ask();
      broken ? await<1>() : await<0>();
      expect(load1(16 * thread) == (thread % 2 ? 0 : 5));
      return await<0>();
    case 16:  // no group, for which nobody can wait
      copy_piece(16 * thread, mine);
      if (!broken) end_of_group();
      await<0>();
      expect(load1(16 * thread) == (thread % 2 ? 0 : 5));
      end_of_group();
      return await<0>();
    case 17:  // of another thread
      ask(), await<0>();
      if (!broken) sync_block();
      return expect(load1(16 * (thread ^ 32)) == (thread % 2 ? 0 : 5) || broken);
    case 18:
      ask();
      if (!broken) await<0>();
      return store1(16 * thread, 1), await<0>();
    case 19:  // a copy to where others still read
      ask(), await<0>(), sync_block();
      load1(16 * (thread ^ 32));
      if (!broken) sync_block();
      return ask(), await<0>();
    case 20:
      ask();
      return broken ? void() : await<0>();
    case 21:  // bytes that are not asked for become zero
      copy_piece(16 * thread, given, broken ? 12 : 8), end_of_group(), await<0>();
      return expect(load4(16 * thread).y == 6 && load4(16 * thread).z == 0);
    case 22:
      return copy_piece(16 * thread + 8 * broken, mine), end_of_group(), await<0>();
    case 23:
      load2(own - own % 8), load4(own - own % 16 + 8 * broken);
      return;
    case 24:
    case 25: {
      const u32 at = 16 * (thread % 32) + 512 * warp;
      u32 r[4], x[4];
      for (u32 i = 0; i < 4; ++i) x[i] = (4 * thread + i) | (1000 + 4 * thread + i) << 16;
      (which == 24) != broken ? store_transposed(at, x[0], x[1], x[2], x[3])
                              : store_matrix(at, x[0], x[1], x[2], x[3]);
      sync_warp();
      load_transposed(r, at);
      for (u32 i = 0; i < 4; ++i)  // as they were stored, or words in the order of rows
        expect((which == 24 ? r[i] : load1(512 * warp + 128 * i + 4 * (thread % 32))) == x[i]);
      return;
    }
    case 26: {  // tiles change their place between lanes that give the same addresses
      const u32 at = 16 * (thread % 32) + 512 * warp;
      u32 r[4];
      store4(at, uint4{});
      sync_warp();
      load_transposed(r, at);
      if (!broken) sync_warp();
      return store_matrix(at, r[0], r[1], r[2], r[3]);
    }
    case 27: {
      const u32 a[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};  // bf16 ones
      float d[4] = {1, 2, 3, 4}, e[4] = {1, 2, 3, 4};
      u32 h[2] = {7, 7};
      broken ? mma_of<fp16>(d, a, 0x40004000, 0) : mma_of<bf16>(d, a, 0x40004000, 0);
      expect(d[0] == 17 && d[1] == 18 && d[2] == 19 && d[3] == 20);
      mma_first(e, a, 0x40004000, 0), mma_first(h, a, 0x40004000, 0);  // fp16: 1.875 times 2
      return expect(e[0] == 30 && e[3] == 30 && h[0] == pack(30, 30) && h[1] == h[0]);
    }
    case 28:
      return numbers(broken);
    default:
      emulator::fail("no such program");
  }
}

}  // namespace faults
