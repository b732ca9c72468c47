// A block of threads on the host: a fiber for every thread, block barriers and warp collectives by
// rendezvous, one block at a time. It finds barriers that some threads never reach, lanes of a warp
// in different collectives, shared memory that is read before it was written (it starts as NaN) or
// outside its bounds, races between threads in shared memory, and, through other orders of threads,
// results that depend on the order.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "fibers.h"

typedef uint32_t u32;
typedef long long i64;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace emulator {

struct Fiber {
  Context context;
  dim3 index;
  int linear = 0;
  bool done = false;
};
struct Warp {
  int arrived = 0, alive = 0;
  unsigned generation = 0, syncs = 0;
  const void* site = nullptr;
  void* slot[32] = {};
};
// Who touched a word of shared memory last, and how many barriers had come by then.
struct Word {
  int writer = -1, reader = -1;
  unsigned write_block = 0, write_warp = 0, read_block = 0, read_warp = 0;
};
// It has exactly the bytes that were asked for, so that AddressSanitizer sees every step outside.
struct Shared {
  unsigned char* data = nullptr;
  size_t size = 0;
  ~Shared() { ::operator delete(data, std::align_val_t(128)); }
  void resize(size_t bytes) {
    data = (unsigned char*)::operator new(bytes, std::align_val_t(128));
    size = bytes;
    std::memset(data, 0xff, size);  // NaN in every format
  }
};
struct Block {
  dim3 index, size, grid;
  Shared shared;
  std::vector<Word> words;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<int> order;
  int arrived = 0, alive = 0;
  unsigned generation = 0;
  bool progress = false;
  Context scheduler;
  const std::function<void()>* body = nullptr;
  std::string error;
  std::string without;  // the barrier that a mutation leaves out
};
inline std::set<std::string> visited;  // barriers
inline Block* current_block = nullptr;
inline Fiber* current = nullptr;
inline Block& block() { return *current_block; }
inline Fiber& me() { return *current; }
inline Warp& warp() { return block().warps[me().linear / 32]; }
inline void yield() {
  Fiber* f = current;
  Context::swap(f->context, block().scheduler);
}
[[noreturn]] inline void fail(const std::string& what) {
  Block& b = block();
  if (b.error.empty())
    b.error = what + " (block " + std::to_string(b.index.x) + ", thread " +
              std::to_string(me().linear) + ")";
  while (true) yield();
}

// All living lanes of the warp meet at one site. The last to come runs op for all of them.
template <class Op>
void meet(void* mine, const void* site, Op&& op) {
  Warp& w = warp();
  if (w.arrived == 0)
    w.site = site;
  else if (w.site != site)
    fail("lanes of one warp met in different collectives");
  w.slot[me().linear % 32] = mine;
  block().progress = true;
  if (++w.arrived == w.alive) {
    op(w.slot);
    w.arrived = 0;
    ++w.generation;
  } else {
    for (const unsigned g = w.generation; w.generation == g;) yield();
  }
}

inline void sync_all() {
  Block& b = block();
  b.progress = true;
  if (++b.arrived == b.alive) {
    b.arrived = 0;
    ++b.generation;
  } else {
    for (const unsigned g = b.generation; b.generation == g;) yield();
  }
}

inline bool unordered(const Block& b, const Warp& w, int mine, int other, unsigned age_block,
                      unsigned age_warp) {
  if (other == -1 || other == mine || age_block != b.generation) return false;
  return other == -2 || other / 32 != mine / 32 || age_warp == w.syncs;
}
inline void touch(const void* p, size_t bytes, bool write, int thread) {
  Block& b = block();
  Warp& w = b.warps[thread / 32];
  const size_t offset = (const unsigned char*)p - b.shared.data;
  if ((const unsigned char*)p < b.shared.data || offset + bytes > b.shared.size)
    fail("outside of shared memory");
  for (size_t i = offset / 4; i < (offset + bytes + 3) / 4; ++i) {
    Word& word = b.words[i];
    if (unordered(b, w, thread, word.writer, word.write_block, word.write_warp))
      fail(write ? "race in shared memory: write after write"
                 : "race in shared memory: read after write");
    if (write && unordered(b, w, thread, word.reader, word.read_block, word.read_warp))
      fail("race in shared memory: write after read");
    if (write) {
      word.writer = thread;
      word.write_block = b.generation;
      word.write_warp = w.syncs;
    } else {
      const bool again =
          word.read_block == b.generation && word.reader != -1 && word.reader != thread;
      word.reader = again && (word.reader == -2 || word.reader / 32 != thread / 32) ? -2 : thread;
      word.read_block = b.generation;
      word.read_warp = w.syncs;
    }
  }
}

inline void entry() {
  Fiber* f = current;
  (*block().body)();
  Block& b = block();
  Warp& w = b.warps[f->linear / 32];
  f->done = b.progress = true;
  --w.alive;
  --b.alive;
  if (w.arrived && w.arrived == w.alive)
    b.error = "a lane ended while its warp waits in a collective";
  if (b.arrived && b.alive && b.arrived == b.alive)
    b.error = "a thread ended while its block waits at a barrier";
  while (true) yield();
}

// Order 0 runs threads as they are numbered and 1 in reverse. Others are seeds, by which warps and
// the lanes in them are shuffled.
struct Options {
  unsigned order = 0;
  size_t shared = 0;
  std::string without;
};

inline void run(Block& b, const std::function<void()>& body, const Options& o) {
  const int threads = b.size.x;
  b.fibers.resize(threads);
  b.warps.resize((threads + 31) / 32);
  b.alive = threads;
  b.body = &body;
  b.without = o.without;
  b.shared.resize(o.shared);
  b.words.resize((o.shared + 3) / 4);
  b.order.resize(threads);
  for (int i = 0; i < threads; ++i) {
    Fiber& f = b.fibers[i];
    f.linear = i;
    f.index = {(unsigned)i, 0, 0};
    ++b.warps[i / 32].alive;
    f.context.start(stack_of(i), kStack, entry);
    b.order[i] = o.order == 1 ? threads - 1 - i : i;
  }
  if (o.order > 1) {
    std::mt19937 random(o.order);
    std::vector<int> warps(b.warps.size());
    for (size_t i = 0; i < warps.size(); ++i) warps[i] = (int)i;
    std::shuffle(warps.begin(), warps.end(), random);
    size_t n = 0;
    for (int w : warps) {
      const size_t start = n;
      for (int i = w * 32; i < std::min(threads, w * 32 + 32); ++i) b.order[n++] = i;
      std::shuffle(b.order.begin() + start, b.order.begin() + n, random);
    }
  }
  while (b.alive && b.error.empty()) {
    b.progress = false;
    for (size_t k = 0; k < b.order.size() && b.error.empty(); ++k) {
      Fiber& f = b.fibers[b.order[k]];
      if (f.done) continue;
      current = &f;
      Context::swap(b.scheduler, f.context);
    }
    if (!b.progress && b.alive && b.error.empty())
      b.error = "threads wait at barriers that nobody can complete";
  }
  current = nullptr;
}

inline void launch(unsigned grid, unsigned threads, const Options& o,
                   const std::function<void()>& body) {
  for (unsigned i = 0; i < grid; ++i) {
    auto b = std::make_unique<Block>();
    b->index = {i, 0, 0};
    b->size = {threads, 1, 1};
    b->grid = {grid, 1, 1};
    current_block = b.get();
    run(*b, body, o);
    current_block = nullptr;
    if (!b->error.empty()) throw std::runtime_error(b->error);
  }
}

}  // namespace emulator
