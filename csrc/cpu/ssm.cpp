// Shares the channels of a state space model's kernel out among threads.
#include "ssm.h"

#include <algorithm>

#include "flush.h"
#include "isa.h"
#include "parallel.h"

namespace seqconv {
namespace {

constexpr int64_t kSerialWork = 1 << 16;  // multiply-adds: below, one thread does it all
constexpr int64_t kFewChannels = 8;
constexpr int64_t kParts = 4;  // of the length, where there are too few channels

const SsmKernel& kernel_for(const SsmProblem& p) {
  return p.single ? kernels().ssm_f32 : kernels().ssm_f64;
}

// op(unit, scratch) for every unit, by as many threads as the problem may use.
template <class Op>
Status for_each(const SsmProblem& p, bool backward, int64_t units, const Op& op) {
  const int64_t work = p.heads * p.channels * p.modes * p.length;
  const int threads = work < kSerialWork ? 1 : threads_for(p.threads);
  const size_t bytes = kernel_for(p).scratch_bytes(p, backward);
  return share_out(units, threads, bytes, [&](int64_t i, char* scratch, bool) {
    const FlushToZero flush;
    op(i, scratch);
  });
}

// Cut by shape alone: sums over the parts must not depend on the threads.
struct Parts {
  int64_t blocks, step, count;
  Parts(const SsmProblem& p, bool backward) {
    blocks = kernel_for(p).blocks(p, backward);
    const int64_t wanted = p.channels < kFewChannels ? std::min(blocks, kParts) : 1;
    step = (blocks + wanted - 1) / wanted;
    count = (blocks + step - 1) / step;
  }
  int64_t begin(int64_t part) const { return part * step; }
  int64_t end(int64_t part) const { return std::min(blocks, part * step + step); }
};

}  // namespace

Status ssm_forward(const SsmProblem& p) {
  const Parts parts(p, false);
  const int64_t size = p.heads * p.channels * p.length * (p.single ? 4 : 8);
  prefer_huge_pages(p.k, static_cast<size_t>(size));
  return for_each(p, false, p.channels * parts.count, [&](int64_t i, char* scratch) {
    const int64_t part = i % parts.count;
    kernel_for(p).forward(p, i / parts.count, parts.begin(part), parts.end(part), scratch);
  });
}

Status ssm_backward(const SsmProblem& p) {
  const Parts parts(p, true);
  const int64_t size = 4 * p.heads * p.channels * p.modes;
  const Memory memory = allocate(static_cast<size_t>(parts.count * size) * sizeof(double));
  if (!memory) return Status::kOutOfMemory;
  double* sums = reinterpret_cast<double*>(memory.get());
  const Status status = for_each(p, true, p.channels * parts.count, [&](int64_t i, char* scratch) {
    const int64_t part = i % parts.count;
    kernel_for(p).backward(p, i / parts.count, parts.begin(part), parts.end(part),
                           sums + part * size, scratch);
  });
  if (status != Status::kOk) return status;
  for (int64_t part = 1; part < parts.count; ++part)
    for (int64_t i = 0; i < size; ++i) sums[i] += sums[part * size + i];
  const int64_t modes = p.channels * p.modes;
  for (int64_t i = 0; i < modes; ++i) {
    double re = 0, im = 0;
    for (int64_t j = i; j < p.heads * modes; j += modes) {
      const double *s = sums + 4 * j, *w = p.w + 2 * j;
      p.dw[2 * j] = s[0];
      p.dw[2 * j + 1] = -s[1];
      re += w[0] * s[2] - w[1] * s[3];
      im += w[0] * s[3] + w[1] * s[2];
    }
    p.da[2 * i] = re;
    p.da[2 * i + 1] = -im;
  }
  return Status::kOk;
}

}  // namespace seqconv
