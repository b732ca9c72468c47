// Shares the channels of a product of spectra out among threads.
#include "real_part.h"

#include "flush.h"
#include "isa.h"
#include "parallel.h"

namespace seqconv {
namespace {

constexpr int64_t kSerialWork = 1 << 14;  // products: below, one thread does it all

template <class Unit>
Status for_each_channel(const RealPartProblem& p, const Unit& unit) {
  const int64_t work = p.batch * p.heads * p.channels * p.n;
  const int threads = work < kSerialWork ? 1 : threads_for(p.threads);
  return share_out(p.channels, threads, 0, [&](int64_t channel, char*, bool) {
    const FlushToZero flush;
    unit(p, channel);
  });
}

}  // namespace

Status real_part_forward(const RealPartProblem& p) {
  const IsaKernels& isa = kernels();
  return for_each_channel(p, (p.compute_double ? isa.real_part_f64 : isa.real_part_f32).forward);
}

Status real_part_backward(const RealPartProblem& p) {
  const IsaKernels& isa = kernels();
  return for_each_channel(p, (p.compute_double ? isa.real_part_f64 : isa.real_part_f32).backward);
}

}  // namespace seqconv
