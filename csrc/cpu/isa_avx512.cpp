// AVX-512 (F, DQ, BW, VL). Compiled for that target whatever the compiler's flags, run only where
// the processor has them.
#if defined(__x86_64__)
#define SEQCONV_ISA avx512
#define SEQCONV_VECTOR_BYTES 64
#include "isa.h"
#include "target.h"

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
#include "isa_units.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace seqconv {

const IsaKernels kAvx512 = avx512::all_kernels(
    "avx512",
    [] {
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
             kAvx2.runnable();
    },
    &kAvx2);

}  // namespace seqconv
#endif
