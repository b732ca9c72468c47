// Cuts a problem into units, lends them scratch and threads, and chooses the instruction set.
#include "fftconv.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "kernel.h"
#include "plan.h"

namespace seqconv {
namespace {

constexpr int64_t kSerialWork =
    1 << 14;  // below this many points, waking a thread costs more than it saves

ParallelFor parallel_for = nullptr;
std::atomic<bool> in_forked_child{false};
[[maybe_unused]] const int fork_flag =
    pthread_atfork(nullptr, nullptr, [] { in_forked_child.store(true); });

// Best last.
const IsaKernels* const kIsas[] = {
    &kPortable,
#if defined(__x86_64__)
    &kAvx2,
#endif
};

std::atomic<const IsaKernels*> chosen{nullptr};

const IsaKernels& kernels() {
  const IsaKernels* current = chosen.load();
  if (!current) {
    for (const IsaKernels* candidate : kIsas)
      if (candidate->runnable()) current = candidate;
    chosen.store(current);
  }
  return *current;
}

template <class T>
const Kernel<T>& kernel_of(const IsaKernels& kernels) {
  if constexpr (sizeof(T) == 4)
    return kernels.f32;
  else
    return kernels.f64;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

template <class T>
struct Job {
  const Problem& problem;
  const Kernel<T>& kernel;
  const Transform<T>& transform;
  bool backward;
  int64_t groups, batch_step;  // units: channel groups x batch ranges
  size_t scratch_bytes;
  std::atomic<bool> out_of_memory{false};

  void run(int64_t begin, int64_t end) {
    const size_t size = (std::max<size_t>(scratch_bytes, 1) + 63) / 64 * 64;
    std::unique_ptr<void, Free> scratch(std::aligned_alloc(64, size));
    if (!scratch) {
      out_of_memory.store(true);
      return;
    }
    for (int64_t i = begin; i < end; ++i) {
      Unit unit;
      unit.channel = i % groups * kernel.lanes;
      unit.channels = std::min<int64_t>(kernel.lanes, problem.channels - unit.channel);
      unit.batch = i / groups * batch_step;
      unit.batch_end = std::min(problem.batch, unit.batch + batch_step);
      (backward ? kernel.backward : kernel.forward)(problem, transform, unit, scratch.get());
    }
  }
};

template <class T>
Status run(const Problem& p, bool backward) {
  const bool direct = uses_direct_sum(p.taps, p.taps_rev);
  std::shared_ptr<const Plan<T>> plan;
  Transform<T> none;
  if (!direct) {
    plan = get_plan<T>(fft_size(p.length));
    if (!plan) return Status::kOutOfMemory;
  }
  const Transform<T>& transform = direct ? none : plan->transform;
  const Kernel<T>& kernel = kernel_of<T>(kernels());
  const int64_t groups = (p.channels + kernel.lanes - 1) / kernel.lanes;
  // Few channels: split the batch as well. Each part transforms the kernel again, so not too
  // finely. The gradient of the kernel sums over the batch in one fixed order and is never split.
  int64_t parts = 1;
  if (!backward) parts = std::min(p.batch, std::max<int64_t>(1, 16 / groups));
  const int64_t step = (p.batch + parts - 1) / parts;
  Job<T> job{
      p, kernel, transform, backward, groups, step, kernel.scratch_bytes(p, transform.n, backward)};
  const int64_t units = groups * ((p.batch + step - 1) / step);
  const bool serial = !parallel_for || forked() || units == 1 ||
                      p.batch * p.heads * p.channels * p.length < kSerialWork;
  if (serial) {
    job.run(0, units);
  } else {
    const int32_t failed = parallel_for(
        0, units, 1,
        [](int64_t begin, int64_t end, void* context) {
          static_cast<Job<T>*>(context)->run(begin, end);
        },
        &job);
    if (failed) job.run(0, units);
  }
  return job.out_of_memory.load() ? Status::kOutOfMemory : Status::kOk;
}

Status run_in_precision(const Problem& p, bool backward) {
  return p.compute_double ? run<double>(p, backward) : run<float>(p, backward);
}

}  // namespace

Status forward(const Problem& problem) { return run_in_precision(problem, false); }
Status backward(const Problem& problem) { return run_in_precision(problem, true); }

void set_parallel_for(ParallelFor function) { parallel_for = function; }

bool forked() { return in_forked_child.load(); }

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

bool uses_direct_sum(int64_t taps, int64_t taps_rev) { return taps + taps_rev <= kDirectTaps; }

int64_t fft_size(int64_t length) { return choose_fft_size(length); }

}  // namespace seqconv
