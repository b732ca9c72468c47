// Whatever the compiler's default target has; SSE2 on x86-64.
#include <math.h>

#include "isa.h"

#define SEQCONV_VECTOR_BYTES 16
namespace seqconv {
namespace portable {
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
