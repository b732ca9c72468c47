// Shares the rows of a learned butterfly out among threads.
#include "butterfly.h"

#include <algorithm>

#include "isa.h"
#include "parallel.h"

namespace seqconv {
namespace {

constexpr int64_t kSerialWork = 1 << 16;  // multiply-adds: below, one thread does it all
constexpr int64_t kUnits = 64;  // of all heads, about: gradients are sums over them, in order

const ButterflyKernel& kernel_for(const ButterflyProblem& p) {
  return p.compute_double ? kernels().butterfly_f64 : kernels().butterfly_f32;
}

// Cut by shape alone: sums over the units must not depend on the threads.
struct Units {
  int64_t step, per_head, count;
  explicit Units(const ButterflyProblem& p) {
    const int64_t wanted = std::max<int64_t>(1, kUnits / p.heads);
    step = (p.rows() + wanted - 1) / wanted;
    per_head = (p.rows() + step - 1) / step;
    count = p.heads * per_head;
  }
};

// op(unit, head, begin, end, scratch) for every unit.
template <class Op>
Status for_each(const ButterflyProblem& p, bool backward, const Op& op) {
  const Units units(p);
  const int64_t work = p.batch * p.channels * p.n * 64;
  const int threads = work < kSerialWork ? 1 : threads_for(p.threads);
  const size_t bytes = kernel_for(p).scratch_bytes(p, backward);
  return share_out(units.count, threads, bytes, [&](int64_t i, char* scratch, bool) {
    const int64_t begin = i % units.per_head * units.step;
    op(i, i / units.per_head, begin, std::min(p.rows(), begin + units.step), scratch);
  });
}

template <class T>
void reduce(const ButterflyProblem& p, const double* sums) {
  const Units units(p);
  const int64_t size = 2 * p.elements();
  for (int64_t head = 0; head < p.heads; ++head)
    for (int64_t e = 0; e < size; ++e) {
      double total = 0;
      for (int64_t i = 0; i < units.per_head; ++i)
        total += sums[(head * units.per_head + i) * size + e];
      reinterpret_cast<T*>(p.dmatrices)[head * size + e] = static_cast<T>(total);
    }
}

}  // namespace

Status butterfly_forward(const ButterflyProblem& p) {
  const int64_t size = p.batch * p.channels * 2 * p.n * (p.compute_double ? 8 : 4);
  prefer_huge_pages(p.z, static_cast<size_t>(size));
  return for_each(p, false, [&](int64_t, int64_t head, int64_t begin, int64_t end, char* scratch) {
    kernel_for(p).forward(p, head, begin, end, scratch);
  });
}

Status butterfly_backward(const ButterflyProblem& p) {
  const int64_t size = 2 * p.elements();
  const Memory memory = allocate(static_cast<size_t>(Units(p).count * size) * sizeof(double));
  if (!memory) return Status::kOutOfMemory;
  double* sums = reinterpret_cast<double*>(memory.get());
  const Status status =
      for_each(p, true, [&](int64_t i, int64_t head, int64_t begin, int64_t end, char* scratch) {
        kernel_for(p).backward(p, head, begin, end, sums + i * size, scratch);
      });
  if (status != Status::kOk) return status;
  if (p.compute_double)
    reduce<double>(p, sums);
  else
    reduce<float>(p, sums);
  return Status::kOk;
}

}  // namespace seqconv
