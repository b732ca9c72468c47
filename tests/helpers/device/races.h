// Who touched shared memory, and races there. Two accesses race if one of them writes, no chain of
// barriers leads from one to the other and, in one warp, no barrier lies between them (other
// collectives order nothing). Every warp has a vector clock, which barriers join.
#pragma once
#include <string>

#include "block.h"

namespace emulator {

// What a thread does now, or all lanes of its warp together.
inline Access access_of(int thread, bool together = false) {
  const Warp& w = block().warps[thread / 32];
  return {thread / 32, together ? -1 : thread, w.clock[thread / 32], w.syncs};
}
// Whether the access lies before what is done now.
inline bool before(const Access& a, const Access& now) {
  if (a.clock == 0 || (a.thread == now.thread && a.thread != -1)) return true;
  return a.warp == now.warp ? a.syncs != now.syncs
                            : block().warps[now.warp].clock[a.warp] >= a.clock;
}
inline void after_write(const Word& word, const Access& now, const char* what) {
  const auto race = [&](const char* other) {
    fail("race in shared memory: " + std::string(what) + other);
  };
  if (word.copy >= 0) race(" of what an asynchronous copy writes, which nobody waited for");
  if (!before(word.write, now)) race(" after write");
}
inline Access* reads_of(const Word& word) {
  Block& b = block();
  return &b.reads[(size_t)(&word - b.words.data()) * b.warps.size()];
}
inline void after_reads(const Word& word, const Access& now, const char* what) {
  const Access* reads = reads_of(word);
  for (u32 warps = word.readers; warps; warps &= warps - 1)
    if (!before(reads[__builtin_ctz(warps)], now))
      fail("race in shared memory: " + std::string(what) + " after read");
}
inline size_t offset_of(const void* p, size_t bytes) {
  const Shared& s = block().shared;
  const size_t offset = (const unsigned char*)p - s.data;
  if ((const unsigned char*)p < s.data || offset + bytes > s.size) fail("outside of shared memory");
  return offset;
}
template <class F>
void each_word(size_t offset, size_t bytes, F&& f) {
  for (size_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i) f(block().words[i]);
}
inline void touch(const void* p, size_t bytes, bool write, const Access& now) {
  each_word(offset_of(p, bytes), bytes, [&](Word& word) {
    after_write(word, now, write ? "write" : "read");
    if (write) {
      after_reads(word, now, "write");
      word.write = now, word.readers = 0;
      return;
    }
    Access& read = reads_of(word)[now.warp];
    const bool again = (word.readers >> now.warp & 1) && read.syncs == now.syncs;
    const bool several = again && read.thread != now.thread;
    read = now;
    if (several) read.thread = -1;
    word.readers |= 1u << now.warp;
  });
}
inline void touch(const void* p, size_t bytes, bool write) {
  touch(p, bytes, write, access_of(me().linear));
}

}  // namespace emulator
