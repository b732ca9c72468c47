// The CPU kernels without Python or torch: for machines that are reached by a cross compiler and an
// emulator only.
#include <cstdio>

#include "checks.h"
#include "cpu/isa.h"

int main() {
  std::printf("instruction set: %s\n", seqconv::isa());
  const bool convolutions = standalone::convolutions();
  const bool state_spaces = standalone::state_spaces();
  const bool butterflies = standalone::butterflies();
  return convolutions && state_spaces && butterflies ? 0 : 1;
}
