// AVX2 and FMA. Compiled for that target whatever the compiler's flags, run only where the
// processor has both.
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>

#include "isa.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define SEQCONV_AVX 1  // and F16C, which every processor with AVX2 has
#define SEQCONV_VECTOR_BYTES 32
namespace seqconv {
namespace avx2 {
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
}  // namespace avx2
}  // namespace seqconv

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace seqconv {

const IsaKernels kAvx2 = {
    "avx2",
    [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
    avx2::kKernel<float>,
    avx2::kKernel<double>,
    avx2::kSsmKernel<float>,
    avx2::kSsmKernel<double>,
    avx2::kButterflyKernel<float>,
    avx2::kButterflyKernel<double>};

}  // namespace seqconv
#endif
