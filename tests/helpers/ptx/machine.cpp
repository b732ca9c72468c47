// Runs a kernel's PTX: warps of lanes that may branch apart, barriers of blocks and of warps, one
// block after another; and the functions that tests call through ctypes.
#include <csetjmp>
#include <csignal>

#include "parse.h"

struct Warp {
  u8* frame = nullptr;
  u32 pc[32] = {};
  u32 alive = 0, at_barrier = 0, in_collective = 0,
      aside = 0;                  // masks; aside: waits for an mbarrier
  u32 barrier = 0, expected = 0;  // which barrier, and for how many threads
  u32 time = 0;

  void put(u32 lanes, u32 to) {
    each_lane(lanes, [&](int lane) { pc[lane] = to; });
  }
  u32 lanes_at(u32 lanes, u32 where) const {
    u32 found = 0;
    each_lane(lanes, [&](int lane) { found |= pc[lane] == where ? 1u << lane : 0; });
    return found;
  }
  bool ends_here(int lane) const { return !(alive >> lane & 1); }
};
static string place(const Module& m, u32 pc) {
  return "line " + std::to_string(m.code[pc].line) + ": " + m.text[pc];
}
static int first_of(u32 lanes) { return __builtin_ctz(lanes); }

static void carry_out(u8* frame, Instruction& i, u32 lanes) {
  machine.banked.clear();
  i.execute(frame, i, lanes);
  if (!machine.banked.empty()) i.conflicts += bank_conflicts(machine.banked);
}
// The lanes come to a collective; whether they go on at once, as one group. mma and ldmatrix want
// all 32; in a mask of members, those that have ended count as come ("bar.warp.sync", "shfl.sync").
static bool meet(Warp& w, Instruction& i, u32 lanes, u32 pc) {
  const int first = first_of(lanes);
  u32 members = kAllLanes;
  if (i.members >= 0) members = lanes_of<u32>(w.frame, i.members)[first] & w.alive;
  if (members & ~w.alive) throw Fault{first, "a lane of the warp has ended"};
  if (lanes & ~members) throw Fault{first, "a lane outside of its own member mask"};
  w.in_collective |= lanes, w.put(lanes, pc);
  const u32 here = w.lanes_at(w.in_collective, pc);
  if (i.members >= 0)
    each_lane(here & members, [&](int lane) {
      if ((lanes_of<u32>(w.frame, i.members)[lane] & w.alive) != members)
        throw Fault{lane, "lanes of one collective name different members"};
    });
  if ((here & members) != members) return false;
  carry_out(w.frame, i, members);
  w.in_collective &= ~members, w.put(members, pc + 1);
  return members == lanes;
}
static void come_to_barrier(Warp& w, const Instruction& i, u32 lanes) {
  const int first = first_of(lanes);
  const u32 which = lanes_of<u32>(w.frame, i.a)[first];
  const u32 expected = i.b < 0 ? 0 : lanes_of<u32>(w.frame, i.b)[first];
  if (w.at_barrier && (w.barrier != which || w.expected != expected))
    throw Fault{first, "lanes of one warp at barriers with different numbers"};
  if (which > 15 || expected % 32) throw Fault{first, "no such barrier"};
  w.barrier = which, w.expected = expected, w.at_barrier |= lanes;
  machine.progress = true;
}
// Some lanes wait in a collective, and no lane can go on.
static Fault never_met(const Module& m, const Warp& w) {
  const int lane = first_of(w.in_collective);
  const int other = first_of(~w.lanes_at(w.in_collective, w.pc[lane]));
  const bool barrier = w.at_barrier >> other & 1;
  machine.at = &m.code[w.pc[lane]];
  const string what =
      w.ends_here(other) ? " has ended" : " waits at " + place(m, w.pc[other] - barrier);
  return {lane, "lanes of one warp in different collectives: lane " + std::to_string(other) + what};
}
// Runs the warp as far as it comes alone.
static void run(Module& m, Warp& w) {
  u8* const frame = w.frame;
  machine.warp_time = w.time, w.aside = 0;
  while (const u32 ready = w.alive & ~w.at_barrier & ~w.in_collective & ~w.aside) {
    const int lane = machine.launch.order == 2 ? 31 - __builtin_clz(ready) : first_of(ready);
    u32 lanes = 1u << lane, pc = w.pc[lane], next_group = ~0u;
    if (machine.launch.order == 0) {  // the group furthest back, until it reaches the next one
      each_lane(ready, [&](int l) { pc = std::min(pc, w.pc[l]); });
      lanes = w.lanes_at(ready, pc);
      each_lane(ready & ~lanes, [&](int l) { next_group = std::min(next_group, w.pc[l]); });
    }
    while (lanes) {
      Instruction& i = m.code[pc];
      u32 active = lanes;
      if (i.guard >= 0) active &= predicate(frame, i.guard) ^ (i.guard_negated ? kAllLanes : 0);
      i.warps += active != 0, i.lanes += (u64)__builtin_popcount(active);
      machine.at = &i, machine.at_lanes = active;
      if (i.kind == Kind::kPlain) {
        if (active) carry_out(frame, i, active);
        ++pc;
      } else if (i.kind == Kind::kBranch) {
        if (active && active != lanes) {
          w.put(active, (u32)i.target), w.put(lanes & ~active, pc + 1), lanes = 0;
        } else {
          pc = active ? (u32)i.target : pc + 1;
        }
      } else if (i.kind == Kind::kTryWait) {
        machine.must_wait = false;
        if (active) carry_out(frame, i, active);
        ++pc;
        if (machine.must_wait)
          w.put(lanes, pc), w.aside |= lanes, lanes = 0;
        else
          machine.progress = true;
      } else if (i.kind == Kind::kReturn) {
        w.alive &= ~active, lanes &= ~active, ++pc;
      } else if (!active) {
        ++pc;
      } else if (active != lanes) {
        throw Fault{first_of(lanes), "a collective for some of the lanes"};
      } else if (i.kind == Kind::kBarrier) {
        come_to_barrier(w, i, lanes), w.put(lanes, pc + 1), lanes = 0;
      } else if (meet(w, i, lanes, pc)) {
        ++pc;
      } else {
        lanes = 0;
      }
      if (pc >= next_group) w.put(lanes, pc), lanes = 0;
    }
  }
  if (w.in_collective && !w.aside) throw never_met(m, w);
  w.time = machine.warp_time;
}

// Opens a barrier where all have come: what its warps did before is then known to all of them.
static bool open_barrier(const Module& m, std::vector<Warp>& warps, u32 which) {
  u32 come = 0, expected = 0;
  std::vector<u32> here;
  for (u32 k = 0; k < warps.size(); ++k) {
    const Warp& w = warps[k];
    if (!w.at_barrier || w.barrier != which) continue;
    const int first = first_of(w.at_barrier);
    machine.warp = k, machine.at = &m.code[w.pc[first] - 1];
    if (w.at_barrier != w.alive) {
      if (w.aside) continue;
      throw Fault{first, "some lanes of a warp wait at a barrier"};
    }
    const u32 apart = w.alive & ~w.lanes_at(w.alive, w.pc[first]);
    if (apart)
      throw Fault{first_of(apart),
                  "lanes of one warp at different barriers: " + place(m, w.pc[first] - 1)};
    if (!here.empty() && expected != w.expected) throw Fault{first, "a barrier with two counts"};
    expected = w.expected, here.push_back(k);
    come += w.expected ? 32 : (u32)__builtin_popcount(w.alive);
  }
  if (here.empty()) return false;
  const u32 wanted = expected ? expected : machine.launch.threads;
  if (come > wanted) throw Fault{0, "more threads at a barrier than it counts"};
  if (come < wanted) return false;
  u32 clock[32] = {}, fenced[32] = {};
  for (u32 k : here) machine.join(clock, machine.clock[k]), machine.join(fenced, machine.fenced[k]);
  for (u32 k : here) {
    std::memcpy(machine.clock[k], clock, sizeof clock);
    std::memcpy(machine.fenced[k], fenced, sizeof fenced);
    ++machine.clock[k][k], ++warps[k].time, warps[k].at_barrier = 0;
  }
  ++machine.time;
  return true;
}
static void set_special(Module& m, u8* frame, const char* name, u32 first, u32 step) {
  const auto found = m.specials.find(name);
  if (found == m.specials.end()) return;
  for (u32 l = 0; l < 32; ++l) lanes_of<u32>(frame, found->second)[l] = first + step * l;
}
static void start_block(Module& m, std::vector<Warp>& warps, u32 block) {
  const Launch& o = machine.launch;
  machine.block = block, machine.block_start = ++machine.time, machine.together = false;
  std::memset(machine.shared, 0xff, o.shared);  // NaN in every format
  machine.words.assign(machine.shared_races() ? o.shared / 2 + 1 : 0, SharedWord{});
  machine.readers.assign(machine.words.size() * warps.size(), Reader{});
  machine.copies.clear(), machine.mbarriers.clear();
  machine.bulk_groups.clear(), machine.piece_groups.clear();
  std::memset(machine.clock, 0, sizeof machine.clock);
  std::memset(machine.fenced, 0, sizeof machine.fenced);
  for (u32 k = 0; k < warps.size(); ++k) {
    u8* const frame = warps[k].frame;
    const u32 threads = o.threads - 32 * k;
    warps[k] = Warp{};
    warps[k].frame = frame, warps[k].alive = threads < 32 ? (1u << threads) - 1 : kAllLanes;
    machine.clock[k][k] = 1;
    set_special(m, frame, "%ctaid.x", block, 0);
  }
}
static void run_block(Module& m, std::vector<Warp>& warps) {
  while (true) {
    machine.progress = false;
    const u32 n = (u32)warps.size();
    for (u32 k = 0; k < n; ++k) {
      machine.warp = machine.launch.order == 2 ? n - 1 - k : k;
      run(m, warps[machine.warp]);
    }
    u32 alive = 0;
    int lane = 0;
    for (u32 k = 0; k < n; ++k) {
      if (!warps[k].alive) continue;
      alive += (u32)__builtin_popcount(warps[k].alive);
      machine.warp = k, lane = first_of(warps[k].alive);
      machine.at = &m.code[warps[k].pc[lane] - 1];
    }
    if (!alive) break;
    bool opened = false;
    for (u32 which = 0; which < 16; ++which) opened |= open_barrier(m, warps, which);
    if (opened || machine.progress || perform_some_load()) continue;
    const u32 ended = machine.launch.threads - alive;
    if (ended)
      throw Fault{lane, "waits at a barrier, while " + std::to_string(ended) + " threads ended"};
    throw Fault{lane, "no thread can go on"};
  }
  for (const Copy& c : machine.copies)
    if (!c.awaited)
      throw Fault{c.thread % 32, "the block ends while nobody has waited for an asynchronous copy"};
}
static void launch(Module& m, void* parameters) {
  const Launch& o = machine.launch;
  if (!o.threads || o.threads > m.max_threads || o.threads > 1024)
    unknown("threads: " + std::to_string(o.threads));
  std::vector<Warp> warps((o.threads + 31) / 32);
  const size_t frame = ((size_t)m.frame + 63) / 64 * 64 + 64;
  if (m.frames_size < frame * warps.size())
    free(m.frames), m.frames = (u8*)aligned_alloc(64, m.frames_size = frame * warps.size());
  std::memset(m.frames, 0xff, frame * warps.size());
  for (u32 k = 0; k < warps.size(); ++k) {
    u8* const registers = warps[k].frame = m.frames + frame * k;
    for (const auto& [constant, at] : m.constants) {
      const auto& [size, value] = constant;
      if (size == 1)
        predicate(registers, at) = (u32)value;
      else
        for (int l = 0; l < 32; ++l) std::memcpy(registers + at + size * l, &value, (size_t)size);
    }
    if (m.specials.count("parameters"))
      std::fill_n(lanes_of<u64>(registers, m.specials["parameters"]), 32, (u64)parameters);
    set_special(m, registers, "%tid.x", 32 * k, 1);
    set_special(m, registers, "%ntid.x", o.threads, 0);
    set_special(m, registers, "%nctaid.x", o.grid, 0);
  }
  std::vector<u8> room(o.shared + 128);
  machine.shared = (u8*)(((u64)room.data() + 127) / 128 * 128);
  machine.parameters = (u8*)parameters, machine.parameters_size = m.parameters_size;
  machine.time = 0, machine.warps = (u32)warps.size();
  for (u32 block = 0; block < o.grid; ++block) start_block(m, warps, block), run_block(m, warps);
}

// ---- what tests call ----
static sigjmp_buf on_wild_access;
static void leave(int) { siglongjmp(on_wild_access, 1); }

extern "C" Module* ptx_load(const char* text) {
  Module* m = new Module;
  try {
    parse(*m, text);
  } catch (const std::exception& error) {
    m->error = error.what();
  }
  return m;
}
extern "C" const char* ptx_error(Module* m) {
  return m->error.empty() ? nullptr : m->error.c_str();
}
extern "C" u32 ptx_parameters_size(Module* m) { return m->parameters_size; }
// ranges: pairs of address and size of global memory, in order and apart; none: everything that is
// mapped.
extern "C" const char* ptx_launch(Module* m, const Launch* options, void* parameters,
                                  const u64* ranges, u32 count) {
  machine.launch = *options, machine.at = nullptr, machine.ranges.clear();
  for (u32 i = 0; i < count; ++i) machine.ranges.push_back({ranges[2 * i], ranges[2 * i + 1]});
  struct sigaction mine = {}, before[2];
  mine.sa_handler = leave, mine.sa_flags = SA_NODEFER;
  sigaction(SIGSEGV, &mine, &before[0]), sigaction(SIGBUS, &mine, &before[1]);
  m->error.clear();
  const auto tell = [m](int lane, const string& what) {
    const size_t pc = machine.at ? (size_t)(machine.at - m->code.data()) : 0;
    m->error = m->name + ", block " + std::to_string(machine.block) + ", thread " +
               std::to_string(machine.warp * 32 + (u32)lane) + ", " + place(*m, (u32)pc) + ": " +
               what;
  };
  if (sigsetjmp(on_wild_access, 1)) {
    tell(machine.at_lanes ? first_of(machine.at_lanes) : 0, "memory that is not mapped");
  } else {
    try {
      launch(*m, parameters);
    } catch (const Fault& fault) {
      tell(fault.lane, fault.what);
    } catch (const std::exception& error) {
      m->error = m->name + ": " + error.what();
    }
  }
  sigaction(SIGSEGV, &before[0], nullptr), sigaction(SIGBUS, &before[1], nullptr);
  for (Range& r : machine.ranges) free(r.words);
  machine.ranges.clear();
  return ptx_error(m);
}
// A line for each instruction: how many warps and lanes ran it, its line in the PTX, its text.
extern "C" const char* ptx_counts(Module* m, int reset) {
  m->report.clear();
  for (size_t k = 0; k < m->code.size(); ++k) {
    Instruction& i = m->code[k];
    string text = m->text[k];
    std::replace(text.begin(), text.end(), '\n', ' ');
    m->report += std::to_string(i.warps) + " " + std::to_string(i.lanes) + " " +
                 std::to_string(i.line) + " " + std::to_string(i.conflicts) + " " + text + "\n";
    if (reset) i.warps = i.lanes = i.conflicts = 0;
  }
  return m->report.c_str();
}
