// Copies that happen later than they are asked for, and what waits for them ("Asynchronous
// operations", "mbarrier", "cp.async", "cp.async.bulk"). What a copy will write is NaN until it
// happens, at the worst time that the ISA allows. A bulk copy passes through the async proxy: what
// ordinary stores wrote needs a fence.proxy.async before it.
#pragma once
#include "memory.h"

inline MBarrier& mbarrier_at(u64 address, int lane) {
  const auto found = machine.mbarriers.find(address);
  if (found == machine.mbarriers.end()) throw Fault{lane, "no mbarrier was initialised there"};
  MBarrier& b = found->second;
  if (b.made_by != machine.warp && !machine.happened(b.made_by, b.made_at))
    throw Fault{lane, "mbarrier used without a barrier after its initialisation"};
  return b;
}
inline void complete_phase(MBarrier& b) {
  if (b.pending || b.bytes) return;
  ++b.phase, b.pending = b.count;
  std::memcpy(b.passed, b.clock, sizeof b.passed);
  b.passed_loads.swap(b.loads), b.loads.clear();
}
inline void mbarrier_init(u8* frame, Instruction& i, u32 lanes) {
  each_lane(lanes, [&](int lane) {
    const u64 address = address_in(frame, i.address, lane);
    std::memset(resolve<Space::kShared>(address, 8, lane, true, i), 0, 8);
    MBarrier b;
    b.count = b.pending = lanes_of<u32>(frame, i.b)[lane];
    b.made_by = machine.warp, b.made_at = machine.now();
    machine.mbarriers[address] = b;
  });
}
template <bool kExpects>
void mbarrier_arrive(u8* frame, Instruction& i, u32 lanes) {
  each_lane(lanes, [&](int lane) {
    MBarrier& b = mbarrier_at(address_in(frame, i.address, lane), lane);
    if (kExpects) b.bytes += lanes_of<u32>(frame, i.b)[lane];
    if (!b.pending) throw Fault{lane, "more arrivals at an mbarrier than it counts"};
    --b.pending, machine.join(b.clock, machine.clock[machine.warp]);
    complete_phase(b);
  });
  machine.tick();
}
inline void mark_awaited(Copy& c) {
  c.awaited = true;
  for (const auto& s : c.seen)
    if (s.first == machine.warp) return;
  c.seen.push_back({machine.warp, machine.now()});
}
// try_wait.parity: true once the phase of that parity is over. A warp whose lanes still wait stands
// aside.
inline void mbarrier_try_wait(u8* frame, Instruction& i, u32 lanes) {
  u32 done = 0;
  each_lane(lanes, [&](int lane) {
    MBarrier& b = mbarrier_at(address_in(frame, i.address, lane), lane);
    if ((b.phase & 1) == (lanes_of<u32>(frame, i.b)[lane] & 1)) {
      machine.must_wait = true;
      return;
    }
    done |= 1u << lane, machine.join(machine.clock[machine.warp], b.passed);
    for (u32 copy : b.passed_loads) mark_awaited(machine.copies[copy]);
  });
  machine.tick(), set_lanes(predicate(frame, i.d), done, lanes);
}

inline void perform(u32 index) {
  Copy& c = machine.copies[index];
  if (c.performed) return;
  c.performed = true;
  u8* const shared = machine.shared + c.shared;
  if (c.type == Copy::kBulkStore) {
    std::memcpy((void*)c.global, shared, c.bytes);
    return;
  }
  std::memset(shared, 0, c.bytes), std::memcpy(shared, (const void*)c.global, c.read);
  if (c.type == Copy::kPiece) return;
  MBarrier& b = machine.mbarriers.at(c.mbarrier);
  b.bytes -= c.bytes, b.loads.push_back(index);
  complete_phase(b);
}
// Nobody can go on before one of the loads under way has come.
inline bool perform_some_load() {
  const size_t n = machine.copies.size();
  for (size_t k = 0; k < n; ++k) {
    const size_t i = machine.launch.copies == 2 ? n - 1 - k : k;
    if (machine.copies[i].type == Copy::kBulkLoad && !machine.copies[i].performed)
      return perform((u32)i), true;
  }
  return false;
}
inline u32 add_copy(Copy::Type type, u64 global, u32 at, u32 bytes, u32 read, int lane) {
  Copy c{};
  c.type = type, c.global = global, c.shared = at, c.bytes = bytes, c.read = read;
  c.thread = machine.thread(lane);
  machine.copies.push_back(c);
  return (u32)machine.copies.size() - 1;
}

template <bool kStore>
void bulk_copy(u8* frame, Instruction& i, u32 lanes) {
  each_lane(lanes, [&](int lane) {
    const u32 bytes = lanes_of<u32>(frame, i.b)[lane];
    const u64 address = address_in(frame, i.address, lane);
    const u64 global = address_in(frame, i.global, lane);
    if (address % 16 || bytes % 16 || global % 16)
      throw Fault{lane, "bulk copy: not a multiple of 16 bytes"};
    const u32 at = shared_offset(address, bytes, lane);
    in_global(global, bytes, lane, kStore, i);
    const u32 index =
        add_copy(kStore ? Copy::kBulkStore : Copy::kBulkLoad, global, at, bytes, bytes, lane);
    if (machine.shared_races())
      each_word(at, bytes, [&](u64 word) {
        SharedWord& w = machine.words[word];
        if (kStore && !w.known) throw Fault{lane, "bulk store of shared memory that nobody wrote"};
        after_write(w, lane, kStore ? "bulk store" : "bulk load");
        if (w.writer >= 0 && machine.fenced[machine.warp][w.writer / 32] < w.clock)
          throw Fault{lane, "bulk copy of what ordinary stores wrote, without a fence.proxy.async"};
        if (kStore)
          w.store = (s32)index;
        else
          after_reads(w, word, lane, "bulk load"), forget(w, word), w.load = (s32)index;
      });
    if (kStore) {
      machine.bulk_groups[machine.thread(lane)].open.push_back(index);
    } else {
      const u64 barrier = address_in(frame, i.mbarrier, lane);
      machine.copies[index].mbarrier = barrier;
      mbarrier_at(barrier, lane);
      std::memset(machine.shared + at, 0xff, bytes);
    }
    if (machine.launch.copies == 0) perform(index);
  });
}
// cp.async: bytes beyond those that are read become zero. Done for its own thread after a wait, for
// others after a barrier that follows.
inline void piece_copy(u8* frame, Instruction& i, u32 lanes) {
  each_lane(lanes, [&](int lane) {
    const u32 bytes = (u32)i.count, read = lanes_of<u32>(frame, i.b)[lane];
    const u64 address = address_in(frame, i.address, lane);
    const u64 global = address_in(frame, i.global, lane);
    if (address % bytes || global % bytes || read > bytes)
      throw Fault{lane, "cp.async: misaligned"};
    const u32 at = shared_offset(address, bytes, lane);
    if (read) in_global(global, read, lane, false, i);
    const u32 index = add_copy(Copy::kPiece, global, at, bytes, read, lane);
    if (machine.shared_races())
      each_word(at, bytes, [&](u64 word) {
        SharedWord& w = machine.words[word];
        after_write(w, lane, "cp.async"), after_reads(w, word, lane, "cp.async");
        forget(w, word), w.load = (s32)index;
      });
    machine.piece_groups[machine.thread(lane)].open.push_back(index);
    std::memset(machine.shared + at, 0xff, bytes);
    if (machine.launch.copies == 0) perform(index);
  });
}
template <bool kBulk>
CopyGroups& groups_of(int lane) {
  return (kBulk ? machine.bulk_groups : machine.piece_groups)[machine.thread(lane)];
}
template <bool kBulk>
void commit_group(u8*, Instruction&, u32 lanes) {
  each_lane(lanes, [&](int lane) {
    CopyGroups& g = groups_of<kBulk>(lane);
    g.committed.push_back(std::move(g.open)), g.open.clear();
  });
}
template <bool kBulk>
void wait_group(u8* frame, Instruction& i, u32 lanes) {
  each_lane(lanes, [&](int lane) {
    CopyGroups& g = groups_of<kBulk>(lane);
    if (!kBulk && machine.launch.copies == 2) {  // all, which is allowed
      for (size_t k = g.open.size(); k--;) perform(g.open[k]);
      for (size_t n = g.committed.size(); n--;)
        for (size_t k = g.committed[n].size(); k--;) perform(g.committed[n][k]);
    }
    while (g.committed.size() > lanes_of<u32>(frame, i.a)[lane]) {
      for (u32 index : g.committed.front()) {
        perform(index);
        Copy& c = machine.copies[index];
        if (kBulk) {
          mark_awaited(c);
          continue;
        }
        c.awaited = true;  // from here on as if the thread had stored it now
        if (machine.shared_races())
          each_word(c.shared, c.bytes, [&](u64 word) {
            SharedWord& w = machine.words[word];
            if (w.load != (s32)index) return;
            w.load = -1, w.writer = c.thread, w.clock = machine.now(),
            w.in_warp = machine.warp_time;
          });
      }
      g.committed.pop_front();
    }
  });
  if (kBulk) machine.tick();
}
inline void proxy_fence(u8*, Instruction&, u32) {
  machine.join(machine.fenced[machine.warp], machine.clock[machine.warp]);
  machine.tick();
}
inline void no_effect(u8*, Instruction&, u32) {}
