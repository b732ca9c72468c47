// Shares the rows of a step and the tiles after it out among threads.
#include "stream.h"

#include <algorithm>
#include <memory>

#include "isa.h"
#include "parallel.h"

namespace seqconv {
namespace {

constexpr int64_t kStepUnit = kGroup;       // channels that are stepped together
constexpr int64_t kSerialRows = 1 << 11;    // outputs: below, one thread steps them all
constexpr int64_t kTileRun = 4;             // channels whose tiles a thread computes together
constexpr int64_t kSerialPoints = 1 << 13;  // of tiles: below, one thread computes them all

template <class T>
const StreamKernel<T>& kernel_for(int64_t n) {
  const IsaKernels* isa = &kernels();
  if (isa->shorter && n < kShort) isa = isa->shorter;
  if constexpr (sizeof(T) == 4)
    return isa->stream_f32;
  else
    return isa->stream_f64;
}

template <class T>
std::shared_ptr<const Plan<T>> plan_of(int64_t n) {
  return get_plan<T>(n, kernel_for<T>(n).quads);
}

// Scalars of a spectrum of a tile, without making its plan's tables: complex numbers in whole
// groups of four vectors.
template <class T>
int64_t spectrum_of(int64_t n) {
  const int64_t group = 4 * 8 * kernel_for<T>(n).quads;
  return (2 * n + group - 1) / group * group;
}

// op(n, where its spectra begin) for every size of tiles.
template <class T, class Op>
void for_each_size(int64_t period, const Op& op) {
  int64_t at = 0;
  for (int64_t n = kBlock; n <= period; n *= 2) {
    op(n, at);
    at += spectrum_of<T>(n);
  }
}

// What the tiles of one step need.
template <class T>
class Tiles {
 public:
  Tiles(const StreamProblem& p, int64_t least, int64_t largest) : p_(p) {
    for_each_size<T>(largest, [&](int64_t n, int64_t at) {
      begins_[place(n)] = at * p.heads * p.channels;
      if (n < least) return;
      plans_[place(n)] = plan_of<T>(n);
      complete_ = complete_ && plans_[place(n)];
    });
  }
  explicit operator bool() const { return complete_; }

  size_t scratch_bytes(int64_t n) const {
    return kernel_for<T>(n).scratch_bytes(*plans_[place(n)], p_.heads);
  }
  // Fetches what the tile of n points after step `clock` of a row reads and changes: it lies in
  // lines far apart, which come all at once when they are asked for before.
  void fetch(int64_t b, int64_t h, int64_t clock, int64_t n) const {
    constexpr int64_t kLine = 64 / sizeof(T), kMost = 1 << 8;
    const int64_t end = clock + 1, points = std::min(n, kMost), blocks = p_.period / kBlock;
    const T* spectrum = spectra(h, n);
    for (int64_t i = 0; i < points; i += kBlock) {
      const int64_t from = b * blocks + (end - n + i) / kBlock;
      const int64_t to = b * blocks + ((end + i) & (p_.period - 1)) / kBlock;
      const T* x = reinterpret_cast<const T*>(p_.inputs) + (from * p_.channels + h) * kBlock;
      const T* sum =
          reinterpret_cast<const T*>(p_.sums) + (to * p_.heads * p_.channels + h) * kBlock;
      for (int64_t j = 0; j < kBlock; j += kLine) {
        __builtin_prefetch(x + j);
        __builtin_prefetch(sum + j, 1);
        __builtin_prefetch(spectrum + 2 * (i + j));
        __builtin_prefetch(spectrum + 2 * (i + j) + kLine);
      }
    }
  }
  // That tile.
  void run(int64_t b, int64_t h, int64_t clock, int64_t n, char* scratch) const {
    const Plan<T>& plan = *plans_[place(n)];
    kernel_for<T>(n).tile(p_, plan, b, h, clock, spectra(h, n), p_.channels * plan.spectrum,
                          scratch);
  }

 private:
  const T* spectra(int64_t h, int64_t n) const {
    return reinterpret_cast<const T*>(p_.spectra) + begins_[place(n)] +
           h * plans_[place(n)]->spectrum;
  }
  static int place(int64_t n) { return __builtin_ctzll(static_cast<uint64_t>(n)); }

  const StreamProblem& p_;
  std::shared_ptr<const Plan<T>> plans_[64];
  int64_t begins_[64] = {};
  bool complete_ = true;
};

// The channels of a unit of a step. Samples follow one another, because they share taps and
// spectra.
struct StepUnit {
  int64_t b, h, channels;
  StepUnit(const StreamProblem& p, int64_t i) {
    b = i % p.batch;
    h = i / p.batch * kStepUnit;
    channels = std::min(kStepUnit, p.channels - h);
  }
  static int64_t units(const StreamProblem& p) {
    return p.batch * ((p.channels + kStepUnit - 1) / kStepUnit);
  }
};

// The channels of a unit that have a tile due after the step, if any: they have one clock.
struct DueInUnit {
  int64_t first, last, clock = 0, n = 0;
  DueInUnit(const StreamProblem& p, const StepUnit& unit) {
    const int64_t missing = kBlock - 1 - p.clock_of(unit.b, unit.h) % kBlock;
    first = unit.h + missing / 2 * kTogether;
    last = std::min(first + kTogether, unit.h + unit.channels);
    if (missing % 2 || first >= last) return;
    clock = p.clock_of(unit.b, first);
    n = p.tile_after(clock);
  }
};

// Few rows have a tile due, of any size: every unit computes its own.
template <class T>
Status run_spread(const StreamProblem& p, int threads) {
  const auto step = kernel_for<T>(kShort).step;
  const int64_t units = StepUnit::units(p);
  int64_t least = p.period, largest = 0;
  for (int64_t i = 0; i < units; ++i) {
    const int64_t n = DueInUnit(p, StepUnit(p, i)).n;
    if (n) least = std::min(least, n);
    largest = std::max(largest, n);
  }
  const Tiles<T> tiles(p, least, largest);
  if (!tiles) return Status::kOutOfMemory;
  const size_t bytes = largest ? tiles.scratch_bytes(largest) : 0;
  return share_out(units, threads, bytes, [&](int64_t i, char* scratch, bool) {
    const StepUnit unit(p, i);
    const DueInUnit due(p, unit);
    if (due.n)
      for (int64_t h = due.first; h < due.last; ++h) tiles.fetch(unit.b, h, due.clock, due.n);
    step(p, unit.b, unit.h, unit.channels);
    if (due.n)
      for (int64_t h = due.first; h < due.last; ++h)
        tiles.run(unit.b, h, due.clock, due.n, scratch);
  });
}

// All rows of a sample have the same tile due, if any.
template <class T>
Status run_together(const StreamProblem& p, int threads) {
  const auto step = kernel_for<T>(kShort).step;
  const Status status = share_out(StepUnit::units(p), threads, 0, [&](int64_t i, char*, bool) {
    const StepUnit unit(p, i);
    step(p, unit.b, unit.h, unit.channels);
  });
  int64_t least = p.period, largest = 0, points = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t n = p.tile_after(p.clock_of(b, 0));
    if (n) least = std::min(least, n);
    largest = std::max(largest, n);
    points += n * p.heads * p.channels;
  }
  if (status != Status::kOk || largest == 0) return status;
  const Tiles<T> tiles(p, least, largest);
  if (!tiles) return Status::kOutOfMemory;
  const int team = points < kSerialPoints ? 1 : threads_for(p.threads);
  // Neighbouring channels are neighbours in memory, and samples share spectra: runs of channels, of
  // all samples.
  const int64_t run = std::max<int64_t>(1, std::min<int64_t>(kTileRun, p.channels / (4 * team)));
  const int64_t runs = (p.channels + run - 1) / run;
  return share_out(runs, team, tiles.scratch_bytes(largest), [&](int64_t i, char* scratch, bool) {
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t clock = p.clock_of(b, 0), n = p.tile_after(clock);
      for (int64_t h = i * run; n && h < std::min(p.channels, (i + 1) * run); ++h)
        tiles.run(b, h, clock, n, scratch);
    }
  });
}

template <class T>
Status run_step(const StreamProblem& p) {
  const int threads = p.rows() * p.heads < kSerialRows ? 1 : threads_for(p.threads);
  const Status status = p.spread ? run_spread<T>(p, threads) : run_together<T>(p, threads);
  if (status == Status::kOk)
    for (int64_t b = 0; b < p.batch; ++b) p.clock[b] = (p.clock[b] + 1) & (p.period - 1);
  return status;
}

template <class T>
Status run_spectra(const StreamKernelProblem& p) {
  Status status = Status::kOk;
  const int64_t rows = p.heads * p.channels;
  for_each_size<T>(p.period, [&](int64_t n, int64_t at) {
    const std::shared_ptr<const Plan<T>> plan = plan_of<T>(n);
    if (!plan) return void(status = Status::kOutOfMemory);
    const T* k = reinterpret_cast<const T*>(p.k);
    T* to = reinterpret_cast<T*>(p.spectra) + at * rows;
    const int threads = rows * n < kSerialPoints ? 1 : threads_for(p.threads);
    const int64_t run = std::max<int64_t>(1, 2048 / n);
    share_out((rows + run - 1) / run, threads, 0, [&](int64_t i, char*, bool) {
      for (int64_t r = i * run; r < std::min(rows, (i + 1) * run); ++r)
        kernel_for<T>(n).spectrum(*plan, k + r * p.count, p.count, to + r * plan->spectrum);
    });
  });
  return status;
}

}  // namespace

Status stream_step(const StreamProblem& p) {
  return p.compute_double ? run_step<double>(p) : run_step<float>(p);
}

Status stream_spectra(const StreamKernelProblem& p) {
  return p.compute_double ? run_spectra<double>(p) : run_spectra<float>(p);
}

int64_t stream_spectrum_size(int64_t period, bool compute_double) {
  int64_t size = 0;
  const auto add = [&](auto zero) {
    using T = decltype(zero);
    for_each_size<T>(period, [&](int64_t n, int64_t) { size += spectrum_of<T>(n); });
  };
  compute_double ? add(0.0) : add(0.0f);
  return size;
}

}  // namespace seqconv
