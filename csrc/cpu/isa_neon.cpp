// NEON, which every arm64 processor has.
#if defined(__aarch64__)
#include <math.h>

#include "isa.h"

#define SEQCONV_VECTOR_BYTES 16
namespace seqconv {
namespace neon {
#include "vectors.h"
//
#include "transform.h"
//
#include "rows.h"
//
#include "fftconv_unit.h"
//
#include "ssm_unit.h"
//
#include "butterfly_pass.h"
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
