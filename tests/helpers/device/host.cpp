// The doors of a library of kernels. tests/helpers/emulated.py appends an ENTRY for each kernel in
// it.
#include "emulator.h"

#include "butterfly.cuh"
#include "half_gradients.cuh"
#include "long_rows.cuh"
#include "ssm.cuh"
#include "ssm_step.cuh"
#include "stream.cuh"

#define SEQCONV_DOOR extern "C" __attribute__((visibility("default")))

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
SEQCONV_DOOR const char* emulator_visited() {
  last.clear();
  for (const std::string& site : emulator::visited) last += site + "\n";
  return last.c_str();
}
SEQCONV_DOOR long tensor_products() { return emulator::products; }
#ifdef SEQCONV_FAULTS
#include "faults.h"
SEQCONV_DOOR const char* emulate_fault(int which, bool broken, unsigned order, unsigned copies) {
  return guarded([&] {
    emulator::launch(1, 128, {order, 2048, "", copies}, [&] { faults::program(which, broken); });
  });
}
#endif

// The door of one kernel: its name, the structure of its arguments, and what its body calls.
#define ENTRY(name, Arguments, ...)                                                               \
  SEQCONV_DOOR size_t arguments_of_##name() { return sizeof(Arguments); }                         \
  SEQCONV_DOOR const char* emulate_##name(const void* arguments, unsigned grid, unsigned threads, \
                                          size_t shared, unsigned order, const char* without,     \
                                          unsigned copies) {                                      \
    return guarded([&] {                                                                          \
      const Arguments& a = *(const Arguments*)arguments;                                          \
      emulator::launch(grid, threads, {order, shared, without, copies},                           \
                       [&] { __VA_ARGS__(a, emulator::block().shared.data); });                   \
    });                                                                                           \
  }
