// Cuts a convolution into units, and lends them scratch and threads.
#include "fftconv.h"

#include <algorithm>
#include <atomic>
#include <memory>

#include "isa.h"
#include "parallel.h"

namespace seqconv {
namespace {

template <class T>
const ConvKernel<T>& kernel_for(int64_t length) {
  const IsaKernels* isa = &kernels();
  if (isa->shorter && length < kShort) isa = isa->shorter;
  if constexpr (sizeof(T) == 4)
    return isa->conv_f32;
  else
    return isa->conv_f64;
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
  const ConvKernel<T>& kernel_;
  const Method method_;
  std::shared_ptr<const Plan<T>> plan_;
  int threads_ = 1;
  int64_t group_ = 1;
  std::atomic<bool> failed_{false};

  const Plan<T>& plan() const {
    static const Plan<T> none{};
    return method_.direct ? none : *plan_;
  }

  size_t scratch_bytes(char* partial = nullptr) const {
    Team alone;
    const Unit unit{0, group_, 0, 0, &alone, partial};
    return kernel_.scratch_bytes(p_, method_, plan(), unit, backward_);
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

  // op(i, scratch, team, first) for i < units, by threads alone or all of them together; first: the
  // scratch is new.
  template <class Op>
  void for_each(int64_t units, bool together, const Op& op, char* partial = nullptr) {
    if (together) {
      const auto all = [&](char* scratch, Team& team) {
        for (int64_t i = 0; i < units; ++i) op(i, scratch, team, i == 0);
      };
      return as_team(threads_, all, partial);
    }
    const auto one = [&](int64_t i, char* scratch, bool first) {
      Team alone;
      op(i, scratch, alone, first);
    };
    if (share_out(units, threads_, scratch_bytes(partial), one) != Status::kOk) failed_.store(true);
  }

  void run_units(int64_t groups, int64_t split, bool together) {
    const int64_t step = (p_.batch + split - 1) / split;
    split = (p_.batch + step - 1) / step;
    for_each(groups * split, together, [&](int64_t i, char* scratch, Team& team, bool) {
      Unit unit{};
      unit.channel = i % groups * group_;
      unit.channels = std::min(group_, p_.channels - unit.channel);
      unit.batch = i / groups * step;
      unit.batch_end = std::min(p_.batch, unit.batch + step);
      unit.team = &team;
      unit.next = i + threads_ < groups ? (i + threads_) * group_ : -1;
      (backward_ ? kernel_.backward : kernel_.forward)(p_, method_, plan(), unit, scratch);
    });
  }

  void run_in_parts(int64_t parts, bool is_long) {
    group_ = 1;
    const int64_t step = (p_.batch + parts - 1) / parts;
    parts = (p_.batch + step - 1) / step;
    const size_t bytes = kernel_.partial_bytes(p_, method_, plan());
    const Memory sums = allocate(bytes * static_cast<size_t>(parts));
    if (!sums) return failed_.store(true);
    for (int64_t channel = 0; channel < p_.channels && !failed_.load(); ++channel) {
      const auto work = [&](int64_t i, char* scratch, Team& team, bool first) {
        Unit unit{};
        unit.channel = channel;
        unit.channels = 1;
        unit.batch = i * step;
        unit.batch_end = std::min(p_.batch, unit.batch + step);
        unit.team = &team;
        unit.partial = sums.get() + static_cast<size_t>(i) * bytes;
        unit.knows_kernels = !first;
        kernel_.backward(p_, method_, plan(), unit, scratch);
      };
      for_each(parts, is_long && threads_ > parts, work, sums.get());
      const auto add_up = [&](char* scratch, Team& team) {
        const Unit unit{channel, 1, 0, p_.batch, &team, sums.get()};
        kernel_.reduce(p_, method_, plan(), unit, scratch, parts);
      };
      as_team(is_long ? threads_ : 1, add_up, sums.get());
    }
  }
};

Status run_in_precision(const Problem& p, bool backward) {
  return p.compute_double ? Run<double>(p, backward).run() : Run<float>(p, backward).run();
}

}  // namespace

Status forward(const Problem& problem) { return run_in_precision(problem, false); }
Status backward(const Problem& problem) { return run_in_precision(problem, true); }

Method method(int64_t length, int64_t taps, int64_t taps_rev, bool compute_double) {
  const int quads =
      compute_double ? kernel_for<double>(length).quads : kernel_for<float>(length).quads;
  return choose_method(length, taps, taps_rev, quads);
}

}  // namespace seqconv
