// What a machine for PTX is made of: registers and instructions, memory, and who touched it when.
// One block runs at a time, one warp at a time, and an instruction works on the lanes of a mask.
// Semantics are those of NVIDIA's "Parallel Thread Execution ISA"
// (docs.nvidia.com/cuda/parallel-thread-execution); comments name its sections.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <utility>
#include <vector>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

constexpr u32 kAllLanes = ~0u;

// ---- instructions ----
enum class Kind : u8 { kPlain, kBranch, kReturn, kBarrier, kCollective, kTryWait };
enum class Space { kGeneric, kGlobal, kShared, kParameters };

struct Instruction;
using Execute = void (*)(u8* frame, Instruction& i, u32 lanes);

// Operands are places in a warp's frame, in bytes: 32 values of a register, or the mask of a
// predicate.
struct Address {
  s32 base = 0;
  s64 offset = 0;
  bool wide = false;  // 64 bits
};
struct Instruction {
  Execute execute = nullptr;
  Kind kind = Kind::kPlain;
  s32 guard = -1;
  bool guard_negated = false;
  s32 d = 0, a = 0, b = 0, c = 0, e = 0;  // as the ISA names them; e is a fourth source
  s32 elements[16] = {};                  // of vectors and matrix fragments
  int count = 0;                          // of elements, or the bytes of a copy
  s32 second_result = -1;
  Address address, global, mbarrier;
  s32 target = -1;           // of a branch
  s32 members = -1;          // the mask of lanes that a collective waits for; none: all 32
  s32 range = 0;             // of global memory that was touched last
  u32 line = 0;              // in the PTX
  u64 warps = 0, lanes = 0;  // how often it ran
  u64 conflicts = 0;         // turns of shared memory beyond those that its bytes take
};

template <class T>
T* lanes_of(u8* frame, s32 place) {
  return (T*)(frame + place);
}
inline u32& predicate(u8* frame, s32 place) { return *(u32*)(frame + place); }
inline void set_lanes(u32& mask, u32 value, u32 lanes) { mask = (mask & ~lanes) | (value & lanes); }
template <class F>
void each_lane(u32 lanes, F&& f) {
  for (; lanes; lanes &= lanes - 1) f(__builtin_ctz(lanes));
}
inline u64 address_in(u8* frame, const Address& x, int lane) {
  if (x.wide) return lanes_of<u64>(frame, x.base)[lane] + (u64)x.offset;
  return lanes_of<u32>(frame, x.base)[lane] + (u32)x.offset;
}

// What went wrong, and the lane it went wrong in.
struct Fault {
  int lane;
  std::string what;
};

// ---- who touched memory ----
// A piece of global memory, two bytes. Times count the barriers of all blocks from 1 on, and of one
// warp; clocks are those of the warps. After reads of several warps a barrier of some warps counts
// as one of the whole block.
struct GlobalWord {
  u32 written = 0, written_in_warp = 0, write_clock = 0;
  u32 read = 0, read_in_warp = 0, read_clock = 0;
  bool read_by_earlier_block = false;
  s32 writer = 0, reader = 0;  // threads; a reader may also be several_lanes(warp) or kSeveralWarps
};
constexpr s32 kSeveralWarps = -1;
inline s32 several_lanes(u32 warp) { return -2 - (s32)warp; }

// A piece of shared memory, two bytes. Each warp has a vector clock, which barriers, mbarriers and
// waits join.
struct SharedWord {
  bool known = false;  // something was written here
  s32 writer = -1;     // a thread
  u32 clock = 0, in_warp = 0;
  bool together = false;      // by all lanes of the writer's warp
  s32 load = -1, store = -1;  // the asynchronous copies that wrote it, or read it, last
};
struct Reader {  // of a piece of shared memory, one for each warp
  u32 clock = 0, in_warp = 0;
  s32 thread = -1;  // -2: several
};

// ---- asynchronous copies and mbarriers ----
struct Copy {
  enum Type { kBulkLoad, kBulkStore, kPiece } type;
  u64 global;
  u32 shared, bytes, read;  // read: of a piece, whose remaining bytes become zero
  u64 mbarrier;
  s32 thread;
  bool performed = false, awaited = false;
  std::vector<std::pair<u32, u32>> seen;  // the warps that waited for it, and their clocks then
};
struct MBarrier {
  u32 count = 0, pending = 0, phase = 0, made_by = 0, made_at = 0;
  s64 bytes = 0;  // expected and still to come
  u32 clock[32] = {}, passed[32] = {};
  std::vector<u32> loads, passed_loads;
};
struct CopyGroups {  // of one thread
  std::vector<u32> open;
  std::deque<std::vector<u32>> committed;
};

struct Range {  // of global memory that a kernel may touch
  u64 begin, size;
  GlobalWord* words = nullptr;
};

// How a launch is run; the fields are what Python's PtxDevice passes.
struct Launch {
  u32 grid, threads, shared;
  u32 order;   // 0: the lanes furthest back together; 1: each lane as far as it comes, the first
               // first; 2: the last
  u32 races;   // 1: looked for in shared memory, 2: in global memory; 4: bank conflicts are counted
  u32 mma;     // 0: sums rounded once; 1: after each term, in float32; 2: cut off pessimistically
  u32 copies;  // 0: asynchronous copies happen at once; 1: as late as they may, in order; 2: the
               // last first
};

// Shared addresses start above zero, so that a null pointer is never one of them; as generic
// addresses they lie where no memory of the host does, and their low halves differ from the shared
// ones.
constexpr u32 kSharedBase = 0x400;
constexpr u64 kSharedWindow = 0x7f5a00007c000000ull;

struct Machine {
  Launch launch{};
  const Instruction* at = nullptr;
  u32 at_lanes = 0, block = 0, warp = 0, warps = 0;
  u8 *shared = nullptr, *parameters = nullptr;
  u32 parameters_size = 0;
  std::vector<Range> ranges;  // none: all memory that is mapped
  u32 time = 0, block_start = 0, warp_time = 0;
  u32 clock[32][32] = {};   // clock[w][v]: how much of warp v happened before what warp w does next
  u32 fenced[32][32] = {};  // the same, of what a fence.proxy.async lies after
  std::vector<SharedWord> words;
  std::vector<Reader> readers;
  std::vector<Copy> copies;
  std::map<u64, MBarrier> mbarriers;
  std::map<s32, CopyGroups> bulk_groups, piece_groups;
  bool together = false;  // what happens now is done by all lanes of the warp
  bool must_wait = false, progress = false;

  bool shared_races() const { return launch.races & 1; }
  bool global_races() const { return launch.races & 2; }
  bool counts_banks() const { return launch.races & 4; }
  std::vector<std::pair<u32, u32>> banked;  // the addresses and bytes of an instruction's lanes
  s32 thread(int lane) const { return (s32)(warp * 32) + lane; }
  u32 now() const { return clock[warp][warp]; }
  bool happened(u32 other, u32 then) const { return clock[warp][other] >= then; }
  void tick() { ++clock[warp][warp]; }
  void join(u32* to, const u32* from) const {
    for (u32 w = 0; w < warps; ++w) to[w] = std::max(to[w], from[w]);
  }
};
inline Machine machine;

inline std::string hexadecimal(u64 x) {
  char text[32];
  snprintf(text, sizeof text, "0x%llx", (unsigned long long)x);
  return text;
}
