// NEON, which every arm64 processor has.
#if defined(__aarch64__)
#define SEQCONV_ISA neon
#define SEQCONV_VECTOR_BYTES 16
#include "isa_units.h"

namespace seqconv {

const IsaKernels kNeon = neon::all_kernels("neon", [] { return true; });

}  // namespace seqconv
#endif
