// Whatever the compiler's default target has; SSE2 on x86-64.
#include <math.h>

#include "kernel.h"

#define SEQCONV_VECTOR_BYTES 16
namespace seqconv {
namespace portable {
#include "simd.h"
//
#include "fft.h"
//
#include "rows.h"
//
#include "conv.h"
//
#include "modes.h"
//
#include "passes.h"
}  // namespace portable

const IsaKernels kPortable = {"portable",
                              [] { return true; },
                              portable::kKernel<float>,
                              portable::kKernel<double>,
                              portable::kSsmKernel<float>,
                              portable::kSsmKernel<double>,
                              portable::kButterflyKernel<float>,
                              portable::kButterflyKernel<double>};

}  // namespace seqconv
