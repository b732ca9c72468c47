// What the headers below an instruction set's translation unit (isa_*.cpp) share. Each such unit
// compiles them into a namespace of its own, SEQCONV_ISA, for vectors of SEQCONV_VECTOR_BYTES. It
// includes whatever is not its own before it switches the compiler's target. By itself a header is
// part of the portable unit.
#pragma once
#include <cstddef>
#include <cstdint>

#include "glibc.h"

#ifndef SEQCONV_ISA
#define SEQCONV_ISA portable
#define SEQCONV_VECTOR_BYTES 16
#endif

// AVX2, FMA, and F16C, which every processor with AVX2 has.
#define SEQCONV_AVX (SEQCONV_VECTOR_BYTES >= 32)
#if SEQCONV_AVX
#include <immintrin.h>
#endif

#define SEQCONV_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define SEQCONV_UNROLL _Pragma("unroll")
#else
#define SEQCONV_UNROLL _Pragma("GCC unroll 16")
#endif
