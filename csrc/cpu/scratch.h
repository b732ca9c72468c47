// The caller's memory, handed out piece by piece.
#pragma once
#include "target.h"

namespace seqconv::SEQCONV_ISA {

// Pieces begin on cache lines. Without memory it only counts, and every piece is null: whoever asks
// how much is needed lays out the same pieces as whoever uses them.
class Scratch {
 public:
  Scratch() = default;  // counts
  explicit Scratch(char* memory) : base_(memory) {}
  template <class E>
  E* take(int64_t count) {
    const size_t offset = used_;
    used_ += (static_cast<size_t>(count) * sizeof(E) + 63) / 64 * 64;
    return base_ ? reinterpret_cast<E*>(base_ + offset) : nullptr;
  }
  bool counts() const { return !base_; }
  size_t used() const { return used_; }

 private:
  char* base_ = nullptr;
  size_t used_ = 0;
};

}  // namespace seqconv::SEQCONV_ISA
