// Numbers that decay below the smallest normal one become zero at once: arithmetic on those in
// between is many times slower on some processors.
#pragma once

namespace seqconv {

class [[maybe_unused]] FlushToZero {
 public:
#if defined(__x86_64__)
  FlushToZero() : saved_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(saved_ | 0x8040); }
  ~FlushToZero() { __builtin_ia32_ldmxcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

}  // namespace seqconv
