// Runs the kernels of csrc/device on the host: a fiber for every thread, block
// barriers and warp collectives by rendezvous, one block at a time. Found on
// the way: barriers that some threads never reach, lanes of a warp in different
// collectives, shared memory read before it was written (it starts as NaN) or
// outside its bounds, races between threads in shared memory, and results that
// depend on the order in which threads run.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>

#define SEQCONV_EMULATED
#define SEQCONV_DEVICE inline
#define SEQCONV_SHARED(name) unsigned char* name = emulator::block().shared.data

typedef uint32_t u32;
typedef long long i64;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  u32 x, y, z, w;
};

namespace emulator {

// ---- fibers: a context switch that saves registers only; ucontext's would
// make a system call each time ----
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch,.-emulator_switch
)");
struct Context {
  void* stack_pointer = nullptr;
  void start(char* stack, size_t size, void (*entry)()) {
    void** top = (void**)(stack + size - 64);
    *--top = nullptr;  // keeps the stack aligned as after a call
    *--top = (void*)entry;
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer = top;
  }
  static void swap(Context& from, Context& to) {
    emulator_switch(&from.stack_pointer, to.stack_pointer);
  }
};
#else
struct Context {
  ucontext_t context;
  void start(char* stack, size_t size, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void swap(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

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
// Who touched a word of shared memory last, and how many barriers ago.
struct Word {
  int writer = -1, reader = -1;
  unsigned write_block = 0, write_warp = 0, read_block = 0, read_warp = 0;
};
// Exactly the asked bytes, so that AddressSanitizer sees every step outside.
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

// All living lanes of the warp meet at one site; the last to come runs op for
// everybody.
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

constexpr size_t kStack = 64 << 10;
inline char* stack_of(size_t i) {
  static std::vector<char*> stacks;
  while (stacks.size() <= i)
    stacks.push_back(
        (char*)mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  return stacks[i];
}

// order 0: threads in order, 1: reversed, others: seeds of a shuffle of warps
// and of the lanes in them.
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

#define threadIdx (emulator::me().index)
#define blockIdx (emulator::block().index)
#define blockDim (emulator::block().size)
#define gridDim (emulator::block().grid)

struct bf16;
struct fp16;

// Barriers are known by their place in the source, so that a mutation can leave
// one out.
inline void sync_block(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const std::string site =
      std::string(std::strrchr(file, '/') ? std::strrchr(file, '/') + 1 : file) + ":" +
      std::to_string(line);
  emulator::visited.insert(site);
  if (site != emulator::block().without) emulator::sync_all();
}
inline void sync_warp(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static const char here = 0;
  const std::string site =
      std::string(std::strrchr(file, '/') ? std::strrchr(file, '/') + 1 : file) + ":" +
      std::to_string(line);
  emulator::visited.insert(site);
  if (site != emulator::block().without)
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

// ---- fp16 pairs and tensor cores: mma.cuh's functions. Products are summed in
// float32 and rounded once ----
struct Pair;
inline _Float16 half_of(u32 bits) {
  const unsigned short low = (unsigned short)bits;
  _Float16 y;
  std::memcpy(&y, &low, 2);
  return y;
}
inline u32 bits_of(_Float16 x) {
  unsigned short y;
  std::memcpy(&y, &x, 2);
  return y;
}
inline u32 pack(float x, float y) { return bits_of((_Float16)x) | bits_of((_Float16)y) << 16; }
template <class P = Pair>
inline P unpack(u32 v) {
  return {(float)half_of(v), (float)half_of(v >> 16)};
}
inline u32 fma2(u32 a, u32 b, u32 c) {
  const auto one = [](u32 x, u32 y, u32 z) {
    return bits_of((_Float16)std::fma((double)half_of(x), (double)half_of(y), (double)half_of(z)));
  };
  return one(a, b, c) | one(a >> 16, b >> 16, c >> 16) << 16;
}
inline u32 negate2(u32 a) { return a ^ 0x80008000u; }
inline u32 mul2(u32 a, u32 b) {
  return bits_of((_Float16)((float)half_of(a) * (float)half_of(b))) |
         bits_of((_Float16)((float)half_of(a >> 16) * (float)half_of(b >> 16))) << 16;
}
namespace emulator {
struct Mma {
  const u32* a;
  u32 b[2];
  float* d;
};
inline void multiply_tiles(void** slots) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& o = *(Mma*)slots[lane];
    const int g = lane >> 2, t = lane & 3;
    for (int q = 0; q < 4; ++q)
      for (int e = 0; e < 2; ++e)
        a[g + 8 * (q & 1)][2 * t + 8 * (q >> 1) + e] = (float)half_of(o.a[q] >> (16 * e));
    for (int q = 0; q < 2; ++q)
      for (int e = 0; e < 2; ++e) b[2 * t + 8 * q + e][g] = (float)half_of(o.b[q] >> (16 * e));
    for (int q = 0; q < 4; ++q) d[g + 8 * (q >> 1)][2 * t + (q & 1)] = o.d[q];
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane >> 2, t = lane & 3;
    for (int q = 0; q < 4; ++q) ((Mma*)slots[lane])->d[q] = d[g + 8 * (q >> 1)][2 * t + (q & 1)];
  }
}
inline long products = 0;  // tensor core instructions of all warps
inline void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  static const char here = 0;
  Mma mine{a, {b0, b1}, d};
  meet(&mine, &here, [](void** slots) {
    ++products;
    multiply_tiles(slots);
  });
}
}  // namespace emulator
template <class P>
inline void mma(P (&d)[2], const u32 (&a)[4], u32 b0, u32 b1) {
  if constexpr (std::is_same_v<P, u32>) {
    float sum[4] = {(float)half_of(d[0]), (float)half_of(d[0] >> 16), (float)half_of(d[1]),
                    (float)half_of(d[1] >> 16)};
    emulator::mma(sum, a, b0, b1);
    d[0] = pack(sum[0], sum[1]);
    d[1] = pack(sum[2], sum[3]);
  } else {
    float sum[4] = {d[0].x, d[0].y, d[1].x, d[1].y};
    emulator::mma(sum, a, b0, b1);
    d[0] = {sum[0], sum[1]};
    d[1] = {sum[2], sum[3]};
  }
}
inline void load_transposed(u32 (&r)[4], const unsigned short* p) {
  static const char here = 0;
  struct Op {
    u32* r;
    const unsigned short* p;
  } mine{r, p};
  emulator::meet(&mine, &here, [](void** slots) {
    for (int tile = 0; tile < 4; ++tile) {
      unsigned short t[8][8];
      for (int row = 0; row < 8; ++row) {
        const unsigned short* from = ((Op*)slots[8 * tile + row])->p;
        if ((uintptr_t)from % 16)
          emulator::fail("ldmatrix from an address that is no multiple of 16");
        emulator::touch(from, 16, false, emulator::me().linear / 32 * 32 + 8 * tile + row);
        std::memcpy(t[row], from, 16);
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane >> 2, q = lane & 3;
        ((Op*)slots[lane])->r[tile] = t[2 * q][g] | (u32)t[2 * q + 1][g] << 16;
      }
    }
  });
}

inline float to_float(float x) { return x; }
template <class T>
inline float to_float(T x) {
  if constexpr (std::is_same_v<T, bf16>) {
    const u32 bits = (u32)x.bits << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
  } else {
    _Float16 y;
    std::memcpy(&y, &x.bits, 2);
    return (float)y;
  }
}
template <class T>
inline void from_float(T& y, float x) {
  if constexpr (std::is_same_v<T, float>) {
    y = x;
  } else if constexpr (std::is_same_v<T, bf16>) {
    u32 bits;
    std::memcpy(&bits, &x, 4);
    y.bits = (bits & 0x7fffffffu) > 0x7f800000u
                 ? 0x7fff
                 : (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  } else {
    const _Float16 half = (_Float16)x;
    std::memcpy(&y.bits, &half, 2);
  }
}
