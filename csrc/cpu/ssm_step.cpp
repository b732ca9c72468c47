// Shares the rows of a state space model's step out among threads.
#include "ssm_step.h"

#include <algorithm>

#include "flush.h"
#include "isa.h"
#include "parallel.h"

namespace seqconv {
namespace {

constexpr int64_t kSerialWork = 1 << 15;  // modes: below, waking threads costs more than it saves
constexpr int64_t kSamples = 4, kChannels = 64;  // of a unit

}  // namespace

Status ssm_step(const SsmStepProblem& p) {
  const auto unit = p.x.dtype == Dtype::kFloat64 ? kernels().ssm_step_f64 : kernels().ssm_step_f32;
  const auto run = [&](const SsmStepUnit& rows) {
    const FlushToZero flush;
    unit(p, rows);
  };
  const int threads = p.batch * p.channels * p.modes < kSerialWork ? 1 : threads_for(p.threads);
  if (threads == 1) {
    run({0, p.batch, 0, p.channels});
    return Status::kOk;
  }
  const int64_t parts = (p.channels + kChannels - 1) / kChannels;
  const int64_t units = parts * ((p.batch + kSamples - 1) / kSamples);
  std::atomic<int64_t> next{0};
  in_parallel(std::min<int64_t>(threads, units), [&] {
    for (int64_t i; (i = next.fetch_add(1)) < units;) {
      const int64_t b = i / parts * kSamples, h = i % parts * kChannels;
      run({b, std::min(p.batch, b + kSamples), h, std::min(p.channels, h + kChannels)});
    }
  });
  return Status::kOk;
}

}  // namespace seqconv
