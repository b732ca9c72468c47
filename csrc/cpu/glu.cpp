// Shares the rows of a gated linear unit out among threads.
#include "glu.h"

#include <algorithm>

#include "flush.h"
#include "isa.h"
#include "parallel.h"

namespace seqconv {
namespace {

constexpr int64_t kSerialWork = 1 << 15;  // outputs: below, one thread does it all

// op(begin, end, i) for units of rows. Cut by shape alone: sums must not depend on the threads.
template <class Op>
Status for_each_unit(const GluProblem& p, const Op& op) {
  const int threads = p.rows * p.channels < kSerialWork ? 1 : threads_for(p.threads);
  const int64_t units = (p.rows + kGluRows - 1) / kGluRows;
  return share_out(units, threads, 0, [&](int64_t i, char*, bool) {
    const FlushToZero flush;
    op(i * kGluRows, std::min(p.rows, (i + 1) * kGluRows), i);
  });
}

}  // namespace

Status glu_forward(const GluProblem& p) {
  return for_each_unit(
      p, [&](int64_t begin, int64_t end, int64_t) { kernels().glu_forward(p, begin, end); });
}

Status glu_backward(const GluProblem& p) {
  const int64_t wide = 2 * p.channels, units = (p.rows + kGluRows - 1) / kGluRows;
  Memory memory;
  if (p.dbias) {
    memory = allocate(static_cast<size_t>(units * wide) * sizeof(float));
    if (!memory) return Status::kOutOfMemory;
    std::fill_n(reinterpret_cast<float*>(memory.get()), units * wide, 0.0f);
  }
  float* sums = reinterpret_cast<float*>(memory.get());
  const Status status = for_each_unit(p, [&](int64_t begin, int64_t end, int64_t i) {
    kernels().glu_backward(p, begin, end, sums ? sums + i * wide : nullptr);
  });
  for (int64_t i = 0; sums && i < units * wide; ++i)
    p.dbias[i % wide] += static_cast<double>(sums[i]);
  return status;
}

}  // namespace seqconv
