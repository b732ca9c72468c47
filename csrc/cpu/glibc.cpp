// The other symbol that an old glibc lacks (see glibc.h). From 2.32 on it tells whether a process
// has one thread only, and then std::shared_ptr counts without atomic operations. This copy, which
// nothing else sees, always says that there may be more.
#if __has_include(<sys/single_threaded.h>)
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
#endif
