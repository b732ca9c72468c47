// A block of threads on the host: a fiber for every thread, barriers and warp collectives by
// rendezvous, one block at a time. It finds barriers that some threads never reach, lanes of a warp
// in different collectives, shared memory that is read before it was written (it starts as NaN) or
// outside its bounds, races between threads in shared memory (races.h), asynchronous copies that
// nobody waits for (asynchronous.h), and, through other orders of threads, results that depend on
// the order.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
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
  unsigned generation = 0;
  const void* site = nullptr;
  void* slot[32] = {};
  int waiting = 0, barrier = 0;  // lanes that wait at a barrier, and at which
  u32 syncs = 0;                 // barriers of any kind that came so far
  u32 clock[32] = {};            // how much of each warp happened before what this one does next
};
struct Barrier {
  int arrived = 0, expected = 0;  // threads
  unsigned generation = 0;
};
// Who touched two bytes of shared memory last, and when.
struct Access {
  int warp, thread;  // thread -1: several of the warp
  u32 clock, syncs;
};
struct Word {
  Access write = {0, -1, 0, 0};  // clock 0: nobody
  u32 readers = 0;  // the warps that have read it since, whose entries are in Block::reads
  int copy = -1;    // the asynchronous copy that writes it
};
// 16 bytes of a thread, on their way from global memory; the last ones may be zeros.
struct Copy {
  size_t to;
  const void* from;
  int bytes, thread;
  bool performed, awaited;
};
struct CopyGroups {  // of a thread
  std::vector<int> open;
  std::deque<std::vector<int>> committed;
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
// Order 0 runs threads as they are numbered and 1 in reverse. Others are seeds, by which warps and
// the lanes in them are shuffled. Asynchronous copies happen at once (copies 0), as late as they
// may (1), or then and in reverse (2).
struct Options {
  unsigned order = 0;
  size_t shared = 0;
  std::string without;  // the barrier or wait that a mutation leaves out
  unsigned copies = 0;
};
struct Block {
  dim3 index, size, grid;
  Options options;
  Shared shared;
  std::vector<Word> words;
  std::unique_ptr<Access[]> reads;  // one for each word and warp
  std::vector<Copy> copies;
  std::vector<CopyGroups> groups;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<int> order;
  int alive = 0;
  Barrier barriers[16];
  bool progress = false;
  Context scheduler;
  const std::function<void()>* body = nullptr;
  std::string error;
};
inline std::set<std::string> visited;  // barriers and waits
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

// All have come: what the barrier's warps did before is then known to each of them.
inline void open_barrier(int id) {
  Block& b = block();
  u32 clock[32] = {};
  const auto each = [&](auto f) {
    for (size_t k = 0; k < b.warps.size(); ++k)
      if (b.warps[k].waiting && b.warps[k].barrier == id) f(b.warps[k], k);
  };
  each([&](Warp& w, size_t) {
    if (w.waiting != w.alive) fail("more threads at a barrier than it counts");
    for (int k = 0; k < 32; ++k) clock[k] = std::max(clock[k], w.clock[k]);
  });
  each([&](Warp& w, size_t k) {
    std::memcpy(w.clock, clock, sizeof clock);
    ++w.clock[k], ++w.syncs, w.waiting = 0;
  });
  b.barriers[id].arrived = 0;
  ++b.barriers[id].generation;
}
// The lane waits at a barrier of so many threads. Barrier 0 is the block's.
inline void sync(int id, int expected) {
  Block& b = block();
  Warp& w = warp();
  Barrier& barrier = b.barriers[id];
  if (w.waiting && w.barrier != id) fail("lanes of one warp at different barriers");
  if (barrier.arrived && barrier.expected != expected) fail("a barrier with two counts");
  b.progress = true;
  w.barrier = id, barrier.expected = expected;
  const unsigned generation = barrier.generation;
  if (++w.waiting == w.alive) {
    barrier.arrived += w.alive;
    if (barrier.arrived == expected) open_barrier(id);
  }
  while (barrier.generation == generation) yield();
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
  if (w.waiting && w.waiting == w.alive) b.error = "a lane ended while its warp waits at a barrier";
  while (true) yield();
}

inline void run(Block& b, const std::function<void()>& body) {
  const Options& o = b.options;
  const int threads = b.size.x;
  b.fibers.resize(threads);
  b.warps.resize((threads + 31) / 32);
  b.alive = threads;
  b.body = &body;
  b.shared.resize(o.shared);
  b.words.resize((o.shared + 1) / 2);
  b.reads.reset(new Access[b.words.size() * b.warps.size()]);
  b.groups.resize(threads);
  for (size_t k = 0; k < b.warps.size(); ++k) b.warps[k].clock[k] = 1;
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
  for (const Copy& c : b.copies)
    if (!c.awaited && b.error.empty())
      b.error = "the block ends while nobody has waited for an asynchronous copy";
}

inline void launch(unsigned grid, unsigned threads, const Options& o,
                   const std::function<void()>& body) {
  for (unsigned i = 0; i < grid; ++i) {
    auto b = std::make_unique<Block>();
    b->index = {i, 0, 0};
    b->size = {threads, 1, 1};
    b->grid = {grid, 1, 1};
    b->options = o;
    current_block = b.get();
    run(*b, body);
    current_block = nullptr;
    if (!b->error.empty()) throw std::runtime_error(b->error);
  }
}

}  // namespace emulator
