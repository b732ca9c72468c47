#include "plan.h"

#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <list>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace seqconv {
namespace {

constexpr int64_t kCachedPoints = int64_t{1} << 23;  // 64 MiB of float twiddles

int choose_radix(int64_t m) {
  if (m % 4 == 0) return 4;
  if (m % 5 == 0) return 5;
  return m % 3 == 0 ? 3 : 2;
}

// Relative cost of one pass per point; counted butterfly operations, loads and stores included.
double pass_cost(int radix) {
  switch (radix) {
    case 2:
      return 0.7;
    case 3:
      return 1.0;
    case 4:
      return 1.0;
    default:
      return 1.4;
  }
}

double transform_cost(int64_t n) {
  double cost = 0.5;
  for (int64_t m = n; m > 1;) {
    int radix = choose_radix(m);
    cost += pass_cost(radix);
    m /= radix;
  }
  return cost * static_cast<double>(n);
}

template <class T>
std::shared_ptr<const Plan<T>> make_plan(int64_t n) {
  auto plan = std::make_shared<Plan<T>>();
  Transform<T>& transform = plan->transform;
  transform.n = n;
  int64_t total = 0, nodes = 1;
  for (int64_t m = n; m > 1;) {
    int radix = choose_radix(m);
    transform.stage[transform.stages++] = {radix, total};
    total += 2 * nodes * (radix - 1);
    nodes *= radix;
    m /= radix;
  }
  plan->twiddles.reset(new T[static_cast<size_t>(total)]);
  transform.twiddles = plan->twiddles.get();
  std::vector<double> turns = {0.25};  // the nodes' angles in units of 2 pi
  for (int s = 0; s < transform.stages; ++s) {
    const int radix = transform.stage[s].radix;
    T* w = plan->twiddles.get() + transform.stage[s].twiddle;
    std::vector<double> next;
    if (s + 1 < transform.stages) next.reserve(turns.size() * static_cast<size_t>(radix));
    for (double turn : turns) {
      for (int r = 1; r < radix; ++r) {
        double angle = 6.283185307179586476925 * (turn / radix * r);
        *w++ = static_cast<T>(std::cos(angle));
        *w++ = static_cast<T>(std::sin(angle));
      }
      if (s + 1 < transform.stages)
        for (int j = 0; j < radix; ++j) next.push_back((turn + j) / radix);
    }
    turns.swap(next);
  }
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

int64_t choose_fft_size(int64_t length) {
  int64_t best = 1;
  while (best < length) best *= 2;
  double best_cost = transform_cost(best);
  const int64_t limit = best;
  for (int64_t five = 1; five <= limit; five *= 5)
    for (int64_t three = five; three <= limit; three *= 3)
      for (int64_t n = three; n <= limit; n *= 2)
        if (n >= length && transform_cost(n) < best_cost) {
          best = n;
          best_cost = transform_cost(n);
        }
  return best;
}

template <class T>
std::shared_ptr<const Plan<T>> get_plan(int64_t n) {
  Cache<T>& c = cache<T>();
  try {
    std::lock_guard<std::mutex> lock(c.mutex);
    auto hit =
        std::find_if(c.plans.begin(), c.plans.end(), [n](auto& p) { return p->transform.n == n; });
    if (hit != c.plans.end()) {
      c.plans.splice(c.plans.begin(), c.plans, hit);
    } else {
      c.plans.push_front(make_plan<T>(n));
      int64_t points = 0;
      auto last = c.plans.begin();
      while (++last != c.plans.end() && (points += (*last)->transform.n) < kCachedPoints) {
      }
      c.plans.erase(last, c.plans.end());
    }
    return c.plans.front();
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

template std::shared_ptr<const Plan<float>> get_plan(int64_t);
template std::shared_ptr<const Plan<double>> get_plan(int64_t);

}  // namespace seqconv
