// The threads of a team, spread over the pieces of their work.
#pragma once
#include "isa.h"
#include "target.h"

namespace seqconv::SEQCONV_ISA {

// op(begin, end) over ranges of [0, n), each by one of the team; all of it is done on return.
template <class Op>
void spread(Team& team, int64_t n, const Op& op) {
  if (!team.board) return op(0, n);
  Board& board = *team.board;
  const auto draw = [&] { return __atomic_fetch_add(&board.next, 1, __ATOMIC_RELAXED); };
  if (team.ticket < 0) team.ticket = draw();
  while (team.ticket - team.base < n) {
    op(team.ticket - team.base, team.ticket - team.base + 1);
    __atomic_fetch_add(&board.done, 1, __ATOMIC_RELEASE);
    team.ticket = draw();
  }
  team.base += n;
  for (int64_t i = 0; __atomic_load_n(&board.done, __ATOMIC_ACQUIRE) < team.base; ++i)
    wait_a_little(i);
}

// The same in ranges of `piece`.
template <class Op>
void spread(Team& team, int64_t n, int64_t piece, const Op& op) {
  if (!team.board) return op(0, n);
  spread(team, (n + piece - 1) / piece,
         [&](int64_t begin, int64_t end) { op(begin * piece, end * piece < n ? end * piece : n); });
}

// op() by one of the team.
template <class Op>
void once(Team& team, const Op& op) {
  spread(team, 1, [&](int64_t, int64_t) { op(); });
}

}  // namespace seqconv::SEQCONV_ISA
