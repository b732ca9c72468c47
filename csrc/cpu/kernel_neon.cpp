// NEON, which every arm64 processor has.
#if defined(__aarch64__)
#include <math.h>

#include "kernel.h"

#define SEQCONV_VECTOR_BYTES 16
namespace seqconv {
namespace neon {
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
}  // namespace neon

const IsaKernels kNeon = {"neon",
                          [] { return true; },
                          neon::kKernel<float>,
                          neon::kKernel<double>,
                          neon::kSsmKernel<float>,
                          neon::kSsmKernel<double>,
                          neon::kButterflyKernel<float>,
                          neon::kButterflyKernel<double>};

}  // namespace seqconv
#endif
