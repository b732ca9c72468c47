// AVX-512 (F, DQ, BW, VL). Compiled for that target whatever the compiler's flags, run only where
// the processor has them.
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>

#include "isa.h"

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
// g++ 12 warns of its own intrinsics (bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")
#endif

#define SEQCONV_AVX 1  // and F16C, which every processor with AVX2 has
#define SEQCONV_VECTOR_BYTES 64
namespace seqconv {
namespace avx512 {
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
}  // namespace avx512
}  // namespace seqconv

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace seqconv {

const IsaKernels kAvx512 = {"avx512",
                            [] {
                              return __builtin_cpu_supports("avx512f") &&
                                     __builtin_cpu_supports("avx512dq") &&
                                     __builtin_cpu_supports("avx512bw") &&
                                     __builtin_cpu_supports("avx512vl") && kAvx2.runnable();
                            },
                            avx512::kKernel<float>,
                            avx512::kKernel<double>,
                            avx512::kSsmKernel<float>,
                            avx512::kSsmKernel<double>,
                            avx512::kButterflyKernel<float>,
                            avx512::kButterflyKernel<double>,
                            &kAvx2};

}  // namespace seqconv
#endif
