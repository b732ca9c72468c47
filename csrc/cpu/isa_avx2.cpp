// AVX2 and FMA. Compiled for that target whatever the compiler's flags, run only where the
// processor has both.
#if defined(__x86_64__)
#define SEQCONV_ISA avx2
#define SEQCONV_VECTOR_BYTES 32
#include "isa.h"
#include "target.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "isa_units.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace seqconv {

const IsaKernels kAvx2 = avx2::all_kernels(
    "avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); });

}  // namespace seqconv
#endif
