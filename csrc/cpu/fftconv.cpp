// Cuts a problem into units, lends them scratch and threads, and chooses the instruction set.
#include "fftconv.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

#include "isa.h"
#include "parallel.h"
#include "plan.h"

namespace seqconv {
namespace {

ParallelFor parallel_for = nullptr;
std::atomic<bool> in_forked_child{false};
[[maybe_unused]] const int fork_flag =
    pthread_atfork(nullptr, nullptr, [] { in_forked_child.store(true); });

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

int threads_for(int asked) { return !parallel_for || forked() ? 1 : asked; }

void run_parallel(int64_t count, RangeFunction run, void* context) {
  if (!parallel_for || parallel_for(0, count, 1, run, context)) run(0, count, context);
}

namespace {

template <class T>
const Kernel<T>& kernel_for(int64_t length) {
  const IsaKernels* isa = &kernels();
  if (isa->shorter && length < kShort) isa = isa->shorter;
  if constexpr (sizeof(T) == 4)
    return isa->f32;
  else
    return isa->f64;
}

constexpr int64_t kSerialWork = 1 << 14;  // points: below, waking threads costs more than it saves
constexpr int64_t kTeamPoints = 1 << 15;  // transforms from here on are worth sharing
constexpr int64_t kParts = 4;      // of the batch, where there are too few channels to share out
constexpr int64_t kLongParts = 2;  // of long rows, whose sums count as scratch
constexpr int64_t kFewChannels = 8, kHeadsPerThread = 4;
constexpr int64_t kAdjacent = 16;  // channels transposed together, memory permitting: a cache line
constexpr int64_t kGroupBytes = 64 << 10;   // of spectra that short rows are handled with
constexpr int64_t kScratchPerPoint = 16;    // in scalars: the bound on a unit's scratch, or
constexpr int64_t kScratchBytes = 1 << 20;  // these, for short rows

template <class T>
class Run {
 public:
  Run(const Problem& problem, bool is_backward)
      : p_(problem),
        backward_(is_backward),
        kernel_(kernel_for<T>(p_.length)),
        method_(choose_method(p_.length, p_.taps, p_.taps_rev, kernel_.quads)) {}

  Status run() {
    if (!method_.direct) {
      plan_ = get_plan<T>(method_.n, kernel_.quads);
      if (!plan_) return Status::kOutOfMemory;
    }
    const int64_t points = p_.batch * p_.heads * p_.channels * p_.length;
    threads_ = points < kSerialWork ? 1 : threads_for(p_.threads);
    choose_group();
    for (const Tensor* t : {&p_.y, &p_.du, &p_.dpre_gate, &p_.dpost_gate})
      will_write(*t, p_.length);
    will_write(p_.dk, p_.taps);
    will_write(p_.dk_rev, p_.taps_rev);
    const bool sums = backward_ && (p_.dk || p_.dk_rev || p_.dskip);
    // Sums over the batch are cut by shape alone, so that they do not depend on the threads.
    const bool is_long = !method_.direct && method_.n >= kTeamPoints;
    int64_t parts = 1;
    if (sums && is_long && p_.channels == 1 && p_.heads == 1 && p_.batch >= 2 * kLongParts)
      parts = kLongParts;
    if (sums && !is_long && p_.channels < kFewChannels) parts = kParts;
    if (parts > 1 && p_.batch > 1) {
      run_in_parts(std::min(p_.batch, parts), is_long);
    } else {
      const int64_t groups = (p_.channels + group_ - 1) / group_;
      const bool even = groups >= 4 * threads_ || (groups >= threads_ && groups % threads_ == 0);
      // Threads that go their own ways hold the kernels' spectra once each.
      const bool few_rows = sums || groups * p_.batch < 2 * threads_ || p_.heads > kHeadsPerThread;
      const bool team = threads_ > 1 && !even && is_long && few_rows;
      int64_t split = 1;
      if (threads_ > 1 && !even && !team && !sums)
        split = std::min<int64_t>(p_.batch,
                                  groups == 1 ? threads_ : (2 * threads_ + groups - 1) / groups);
      run_units(groups, split, team);
    }
    return failed_.load() ? Status::kOutOfMemory : Status::kOk;
  }

 private:
  // All of a result, whose axes leave no gaps.
  void will_write(const Tensor& t, int64_t length) const {
    const int64_t size[] = {p_.batch, p_.heads, p_.channels, length};
    int64_t last = 0;
    for (int axis = 0; axis < 4; ++axis) last += (size[axis] - 1) * t.stride[axis];
    if (t && length) prefer_huge_pages(t.data, static_cast<size_t>((last + 1) * size_of(t.dtype)));
  }

  const Problem& p_;
  const bool backward_;
  const Kernel<T>& kernel_;
  const Method method_;
  std::shared_ptr<const Plan<T>> plan_;
  int threads_ = 1;
  int64_t group_ = 1;
  std::atomic<bool> failed_{false};

  const Transform<T>& transform() const {
    static const Transform<T> none{};
    return method_.direct ? none : plan_->transform;
  }

  size_t scratch_bytes(char* partial = nullptr) const {
    Team alone;
    const Unit unit{0, group_, 0, 0, &alone, partial};
    return kernel_.scratch_bytes(p_, method_, transform(), unit, backward_);
  }

  // Where time is not innermost in memory, neighbouring channels are read together; and short rows,
  // so that a sample's are read as they lie.
  void choose_group() {
    const Tensor& t = backward_ ? p_.dy : p_.y;
    const auto apart = [&](const Tensor& x) { return x && x.stride[3] != 1 && p_.length > 1; };
    const size_t spectrum = static_cast<size_t>(p_.heads) * 2 * static_cast<size_t>(method_.n);
    if (!apart(p_.u) && !apart(t)) {
      const int64_t most = kGroupBytes / static_cast<int64_t>(spectrum * sizeof(T) + 1);
      const int64_t share = p_.channels / std::max<int64_t>(kFewChannels, 4 * threads_);
      group_ = std::max<int64_t>(1, std::min({most, kAdjacent, share}));
      return;
    }
    // All of k's spectrum may be held, by the threads together; a unit needs some of it.
    const size_t kernels = spectrum * static_cast<size_t>(p_.channels / threads_) * sizeof(T);
    const size_t bound = static_cast<size_t>(kScratchPerPoint * p_.length) * sizeof(T) + 4096;
    const size_t allowed = std::max<size_t>(bound, kScratchBytes) + kernels;
    group_ = std::min(kAdjacent, p_.channels);
    while (group_ > 1 && scratch_bytes() > allowed) group_ -= group_ > 4 ? 4 : 1;
  }

  // op(i, scratch, first) for i < units, by as many threads as there are; first: the scratch is
  // new.
  template <class Op>
  void for_each(int64_t units, const Op& op, char* partial = nullptr) {
    std::atomic<int64_t> next{0};
    in_parallel(std::min<int64_t>(threads_, units), [&] {
      const Memory scratch = allocate(scratch_bytes(partial));
      if (!scratch) return failed_.store(true);
      bool first = true;
      for (int64_t i; (i = next.fetch_add(1)) < units; first = false) op(i, scratch.get(), first);
    });
  }

  // op(scratch, team) by so many threads together.
  template <class Op>
  void as_team(int threads, const Op& op, char* partial = nullptr) {
    const Memory scratch = allocate(scratch_bytes(partial));
    if (!scratch) return failed_.store(true);
    Board board;
    in_parallel(threads, [&] {
      Team team;
      if (threads > 1) team.board = &board;
      team.threads = threads;
      op(scratch.get(), team);
    });
  }

  void run_units(int64_t groups, int64_t split, bool share) {
    const int64_t step = (p_.batch + split - 1) / split;
    split = (p_.batch + step - 1) / step;
    const auto work = [&](int64_t i, char* scratch, Team& team) {
      Unit unit{};
      unit.channel = i % groups * group_;
      unit.channels = std::min(group_, p_.channels - unit.channel);
      unit.batch = i / groups * step;
      unit.batch_end = std::min(p_.batch, unit.batch + step);
      unit.team = &team;
      unit.next = i + threads_ < groups ? (i + threads_) * group_ : -1;
      (backward_ ? kernel_.backward : kernel_.forward)(p_, method_, transform(), unit, scratch);
    };
    if (!share) {
      return for_each(groups * split, [&](int64_t i, char* scratch, bool) {
        Team alone;
        work(i, scratch, alone);
      });
    }
    as_team(threads_, [&](char* scratch, Team& team) {
      for (int64_t i = 0; i < groups * split; ++i) work(i, scratch, team);
    });
  }

  void run_in_parts(int64_t parts, bool is_long) {
    group_ = 1;
    const int64_t step = (p_.batch + parts - 1) / parts;
    parts = (p_.batch + step - 1) / step;
    const size_t bytes = kernel_.partial_bytes(p_, method_, transform());
    const Memory partial = allocate(bytes * static_cast<size_t>(parts));
    if (!partial) return failed_.store(true);
    for (int64_t channel = 0; channel < p_.channels && !failed_.load(); ++channel) {
      const auto unit = [&](int64_t i, Team& team, bool first) {
        Unit part{};
        part.channel = channel;
        part.channels = 1;
        part.batch = i * step;
        part.batch_end = std::min(p_.batch, part.batch + step);
        part.team = &team;
        part.partial = partial.get() + static_cast<size_t>(i) * bytes;
        part.knows_kernels = !first;
        return part;
      };
      const auto work = [&](int64_t i, char* scratch, Team& team, bool first) {
        kernel_.backward(p_, method_, transform(), unit(i, team, first), scratch);
      };
      const auto add_up = [&](char* scratch, Team& team) {
        kernel_.reduce(p_, method_, transform(), unit(0, team, true), scratch, parts);
      };
      char* sums = partial.get();
      if (is_long && threads_ > parts) {
        const auto all = [&](char* scratch, Team& team) {
          for (int64_t i = 0; i < parts; ++i) work(i, scratch, team, i == 0);
          add_up(scratch, team);
        };
        as_team(threads_, all, sums);
        continue;
      }
      const auto one = [&](int64_t i, char* scratch, bool first) {
        Team alone;
        work(i, scratch, alone, first);
      };
      for_each(parts, one, sums);
      as_team(is_long ? threads_ : 1, add_up, sums);
    }
  }
};

Status run_in_precision(const Problem& p, bool backward) {
  return p.compute_double ? Run<double>(p, backward).run() : Run<float>(p, backward).run();
}

}  // namespace

Status forward(const Problem& problem) { return run_in_precision(problem, false); }
Status backward(const Problem& problem) { return run_in_precision(problem, true); }

void wait_a_little(int64_t times_before) {
  if (times_before > 4000) {
    sched_yield();
    return;
  }
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

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

Method method(int64_t length, int64_t taps, int64_t taps_rev, bool compute_double) {
  const int quads =
      compute_double ? kernel_for<double>(length).quads : kernel_for<float>(length).quads;
  return choose_method(length, taps, taps_rev, quads);
}

}  // namespace seqconv
