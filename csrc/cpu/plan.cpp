#include "plan.h"

#include <algorithm>
#include <cmath>
#include <list>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "parallel.h"

namespace seqconv {
namespace {

constexpr int64_t kNarrowFrom = 2048;  // points; long rows in the comment below

// Radix of the first pass, then those of the stages, of a transform of 4 quads m points, whose
// nodes end with four positions; none where there is no such transform.
struct Radices {
  int count = 0, radix[kMaxStages];
};
// Odd radices come early, where twiddles are read seldom. A first pass into the widest vectors
// meets four segments per node, so that long rows, whose segments lie a power of two apart, start
// with a two; those vectors come with registers enough for eights.
Radices choose_radices(int64_t m, int quads) {
  Radices radices;
  int twos = 0;
  const bool wide = quads == 4, narrow = wide && 4 * quads * m >= kNarrowFrom;
  for (; m % 2 == 0; m /= 2) ++twos;
  const auto put = [&](int radix, int bits) {
    radices.radix[radices.count++] = radix;
    twos -= bits;
  };
  if (twos % 2 || (narrow && twos > 3))
    put(2, 1);
  else if (twos)
    put(4, 2);
  for (int prime : {7, 5, 3})
    for (; m % prime == 0; m /= prime) put(prime, 0);
  if (m != 1) return {};
  while (twos % 2 || (wide && twos >= 8)) put(8, 3);
  while (twos) put(4, 2);
  return radices;
}

// Of a stage by its radix, per point, there and back.
constexpr double kStageCost[] = {0, 0, 0.7, 1.0, 1.0, 1.4, 0, 2.0, 1.5};

// Of one transform of 4 quads m points, there and back; infinite where there is none.
double transform_cost(int64_t m, int quads) {
  // Longer transforms are cut into nodes that fit in cache, and end in whole groups of four.
  if (m % (m > 512 ? 16 : m > 64 ? 4 : 1)) return HUGE_VAL;
  const Radices radices = choose_radices(m, quads);
  if (radices.count == 0) return HUGE_VAL;
  double cost = 1.5;
  for (int s = 0; s < radices.count; ++s) cost += kStageCost[radices.radix[s]];
  return cost * static_cast<double>(4 * quads * ((m + 3) / 4 * 4));
}

// Cheapest transform length >= length: 4 quads times a product of 2, 3, 5 and 7.
int64_t choose_fft_size(int64_t length, int quads) {
  const int64_t quantum = 4 * quads, least = std::max<int64_t>(2, (length + quantum - 1) / quantum);
  // A quarter of padding is always enough from 32 points on; shorter rows take what there is.
  const int64_t limit = std::max(5 * length / (4 * quantum), least + 2);
  std::pair<bool, double> best_cost{true, HUGE_VAL};  // whether it pads too much, then time
  int64_t best = 0;
  for (int64_t seven = 1; seven <= 7 && seven <= limit; seven *= 7)
    for (int64_t five = seven; five <= limit; five *= 5)
      for (int64_t three = five; three <= limit; three *= 3)
        for (int64_t m = three; m <= limit; m *= 2) {
          if (m < least) continue;
          const std::pair<bool, double> cost{4 * quantum * m > 5 * length,
                                             transform_cost(m, quads)};
          if (cost < best_cost) {
            best = m;
            best_cost = cost;
          }
        }
  return best * quantum;
}

constexpr size_t kCachedBytes = size_t{1} << 26;
constexpr int64_t kCompactFrom = int64_t{1} << 18;  // points; there tables cost more than they save
constexpr double kTurn = 6.283185307179586476925;

// A plan with the memory of its tables: those of the stages, of the middle and of the ends.
template <class T>
class Tables {
 public:
  Plan<T> plan;
  size_t bytes = 0;

  Tables(int64_t n, int quads)
      : m_(n / (4 * quads)), radices_(choose_radices(m_, quads)), step_(8 * quads) {
    plan.n = n;
    plan.quads = quads;
    plan.radix = radices_.radix[0];
    plan.vectors = m_ / plan.radix;
    groups_ = (m_ + 3) / 4;
    plan.spectrum = groups_ * 4 * step_;
    plan.compact = n >= kCompactFrom;
    int64_t total = 0, nodes = plan.radix;
    for (int s = 1; s < radices_.count; ++s) {
      const int radix = radices_.radix[s];
      plan.stage[plan.stages++] = {radix, total};
      total += nodes * powers(radix) * step_;
      nodes *= radix;
    }
    plan.middle = total;
    total += groups_ * powers(4) * step_;
    end_quads_ = end_quads(quads, sizeof(T));
    const int64_t ends = total, end_size = int64_t{plan.radix} * quads * 8 * end_quads_;
    total += 3 * end_size;
    bytes = (static_cast<size_t>(total) * sizeof(T) + 63) / 64 * 64;
    table_.reset(static_cast<T*>(allocate_aligned(64, bytes)));
    if (!table_) throw std::bad_alloc();
    plan.twiddles = table_.get();
    plan.plain = fill_ends(table_.get() + ends, 1.0, 0.0);
    plan.scaled = fill_ends(table_.get() + ends + end_size, 1.0 / static_cast<double>(n), 0.0);
    plan.scaled_times_minus_i =
        fill_ends(table_.get() + ends + 2 * end_size, 1.0 / static_cast<double>(n), 0.25);
    fill_stages();
  }

 private:
  int64_t m_;
  Radices radices_;
  int64_t step_;  // scalars of a complex vector
  int64_t groups_;
  int end_quads_;
  std::unique_ptr<T, Free> table_;

  // How many powers of a node's twiddle the tables keep.
  int powers(int radix) const { return plan.compact && radix == 4 ? 1 : radix - 1; }

  // Complex vectors of `count` quads; angle(q, lane): in turns.
  template <class Angle>
  static void put(T* to, int count, double scale, const Angle& angle) {
    for (int q = 0; q < count; ++q) {
      for (int lane = 0; lane < 4; ++lane) {
        const double a = kTurn * angle(q, lane);
        to[4 * q + lane] = static_cast<T>(scale * std::cos(a));
        to[4 * (count + q) + lane] = static_cast<T>(scale * std::sin(a));
      }
    }
  }

  // The segments' weights, turned back by so many turns.
  const T* fill_ends(T* const start, double scale, double back) const {
    const int radix = plan.radix * plan.quads / end_quads_;
    T* to = start;
    for (int r = 0; r < radix; ++r)
      for (int s = 0; s < end_quads_; ++s, to += 8 * end_quads_)
        put(to, end_quads_, scale, [&](int q, int) {
          return (0.25 + q) / end_quads_ * (s + static_cast<double>(r) / radix) - back;
        });
    return start;
  }

  void fill_stages() const {
    // Turns of the branches' nodes: the lanes' split, the first pass, the stages.
    std::vector<std::vector<double>> turns(static_cast<size_t>(plan.quads));
    for (int q = 0; q < plan.quads; ++q) turns[static_cast<size_t>(q)] = {(0.25 + q) / plan.quads};
    const auto split = [&](int radix) {
      for (auto& branch : turns) {
        std::vector<double> next;
        next.reserve(branch.size() * static_cast<size_t>(radix));
        for (double turn : branch)
          for (int j = 0; j < radix; ++j) next.push_back((turn + j) / radix);
        branch.swap(next);
      }
    };
    split(plan.radix);
    for (int s = 0; s < plan.stages; ++s) {
      const int radix = plan.stage[s].radix;
      T* to = table_.get() + plan.stage[s].twiddle;
      for (size_t node = 0; node < turns[0].size(); ++node)
        for (int r = 1; r <= powers(radix); ++r, to += step_)
          put(to, plan.quads, 1.0,
              [&](int q, int) { return turns[static_cast<size_t>(q)][node] / radix * r; });
      split(radix);
    }
    T* to = table_.get() + plan.middle;
    for (int64_t g = 0; g < groups_; ++g)
      for (int r = 1; r <= powers(4); ++r, to += step_)
        put(to, plan.quads, 1.0, [&](int q, int lane) {
          const auto node = static_cast<size_t>(std::min(4 * g + lane, m_ - 1));
          return turns[static_cast<size_t>(q)][node] / 4 * r;
        });
  }
};

template <class T>
struct Cache {
  std::mutex mutex;
  std::list<std::shared_ptr<const Tables<T>>> recent;  // most recently used first
};

// Leaked on purpose: worker threads may outlive static destruction.
template <class T>
Cache<T>& cache() {
  static Cache<T>* instance = new Cache<T>;
  return *instance;
}

void lock_caches() {
  cache<float>().mutex.lock();
  cache<double>().mutex.lock();
}
void unlock_caches() {
  cache<double>().mutex.unlock();
  cache<float>().mutex.unlock();
}
// A fork taken while another thread holds a cache lock would leave it locked in the child forever.
[[maybe_unused]] const int fork_guard = at_fork(lock_caches, unlock_caches, unlock_caches);

}  // namespace

Method choose_method(int64_t length, int64_t taps, int64_t taps_rev, int quads) {
  if (taps + taps_rev <= kDirectTaps) return {true, 0, 1};
  const int64_t width = std::max<int64_t>(taps, 1) + taps_rev;  // skip is part of tap 0
  const auto cost = [quads](int64_t n) { return transform_cost(n / (4 * quads), quads); };
  Method best{false, choose_fft_size(length, quads), 1};
  double best_cost = cost(best.n);
  for (int64_t size = std::max<int64_t>(width, 256); 2 * size <= length; size *= 2) {
    // The same number of blocks, cut shorter if that still covers the row.
    const int64_t count = (length + size - 1) / size;
    const int64_t n = choose_fft_size(std::max(width, (length + count - 1) / count), quads);
    const int64_t blocks = (length + n - 1) / n;
    const double total = static_cast<double>(blocks) * (cost(n) + 0.5 * static_cast<double>(n));
    if (blocks > 1 && total < best_cost) {
      best = {false, n, blocks};
      best_cost = total;
    }
  }
  return best;
}

template <class T>
std::shared_ptr<const Plan<T>> get_plan(int64_t n, int quads) {
  Cache<T>& c = cache<T>();
  try {
    std::lock_guard<std::mutex> lock(c.mutex);
    auto hit = std::find_if(c.recent.begin(), c.recent.end(), [&](auto& tables) {
      return tables->plan.n == n && tables->plan.quads == quads;
    });
    if (hit != c.recent.end()) {
      c.recent.splice(c.recent.begin(), c.recent, hit);
    } else {
      c.recent.push_front(std::make_shared<const Tables<T>>(n, quads));
      size_t bytes = c.recent.front()->bytes;
      auto last = c.recent.begin();
      while (++last != c.recent.end() && (bytes += (*last)->bytes) < kCachedBytes) {
      }
      c.recent.erase(last, c.recent.end());
    }
    return {c.recent.front(), &c.recent.front()->plan};
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

template std::shared_ptr<const Plan<float>> get_plan(int64_t, int);
template std::shared_ptr<const Plan<double>> get_plan(int64_t, int);

}  // namespace seqconv
