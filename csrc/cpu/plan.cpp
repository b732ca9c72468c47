#include "plan.h"

#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <list>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace seqconv {
namespace {

constexpr size_t kCachedBytes = size_t{1} << 26;
constexpr int64_t kCompactFrom = int64_t{1} << 18;  // points; there tables cost more than they save

constexpr int64_t kNarrowFrom = 2048;

// Radix of the first pass, then those of the stages, whose nodes end with four positions: m is the
// number of those nodes per branch. Odd radices come early, where twiddles are read seldom. A first
// pass into the widest vectors meets four segments per node, so that long rows, whose segments lie
// a power of two apart, start with a two; those vectors come with registers enough for eights.
struct Radices {
  int count = 0, radix[kMaxStages];
};
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

// Relative cost per point of a stage, there and back.
double stage_cost(int radix) {
  switch (radix) {
    case 2:
      return 0.7;
    case 3:
      return 1.0;
    case 4:
      return 1.0;
    case 5:
      return 1.4;
    case 7:
      return 2.0;
    default:
      return 1.5;
  }
}

// Of one transform of 4 quads m points, there and back; infinite where there is none.
double transform_cost(int64_t m, int quads) {
  // Longer transforms are cut into nodes that fit in cache, and end in whole groups of four.
  if (m % (m > 512 ? 16 : m > 64 ? 4 : 1)) return HUGE_VAL;
  const Radices radices = choose_radices(m, quads);
  if (radices.count == 0) return HUGE_VAL;
  double cost = 1.5;
  for (int s = 0; s < radices.count; ++s) cost += stage_cost(radices.radix[s]);
  return cost * static_cast<double>(4 * quads * ((m + 3) / 4 * 4));
}

template <class T>
std::shared_ptr<const Plan<T>> make_plan(int64_t n, int quads) {
  auto plan = std::make_shared<Plan<T>>();
  Transform<T>& t = plan->transform;
  const int64_t m = n / (4 * quads);
  const Radices radices = choose_radices(m, quads);
  const int64_t step = 8 * quads;  // scalars of a complex vector
  t.n = n;
  t.quads = quads;
  t.radix = radices.radix[0];
  t.vectors = m / t.radix;
  const int64_t groups = (m + 3) / 4;
  t.spectrum = groups * 4 * step;
  t.compact = n >= kCompactFrom;
  int64_t total = 0, nodes = t.radix;
  for (int s = 1; s < radices.count; ++s) {
    const int radix = radices.radix[s];
    t.stage[t.stages++] = {radix, total};
    total += nodes * (t.compact && radix == 4 ? 1 : radix - 1) * step;
    nodes *= radix;
  }
  t.middle = total;
  total += groups * (t.compact ? 1 : 3) * step;
  const int ends_quads = end_quads(quads, sizeof(T)), end_radix = t.radix * quads / ends_quads;
  const int64_t ends = total, end_size = static_cast<int64_t>(t.radix) * quads * 8 * ends_quads;
  total += 3 * end_size;
  plan->bytes = (static_cast<size_t>(total) * sizeof(T) + 63) / 64 * 64;
  T* table = static_cast<T*>(std::aligned_alloc(64, plan->bytes));
  if (!table) throw std::bad_alloc();
  plan->twiddles = {table, [](T* p) { std::free(p); }};
  t.twiddles = table;

  constexpr double kTurn = 6.283185307179586476925;
  // Complex vectors of `count` quads; angle(q, lane): in turns.
  const auto put = [](T* to, int count, double scale, const auto& angle) {
    for (int q = 0; q < count; ++q) {
      for (int lane = 0; lane < 4; ++lane) {
        const double a = kTurn * angle(q, lane);
        to[4 * q + lane] = static_cast<T>(scale * std::cos(a));
        to[4 * (count + q) + lane] = static_cast<T>(scale * std::sin(a));
      }
    }
  };
  // Turns of the branches' nodes: the lanes' split, the first pass, the stages.
  std::vector<std::vector<double>> turns(static_cast<size_t>(quads));
  for (int q = 0; q < quads; ++q) turns[static_cast<size_t>(q)] = {(0.25 + q) / quads};
  const auto split = [&](int radix) {
    for (auto& branch : turns) {
      std::vector<double> next;
      next.reserve(branch.size() * static_cast<size_t>(radix));
      for (double turn : branch)
        for (int j = 0; j < radix; ++j) next.push_back((turn + j) / radix);
      branch.swap(next);
    }
  };

  const T** end_tables[] = {&t.plain, &t.scaled, &t.scaled_times_minus_i};
  for (int i = 0; i < 3; ++i) {
    T* to = table + ends + i * end_size;
    *end_tables[i] = to;
    for (int r = 0; r < end_radix; ++r)
      for (int s = 0; s < ends_quads; ++s, to += 8 * ends_quads)
        put(to, ends_quads, i == 0 ? 1.0 : 1.0 / static_cast<double>(n), [&](int q, int) {
          return (0.25 + q) / ends_quads * (s + static_cast<double>(r) / end_radix) -
                 (i == 2 ? 0.25 : 0.0);
        });
  }
  split(t.radix);
  for (int s = 0; s < t.stages; ++s) {
    const int radix = t.stage[s].radix;
    T* to = table + t.stage[s].twiddle;
    const int powers = t.compact && radix == 4 ? 1 : radix - 1;
    for (size_t node = 0; node < turns[0].size(); ++node)
      for (int r = 1; r <= powers; ++r, to += step)
        put(to, quads, 1.0,
            [&](int q, int) { return turns[static_cast<size_t>(q)][node] / radix * r; });
    split(radix);
  }
  T* to = table + t.middle;
  for (int64_t g = 0; g < groups; ++g)
    for (int r = 1; r <= (t.compact ? 1 : 3); ++r, to += step)
      put(to, quads, 1.0, [&](int q, int lane) {
        const auto node = static_cast<size_t>(std::min(4 * g + lane, m - 1));
        return turns[static_cast<size_t>(q)][node] / 4 * r;
      });
  return plan;
}

template <class T>
struct Cache {
  std::mutex mutex;
  std::list<std::shared_ptr<const Plan<T>>> plans;  // most recently used first
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
[[maybe_unused]] const int fork_guard = pthread_atfork(lock_caches, unlock_caches, unlock_caches);

}  // namespace

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
    auto hit = std::find_if(c.plans.begin(), c.plans.end(), [&](auto& p) {
      return p->transform.n == n && p->transform.quads == quads;
    });
    if (hit != c.plans.end()) {
      c.plans.splice(c.plans.begin(), c.plans, hit);
    } else {
      c.plans.push_front(make_plan<T>(n, quads));
      size_t bytes = c.plans.front()->bytes;
      auto last = c.plans.begin();
      while (++last != c.plans.end() && (bytes += (*last)->bytes) < kCachedBytes) {
      }
      c.plans.erase(last, c.plans.end());
    }
    return c.plans.front();
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

template std::shared_ptr<const Plan<float>> get_plan(int64_t, int);
template std::shared_ptr<const Plan<double>> get_plan(int64_t, int);

}  // namespace seqconv
