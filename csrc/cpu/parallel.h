// Memory and threads for the drivers of the kernels (fftconv.cpp, ssm.cpp, butterfly.cpp).
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#if defined(_WIN32)
#include <malloc.h>
#endif

#include "tensor.h"

namespace seqconv {

// Memory on a multiple of `unit`, a power of two, of which `bytes` is a multiple; null if there is
// none.
inline void* allocate_aligned(size_t unit, size_t bytes) {
#if defined(_WIN32)
  return _aligned_malloc(bytes, unit);
#else
  return std::aligned_alloc(unit, bytes);
#endif
}
struct Free {
  void operator()(void* memory) const {
#if defined(_WIN32)
    _aligned_free(memory);
#else
    std::free(memory);
#endif
  }
};
using Memory = std::unique_ptr<char, Free>;

// A fresh mapping costs a fault for each of its thousands of small pages, which takes longer than a
// transform: large ones are asked for, where the system has them.
constexpr size_t kHugePage = size_t{2} << 20;

// For memory that is about to be written, all of it: a hint, without effect where pages are there.
inline void prefer_huge_pages([[maybe_unused]] void* start, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t from = reinterpret_cast<uintptr_t>(start), unit = kHugePage;
  const uintptr_t begin = (from + unit - 1) / unit * unit, end = (from + bytes) / unit * unit;
  if (start && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

inline Memory allocate(size_t bytes) {
  const size_t unit = bytes < 2 * kHugePage ? 64 : kHugePage;
  const size_t size = (bytes / unit + 1) * unit;
  Memory memory(static_cast<char*>(allocate_aligned(unit, size)));
  if (unit == kHugePage) prefer_huge_pages(memory.get(), size);
  return memory;
}

// Signature of libtorch's C function torch_parallel_for.
using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, RangeFunction, void*);
void set_parallel_for(ParallelFor function);

// What a fork runs: before it, and after it in the parent and in the child. Windows has no fork.
// The value means nothing: it lets a constant's initialization make the call.
int at_fork(void (*before)(), void (*in_parent)(), void (*in_child)());

// In a forked child thread pools hang, OpenMP's for one: there everything runs on the calling
// thread.
bool forked();

// Threads that a call may use which asks for `asked`.
int threads_for(int asked);

void run_parallel(int64_t count, RangeFunction run, void* context);

// op() on `count` threads, or one after another.
template <class Op>
void in_parallel(int64_t count, const Op& op) {
  if (count == 1) return op();
  const auto run = [](int64_t begin, int64_t end, void* context) {
    for (int64_t i = begin; i < end; ++i) (*static_cast<const Op*>(context))();
  };
  run_parallel(count, run, const_cast<void*>(static_cast<const void*>(&op)));
}

// op(unit, scratch, first) for every unit, on as many threads at most, with `bytes` of scratch for
// each; first: the scratch is new.
template <class Op>
Status share_out(int64_t units, int threads, size_t bytes, const Op& op) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  in_parallel(threads < units ? threads : units, [&] {
    const Memory scratch = allocate(bytes);
    if (!scratch) return failed.store(true);
    bool first = true;
    for (int64_t i; (i = next.fetch_add(1)) < units; first = false) op(i, scratch.get(), first);
  });
  return failed.load() ? Status::kOutOfMemory : Status::kOk;
}

}  // namespace seqconv
