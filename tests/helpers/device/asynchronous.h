// Copies from global memory that happen later than they are asked for ("cp.async"). What a copy
// will write is NaN until it happens. It is as if its own thread wrote it when it waits for the
// copy.
#pragma once
#include "races.h"

namespace emulator {

inline void perform(Copy& c) {
  if (c.performed) return;
  c.performed = true;
  unsigned char* to = block().shared.data + c.to;
  std::memset(to, 0, 16);
  if (c.bytes > 0) std::memcpy(to, c.from, c.bytes);
}
inline void copy(u32 to, const void* from, int bytes) {
  Block& b = block();
  const int thread = me().linear;
  if (to % 16 || (uintptr_t)from % 16 || bytes < 0 || bytes > 16)
    fail("a copy that is not of up to 16 bytes from and to multiples of 16");
  const size_t offset = offset_of(b.shared.data + to, 16);
  const int index = (int)b.copies.size();
  b.copies.push_back({offset, from, bytes, thread, false, false});
  b.groups[thread].open.push_back(index);
  each_word(offset, 16, [&](Word& word) {
    after_write(word, access_of(thread), "copy"), after_reads(word, access_of(thread), "copy");
    word = Word{};
    word.copy = index;
  });
  std::memset(b.shared.data + offset, 0xff, 16);
  if (b.options.copies == 0) perform(b.copies[index]);
}
inline void end_of_group() {
  CopyGroups& g = block().groups[me().linear];
  g.committed.push_back(std::move(g.open));
  g.open.clear();
}
// Waits until at most `later` of the thread's groups are under way.
inline void await(size_t later) {
  Block& b = block();
  CopyGroups& g = b.groups[me().linear];
  if (b.options.copies == 2) {  // all, which is allowed
    for (size_t i = g.open.size(); i--;) perform(b.copies[g.open[i]]);
    for (size_t k = g.committed.size(); k--;)
      for (size_t i = g.committed[k].size(); i--;) perform(b.copies[g.committed[k][i]]);
  }
  for (; g.committed.size() > later; g.committed.pop_front())
    for (const int index : g.committed.front()) {
      Copy& c = b.copies[index];
      perform(c);
      c.awaited = true;
      each_word(c.to, 16, [&](Word& word) { word.copy = -1, word.write = access_of(c.thread); });
    }
}

}  // namespace emulator
