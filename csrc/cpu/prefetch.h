// Memory that is fetched into cache while something else is in work.
#pragma once
#include "target.h"

namespace seqconv::SEQCONV_ISA {

// Memory soon read or written: as many lines as a row of T has,
// `step` bytes apart.
struct Ahead {
  struct Lines {
    const char* first;
    int64_t step;
  };
  static constexpr int kMost = 8;
  int reads = 0, writes = 0;
  Lines read[kMost], write[kMost];
  void will_read(Lines lines) {
    if (lines.first && reads < kMost) read[reads++] = lines;
  }
  void will_write(Lines lines) {
    if (lines.first && writes < kMost) write[writes++] = lines;
  }
  template <class T>
  void will_read_spectrum(const T* spectrum) {  // twice as many lines
    const char* first = reinterpret_cast<const char*>(spectrum);
    for (int half = 0; spectrum && half < 2; ++half) will_read({first + 64 * half, 128});
  }
};
// Lines [line, line + kLines) of all of them; a call would push out a loop's registers.
template <int64_t kLines>
SEQCONV_INLINE void fetch(const Ahead& ahead, int64_t line) {
  for (int i = 0; i < ahead.reads; ++i) {
    const char* at = ahead.read[i].first + line * ahead.read[i].step;
    for (int64_t j = 0; j < kLines; ++j, at += ahead.read[i].step) __builtin_prefetch(at, 0, 2);
  }
  for (int i = 0; i < ahead.writes; ++i) {
    const char* at = ahead.write[i].first + line * ahead.write[i].step;
    for (int64_t j = 0; j < kLines; ++j, at += ahead.write[i].step) __builtin_prefetch(at, 1, 2);
  }
}

}  // namespace seqconv::SEQCONV_ISA
