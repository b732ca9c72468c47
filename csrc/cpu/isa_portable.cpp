// Whatever the compiler's default target has; SSE2 on x86-64.
#define SEQCONV_ISA portable
#define SEQCONV_VECTOR_BYTES 16
#include "isa_units.h"

namespace seqconv {

const IsaKernels kPortable = portable::all_kernels("portable", [] { return true; });

}  // namespace seqconv
