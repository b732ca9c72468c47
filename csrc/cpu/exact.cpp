// Shares the rows of the exactly causal convolution out among threads.
#include "exact.h"

#include <algorithm>
#include <memory>

#include "isa.h"
#include "parallel.h"

namespace seqconv {
namespace {

constexpr int64_t kSerialWork = 1 << 13;  // points: below, one thread does them all
constexpr int64_t kUnits = 4;             // for each thread, if the batch can be cut

template <class T>
const ExactKernel<T>& kernel_for(int64_t n) {
  const IsaKernels* isa = &kernels();
  if (isa->shorter && n < kShort) isa = isa->shorter;
  if constexpr (sizeof(T) == 4)
    return isa->exact_f32;
  else
    return isa->exact_f64;
}

// op(n, blocks of a group, how many blocks further the taps reach) for every level of a row.
template <class Op>
void for_each_level(int64_t length, int64_t taps, const Op& op) {
  const int64_t far = taps - 1;  // the last lag
  for (int64_t n = kExactBlock; taps > kDirectTaps && n < length; n *= kFan) {
    const bool last = far <= kMost * n;
    const int64_t blocks = last ? INT64_MAX : kFan, reach = last ? (far + n - 1) / n : kFan - 1;
    op(n, blocks, std::min(reach, (length - 1) / n));
    if (last) break;
  }
}

template <class T>
class Run {
 public:
  explicit Run(const Problem& problem) : p_(problem), kernel_(kernel_for<T>(problem.length)) {
    for_each_level(p_.length, p_.taps, [&](int64_t n, int64_t blocks, int64_t reach) {
      const ExactKernel<T>& kernel = kernel_for<T>(n);
      const std::shared_ptr<const Plan<T>>& plan = plans_[levels_.count] =
          get_plan<T>(n, kernel.quads);
      complete_ = complete_ && plan;
      levels_.level[levels_.count++] = {blocks,       reach,       plan.get(),
                                        kernel.split, kernel.join, kernel.spectrum};
    });
  }

  Status forward() const {
    return share(1, [&](const ExactUnit& unit, char* scratch) {
      kernel_.forward(p_, levels_, unit, scratch);
    });
  }

  Status backward() const {
    Problem linear = p_;  // v, whose gradient is dv
    const bool gated = p_.post_gate || p_.activation != Activation::kNone;
    Memory memory;
    if (gated) {
      const int64_t rows = p_.batch * p_.heads * p_.channels;
      memory = allocate(sizeof(T) * static_cast<size_t>(rows * p_.length));
      if (!memory) return Status::kOutOfMemory;
      linear.dy = {memory.get(),
                   sizeof(T) == 8 ? Dtype::kFloat64 : Dtype::kFloat32,
                   {p_.heads * p_.channels * p_.length, p_.channels * p_.length, p_.length, 1}};
    }
    if (gated || p_.du || p_.dpre_gate) {
      const Status status = share(p_.heads, [&](const ExactUnit& unit, char* scratch) {
        kernel_.backward(p_, linear.dy, levels_, unit, scratch);
      });
      if (status != Status::kOk) return status;
    }
    if (!p_.dk && !p_.dskip && !p_.dbias) return Status::kOk;
    // Sums over all times, which see the future anyway.
    linear.taps = std::min(p_.taps, p_.length);
    linear.activation = Activation::kNone;
    linear.post_gate = linear.du = linear.dpre_gate = linear.dpost_gate = {};
    return seqconv::backward(linear);
  }

 private:
  const Problem& p_;
  const ExactKernel<T>& kernel_;
  std::shared_ptr<const Plan<T>> plans_[kMaxLevels];
  ExactLevels<T> levels_;
  bool complete_ = true;

  // op(unit, scratch) for units of so many heads of a channel.
  template <class Op>
  Status share(int64_t heads, const Op& op) const {
    if (!complete_) return Status::kOutOfMemory;
    const int64_t parts = p_.heads / heads, kernels = p_.channels * parts;
    const bool serial = kernels * heads * p_.batch * p_.length < kSerialWork;
    const int threads = serial ? 1 : threads_for(p_.threads);
    const int64_t cuts = std::min(p_.batch, std::max<int64_t>(1, kUnits * threads / kernels));
    const int64_t step = (p_.batch + cuts - 1) / cuts;
    const auto unit_of = [&](int64_t i) {
      ExactUnit unit{};
      unit.channel = i % kernels / parts;
      unit.head = i % parts * heads;
      unit.heads = heads;
      unit.batch = std::min(p_.batch, i / kernels * step);
      unit.batch_end = std::min(p_.batch, unit.batch + step);
      return unit;
    };
    const size_t bytes = kernel_.scratch_bytes(p_, levels_, unit_of(0));
    return share_out(kernels * cuts, threads, bytes,
                     [&](int64_t i, char* scratch, bool) { op(unit_of(i), scratch); });
  }
};

}  // namespace

Status exact_forward(const Problem& p) {
  return p.compute_double ? Run<double>(p).forward() : Run<float>(p).forward();
}
Status exact_backward(const Problem& p) {
  return p.compute_double ? Run<double>(p).backward() : Run<float>(p).backward();
}

ExactMethod exact_method(int64_t length, int64_t taps) {
  ExactMethod method{};
  for_each_level(length, taps, [&](int64_t n, int64_t, int64_t) {
    ++method.levels;
    method.n = n;
  });
  return method;
}

}  // namespace seqconv
