// Loads and stores: bounds, alignment, memory that nobody wrote, and races. Two accesses race if
// one of them writes, no barrier of their block lies between them and, in one warp, no
// bar.warp.sync ("Memory Consistency Model"; shfl, mma and ldmatrix order nothing). Blocks are
// never ordered.
#pragma once
#include <set>

#include "state.h"

inline std::string of_thread(s32 thread) { return " of thread " + std::to_string(thread); }

// ---- global memory ----
inline s32 warp_of(s32 thread) { return thread >= 0 ? thread / 32 : -2 - thread; }
inline bool unordered(u32 time, u32 in_warp, u32 clock, s32 other, s32 mine) {
  if (time < machine.block_start) return time > 0;
  if (other == kSeveralWarps) return time == machine.time;
  const s32 warp = warp_of(other);
  if (warp == (s32)machine.warp) return other != mine && in_warp == machine.warp_time;
  return !machine.happened((u32)warp, clock);
}
inline void touch_global(GlobalWord& w, int lane, bool write) {
  const s32 mine = machine.thread(lane);
  const auto check = [&](const char* what, u32 time, u32 in_warp, u32 clock, s32 other) {
    if (!unordered(time, in_warp, clock, other, mine)) return;
    const std::string whose = time < machine.block_start ? " of another block"
                              : other < 0                ? " of several threads"
                                                         : of_thread(other);
    throw Fault{lane, std::string("race in global memory: ") + what + whose};
  };
  check(write ? "write after write" : "read after write", w.written, w.written_in_warp,
        w.write_clock, w.writer);
  if (write) {
    check("write after read", w.read_by_earlier_block ? 1 : w.read, w.read_in_warp, w.read_clock,
          w.reader);
    w.writer = mine, w.written = machine.time;
    w.written_in_warp = machine.warp_time, w.write_clock = machine.now();
    return;
  }
  if (w.read && w.read < machine.block_start) w.read_by_earlier_block = true;
  if (!unordered(w.read, w.read_in_warp, w.read_clock, w.reader, mine) ||
      w.read < machine.block_start)
    w.reader = mine;
  else if (w.reader != kSeveralWarps && warp_of(w.reader) == (s32)machine.warp)
    w.reader = several_lanes(machine.warp);
  else
    w.reader = kSeveralWarps;
  w.read = machine.time, w.read_in_warp = machine.warp_time, w.read_clock = machine.now();
}
// Within the ranges of living tensors, where they are known; else a wild access ends in a signal.
inline u8* in_global(u64 address, u32 bytes, int lane, bool write, Instruction& i) {
  std::vector<Range>& ranges = machine.ranges;
  if (ranges.empty()) return (u8*)address;
  const auto inside = [&](const Range& r) {
    return address - r.begin < r.size && address - r.begin + bytes <= r.size;
  };
  if ((size_t)i.range >= ranges.size() || !inside(ranges[(size_t)i.range])) {
    auto r = std::upper_bound(ranges.begin(), ranges.end(), address,
                              [](u64 x, const Range& y) { return x < y.begin; });
    if (r == ranges.begin() || !inside(*--r))
      throw Fault{lane, "outside of global memory: " + hexadecimal(address)};
    i.range = (s32)(r - ranges.begin());
  }
  if (machine.global_races()) {
    Range& r = ranges[(size_t)i.range];
    if (!r.words) r.words = (GlobalWord*)calloc(r.size / 2 + 1, sizeof(GlobalWord));
    const u64 at = address - r.begin;
    for (u64 w = at / 2; w <= (at + bytes - 1) / 2; ++w) touch_global(r.words[w], lane, write);
  }
  return (u8*)address;
}

// ---- shared memory ----
inline bool awaited_by_me(const Copy& c) {
  for (const auto& [warp, clock] : c.seen)
    if (warp == machine.warp || machine.happened(warp, clock)) return true;
  return false;
}
inline void after_write(const SharedWord& w, int lane, const char* what) {
  if (w.load >= 0 && !awaited_by_me(machine.copies[(size_t)w.load]))
    throw Fault{lane, std::string("shared memory: ") + what +
                          " of what an asynchronous copy writes, which nobody waited for"};
  const bool several = w.together || machine.together;
  if (w.writer < 0 || (w.writer == machine.thread(lane) && !several)) return;
  const u32 warp = (u32)w.writer / 32;
  if (warp == machine.warp ? w.in_warp == machine.warp_time : !machine.happened(warp, w.clock))
    throw Fault{
        lane, std::string("race in shared memory: ") + what + " after write" + of_thread(w.writer)};
}
inline Reader* readers_of(u64 word) { return &machine.readers[word * machine.warps]; }
inline void after_reads(const SharedWord& w, u64 word, int lane, const char* what) {
  if (w.store >= 0 && !awaited_by_me(machine.copies[(size_t)w.store]))
    throw Fault{lane, std::string("shared memory: ") + what +
                          " to what an asynchronous store reads, which nobody waited for"};
  for (u32 v = 0; v < machine.warps; ++v) {
    const Reader& r = readers_of(word)[v];
    if (!r.clock || (r.thread == machine.thread(lane) && !machine.together)) continue;
    if (v == machine.warp ? r.in_warp == machine.warp_time : !machine.happened(v, r.clock))
      throw Fault{lane, std::string("race in shared memory: ") + what + " after read" +
                            (r.thread < 0 ? " of several threads of warp " + std::to_string(v)
                                          : of_thread(r.thread))};
  }
}
inline void forget(SharedWord& w, u64 word) {
  std::fill_n(readers_of(word), machine.warps, Reader{});
  w = SharedWord{};
  w.known = true;
}
inline void touch_shared(u64 word, int lane, bool write) {
  SharedWord& w = machine.words[word];
  const s32 mine = machine.thread(lane);
  if (!write && !w.known) throw Fault{lane, "shared memory is read before it was written"};
  after_write(w, lane, write ? "write" : "read");
  if (write) {
    after_reads(w, word, lane, "write");
    forget(w, word);
    w.writer = mine, w.clock = machine.now(), w.in_warp = machine.warp_time;
    w.together = machine.together;
    return;
  }
  Reader& r = readers_of(word)[machine.warp];
  const bool again = r.clock && r.in_warp == machine.warp_time && r.thread != mine;
  r = {machine.now(), machine.warp_time, again || machine.together ? -2 : mine};
}
template <class F>
void each_word(u32 at, u32 bytes, F&& f) {
  for (u64 w = at / 2; bytes && w <= (at + bytes - 1) / 2; ++w) f(w);
}
inline u32 shared_offset(u64 address, u32 bytes, int lane) {
  const u64 at = address - kSharedBase;
  if (at >= machine.launch.shared || at + bytes > machine.launch.shared)
    throw Fault{lane, "outside of shared memory: offset " + std::to_string((s64)at) + " of " +
                          std::to_string(machine.launch.shared)};
  return (u32)at;
}
inline u8* in_shared(u64 address, u32 bytes, int lane, bool write) {
  const u32 at = shared_offset(address, bytes, lane);
  if (machine.counts_banks()) machine.banked.push_back({at, bytes});
  if (machine.shared_races()) each_word(at, bytes, [&](u64 w) { touch_shared(w, lane, write); });
  return machine.shared + at;
}

// Shared memory has 32 banks of 4 bytes, and serves 128 bytes at a time: 8 lanes of 16 bytes, 16 of
// 8 or all of fewer. Different words of one bank take a turn each.
inline u32 bank_conflicts(const std::vector<std::pair<u32, u32>>& lanes) {
  u32 extra = 0;
  const size_t at_once = 128 / std::max(4u, lanes.empty() ? 4u : lanes[0].second);
  for (size_t first = 0; first < lanes.size(); first += at_once) {
    std::set<u32> words;
    for (size_t i = first; i < std::min(lanes.size(), first + at_once); ++i)
      for (u32 b = 0; b < lanes[i].second; b += 4) words.insert((lanes[i].first + b) / 4);
    u32 turns[32] = {}, most = 1;
    for (u32 word : words) most = std::max(most, ++turns[word % 32]);
    extra += most - 1;
  }
  return extra;
}

// ---- state spaces ("State Spaces", "Generic Addressing") ----
template <Space kSpace>
u8* resolve(u64 address, u32 bytes, int lane, bool write, Instruction& i) {
  if (address % bytes) throw Fault{lane, "misaligned address " + hexadecimal(address)};
  if (kSpace == Space::kShared) return in_shared(address, bytes, lane, write);
  if (kSpace == Space::kParameters) {
    const u64 at = address - (u64)machine.parameters;
    if (at >= machine.parameters_size || at + bytes > machine.parameters_size)
      throw Fault{lane, "outside of the parameters"};
    return (u8*)address;
  }
  if (kSpace == Space::kGeneric && address - kSharedWindow < 1ull << 32)
    return in_shared(address - kSharedWindow, bytes, lane, write);
  return in_global(address, bytes, lane, write, i);
}
inline u64 global_address(u64 generic) {  // "cvta.to.global"
  if (generic - kSharedWindow < 1ull << 32) throw Fault{0, "cvta.to.global of a shared address"};
  return generic;
}

template <Space kSpace, class T, class Register>
void load(u8* frame, Instruction& i, u32 lanes) {
  each_lane(lanes, [&](int lane) {
    const u64 address = address_in(frame, i.address, lane);
    const T* p = (const T*)resolve<kSpace>(address, sizeof(T) * (u32)i.count, lane, false, i);
    T value[4];
    for (int j = 0; j < i.count; ++j) value[j] = p[j];
    for (int j = 0; j < i.count; ++j)
      lanes_of<Register>(frame, i.elements[j])[lane] = (Register)value[j];
  });
}
template <Space kSpace, class T, class Register>
void store(u8* frame, Instruction& i, u32 lanes) {
  each_lane(lanes, [&](int lane) {
    const u64 address = address_in(frame, i.address, lane);
    T* p = (T*)resolve<kSpace>(address, sizeof(T) * (u32)i.count, lane, true, i);
    for (int j = 0; j < i.count; ++j) p[j] = (T)lanes_of<Register>(frame, i.elements[j])[lane];
  });
}
