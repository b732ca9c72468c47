// Whatever the compiler's default target has: SSE2 on x86-64, NEON on arm64.
#include <math.h>

#include "kernel.h"

namespace seqconv {
namespace portable {
#include "simd.h"
//
#include "fft.h"
//
#include "kernel_impl.h"
}  // namespace portable

const IsaKernels kPortable = {"portable", [] { return true; }, portable::kKernel<float>,
                              portable::kKernel<double>};

}  // namespace seqconv
