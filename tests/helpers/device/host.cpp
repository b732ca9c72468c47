// The doors of the emulator's library. tests/helpers/emulated.py appends an ENTRY for each kernel.
#include "emulator.h"

#include "butterfly.cuh"
#include "ssm.cuh"
#include "tensor_fftconv.cuh"

static std::string last;
template <class F>
static const char* guarded(F&& f) {
  try {
    f();
    return nullptr;
  } catch (const std::exception& e) {
    last = e.what();
    return last.c_str();
  }
}
extern "C" const char* emulator_visited() {
  last.clear();
  for (const std::string& site : emulator::visited) last += site + "\n";
  return last.c_str();
}
extern "C" long tensor_products() { return emulator::products; }
// Faults that the emulator must find, which one block of two warps commits on purpose.
extern "C" const char* emulate_fault(int which) {
  return guarded([&] {
    emulator::launch(1, 64, {0, 1024, ""}, [&] {
      u32* shared = (u32*)emulator::block().shared.data;
      const unsigned thread = threadIdx.x;
      if (which == 0) store_shared(shared, (u32)thread);  // write after write
      if (which == 1 && thread < 32) store_shared(shared + thread, 1u);
      if (which == 1 && thread >= 32) load_shared(shared + thread - 32);  // read after write
      if (which == 2 && thread < 32) load_shared(shared + thread);
      if (which == 2 && thread >= 32) store_shared(shared + thread - 32, 1u);  // write after read
      if (which == 3) store_shared(shared + 250 + thread, 1u);                 // outside
      if (which == 4 && thread < 40) sync_block();                             // some never come
      if (which == 5)
        thread % 32 < 16 ? sync_warp() : (void)shuffle_xor(1.f, 1);  // different collectives
    });
  });
}

// The door of one kernel: its name, the structure of its arguments, and what its body calls.
#define ENTRY(name, Arguments, ...)                                                             \
  extern "C" size_t arguments_of_##name() { return sizeof(Arguments); }                         \
  extern "C" const char* emulate_##name(const void* arguments, unsigned grid, unsigned threads, \
                                        size_t shared, unsigned order, const char* without) {   \
    return guarded([&] {                                                                        \
      const Arguments& a = *(const Arguments*)arguments;                                        \
      emulator::launch(grid, threads, {order, shared, without},                                 \
                       [&] { __VA_ARGS__(a, emulator::block().shared.data); });                 \
    });                                                                                         \
  }
