#include "isa.h"

#include <atomic>
#include <cstring>

namespace seqconv {
namespace {

// Best last.
const IsaKernels* const kIsas[] = {
    &kPortable,
#if defined(__x86_64__)
    &kAvx2,
    &kAvx512,
#elif defined(__aarch64__)
    &kNeon,
#endif
};

std::atomic<const IsaKernels*> chosen{nullptr};

}  // namespace

const IsaKernels& kernels() {
  const IsaKernels* current = chosen.load();
  if (!current) {
    for (const IsaKernels* candidate : kIsas)
      if (candidate->runnable()) current = candidate;
    chosen.store(current);
  }
  return *current;
}

const char* isa() { return kernels().name; }

bool set_isa(const char* name) {
  for (const IsaKernels* candidate : kIsas) {
    if (std::strcmp(candidate->name, name) == 0 && candidate->runnable()) {
      chosen.store(candidate);
      return true;
    }
  }
  return false;
}

}  // namespace seqconv
