// Cuts a convolution into units, and lends them scratch and threads.
#include "fftconv.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

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
  Run(const Problem& problem, const Method& method, bool is_backward)
      : p_(problem), backward_(is_backward), kernel_(kernel_for<T>(p_.length)), method_(method) {}

  Status run() {
    if (!method_.direct) {
      plan_ = get_plan<T>(method_.n, kernel_.quads);
      if (!plan_) return Status::kOutOfMemory;
    }
    int64_t steps = p_.packed ? 0 : p_.batch * p_.length;
    for (int64_t b = 0; p_.packed && b < p_.batch; ++b) steps += p_.length_of(b);
    const int64_t points = steps * p_.heads * p_.channels;
    threads_ = points < kSerialWork ? 1 : threads_for(p_.threads);
    choose_group();
    for (const Tensor* t : {&p_.y, &p_.du, &p_.dpre_gate, &p_.dpost_gate})
      will_write(*t, p_.length);
    will_write(p_.dk, p_.taps);
    will_write(p_.dk_rev, p_.taps_rev);
    const bool sums = backward_ && (p_.dk || p_.dk_rev || p_.dskip || p_.dbias);
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
    if (method_.direct && takes_lines(p_, backward_)) {
      const int64_t share = (p_.channels + threads_ - 1) / threads_;
      const int64_t lines = (share + kLineChannels - 1) / kLineChannels;
      group_ = std::min(lines, kMostLines) * kLineChannels;
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

template <class T>
Method method_of(int64_t length, int64_t taps, int64_t taps_rev) {
  return choose_method(length, std::min(taps, length), std::min(taps_rev, length - 1),
                       kernel_for<T>(length).quads);
}

template <class T>
Status run(const Problem& p, bool backward) {
  return Run<T>(p, method_of<T>(p.length, p.taps, p.taps_rev), backward).run();
}

// Rows of a pack that are handled alike.
struct Alike {
  Row row;
  Method method;
  bool is_short;
  auto key() const { return std::make_tuple(method.direct, method.blocks > 1, is_short, method.n); }
};

// What a pack's rows have in common, one group after another, so that the sums of the kernels'
// gradients have one order.
template <class T>
Status run_packed(const Problem& all, const int64_t* offsets, bool backward) {
  std::vector<Alike> found;
  std::map<int64_t, Method> methods;
  std::vector<Row> rows;
  try {
    for (int64_t i = 0; i < all.batch; ++i) {
      const int64_t length = offsets[i + 1] - offsets[i];
      if (length == 0) continue;
      auto known = methods.find(length);
      if (known == methods.end())
        known = methods.emplace(length, method_of<T>(length, all.taps, all.taps_rev)).first;
      found.push_back({{offsets[i], length, i}, known->second, length < kShort});
    }
    std::stable_sort(found.begin(), found.end(),
                     [](const Alike& a, const Alike& b) { return a.key() < b.key(); });
    for (const Alike& one : found) rows.push_back(one.row);
  } catch (const std::bad_alloc&) {
    return Status::kOutOfMemory;
  }
  for (size_t begin = 0, end; begin < found.size(); begin = end) {
    Problem p = all;
    p.length = 0;
    for (end = begin; end < found.size() && found[end].key() == found[begin].key(); ++end)
      p.length = std::max(p.length, rows[end].length);
    const Method& method = found[begin].method;
    p.packed = &rows[begin];
    p.batch = static_cast<int64_t>(end - begin);
    // As many taps as the rows of this size can have, whichever there are.
    const int64_t most = method.direct || method.blocks > 1 ? p.length : method.n;
    p.taps = std::min(all.taps, most);
    p.taps_rev = std::min(all.taps_rev, most - 1);
    p.adds = backward;
    const Status status = Run<T>(p, method, backward).run();
    if (status != Status::kOk) return status;
  }
  return Status::kOk;
}

}  // namespace

Status forward(const Problem& p) {
  return p.compute_double ? run<double>(p, false) : run<float>(p, false);
}
Status backward(const Problem& p) {
  return p.compute_double ? run<double>(p, true) : run<float>(p, true);
}
Status forward_packed(const Problem& p, const int64_t* offsets) {
  return p.compute_double ? run_packed<double>(p, offsets, false)
                          : run_packed<float>(p, offsets, false);
}
Status backward_packed(const Problem& p, const int64_t* offsets) {
  return p.compute_double ? run_packed<double>(p, offsets, true)
                          : run_packed<float>(p, offsets, true);
}

Method method(int64_t length, int64_t taps, int64_t taps_rev, bool compute_double) {
  return compute_double ? method_of<double>(length, taps, taps_rev)
                        : method_of<float>(length, taps, taps_rev);
}

}  // namespace seqconv
