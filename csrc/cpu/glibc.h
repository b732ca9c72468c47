// What lets an extension that was compiled beside a young glibc load beside an old one. Here: the
// units that call exp say which one they mean. That of glibc 2.29 differs from the first one only
// in that it never asks for the error handling of System V.
#pragma once
#include <math.h>

#if defined(__GLIBC__) && defined(__x86_64__) && defined(__LP64__)
__asm__(".symver exp, exp@GLIBC_2.2.5");
#endif
