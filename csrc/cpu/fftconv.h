// The operator's problem as the CPU kernels see it: plain pointers, sizes and strides.
//
//   x = pre_gate * u,  v[t] = sum_s k[t-s] x[s] (+ sum_{s>t} k_rev[s-t-1] x[s]) + skip * x[t],
//   y = post_gate * activation(v)
//
// Knows nothing of Python or torch. Arguments arrive validated; sizes may be zero.
#pragma once
#include <cstdint>

namespace seqconv {

enum class Dtype : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
// Bytes. Static, so that no instruction set's copy serves the others.
static inline int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}
enum class Activation : int { kNone = 0, kGelu = 1, kSilu = 2, kRelu = 3 };

// A tensor indexed (batch, head, channel, time); axes it does not have carry stride 0.
// Strides count elements. data is null for an argument that is absent or not asked for.
struct Tensor {
  char* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t stride[4] = {0, 0, 0, 0};
  explicit operator bool() const { return data != nullptr; }
};

struct Problem {
  int64_t batch, heads, channels, length;
  int64_t taps,
      taps_rev;  // of k and k_rev, cut to what can reach an output: <= length, <= length - 1
  bool kernel_per_sample, skip_per_head, compute_double;
  Activation activation;
  int threads;  // how many parallel_for has; results do not depend on it
  Tensor u, k, k_rev, skip, pre_gate, post_gate;
  Tensor y;                                                 // forward only
  Tensor dy, du, dk, dk_rev, dskip, dpre_gate, dpost_gate;  // backward only; null where not wanted
};

// Signature of libtorch's C function torch_parallel_for.
using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, RangeFunction, void*);

enum class Status { kOk, kOutOfMemory };

// All sizes >= 1 (batch, heads, channels, length); taps may be 0.
Status forward(const Problem& problem);
Status backward(const Problem& problem);

void set_parallel_for(ParallelFor function);

// In a forked child thread pools hang, OpenMP's for one: there everything runs on the calling
// thread.
bool forked();

// The instruction set in use: the best that runs here, or what set_isa() chose.
const char* isa();
bool set_isa(const char* name);  // false if unknown or not runnable here

// How calls of these sizes are carried out: `blocks` transforms of n points each, or, with n = 0, a
// direct sum.
struct Method {
  bool direct;
  int64_t n, blocks;
};
Method method(int64_t length, int64_t taps, int64_t taps_rev, bool compute_double);

}  // namespace seqconv
