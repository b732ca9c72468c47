#include "parallel.h"

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include <thread>

#include "isa.h"

namespace seqconv {
namespace {

ParallelFor parallel_for = nullptr;
std::atomic<bool> in_forked_child{false};
[[maybe_unused]] const int fork_flag =
    at_fork(nullptr, nullptr, [] { in_forked_child.store(true); });

}  // namespace

void set_parallel_for(ParallelFor function) { parallel_for = function; }

int at_fork([[maybe_unused]] void (*before)(), [[maybe_unused]] void (*in_parent)(),
            [[maybe_unused]] void (*in_child)()) {
#if defined(_WIN32)
  return 0;
#else
  return pthread_atfork(before, in_parent, in_child);
#endif
}

bool forked() { return in_forked_child.load(); }

int threads_for(int asked) { return !parallel_for || forked() ? 1 : asked; }

void run_parallel(int64_t count, RangeFunction run, void* context) {
  if (!parallel_for || parallel_for(0, count, 1, run, context)) run(0, count, context);
}

void wait_a_little(int64_t times_before) {
  if (times_before > 4000) {
    std::this_thread::yield();
    return;
  }
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

}  // namespace seqconv
