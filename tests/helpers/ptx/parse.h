// From the text of a PTX module to instructions ("Syntax", "Directives"). Anything that is not
// known is an error: no instruction is skipped or guessed.
#pragma once
#include "asynchronous.h"
#include "collectives.h"
#include "lanewise.h"
#include "module.h"

template <Space kSpace>
Execute access(bool stores, const string& type, int size) {
  const auto of = [&]<class T, class Register>(T, Register) -> Execute {
    return stores ? store<kSpace, T, Register> : load<kSpace, T, Register>;
  };
  const int bytes = size_of_type(type);
  const bool extends_sign = type[0] == 's';
  if (bytes == 1 && size == 2 && !extends_sign) return of(u8{}, u16{});
  if (bytes == 1 && size == 4 && !extends_sign) return of(u8{}, u32{});
  if (bytes == 2 && size == 2) return of(u16{}, u16{});
  if (bytes == 2 && size == 4) return extends_sign ? of(s16{}, s32{}) : of(u16{}, u32{});
  if (bytes == 4 && size == 4) return of(u32{}, u32{});
  if (bytes == 4 && size == 8 && !stores) return extends_sign ? of(s32{}, s64{}) : of(u32{}, u64{});
  if (bytes == 8 && size == 8) return of(u64{}, u64{});
  unknown("no access to " + type + " with registers of " + std::to_string(size) + " bytes");
}

// One instruction: its name, the parts of that between points, and its operands.
class InstructionReader {
 public:
  InstructionReader(Module& module, const string& whole) : m(module) {
    static const std::regex form("(?:@(!?)(\\S+)\\s+)?(\\S+)\\s*([^]*)");
    std::smatch match;
    std::regex_match(whole, match, form);
    i.guard_negated = match[1].length() > 0;
    if (match[2].matched) i.guard = destination(m, match[2], 1);
    name = match[3], parts = cut(name, '.'), operands = cut(match[4], ',');
  }
  Instruction read() {
    if (!control() && !collective() && !matrix() && !asynchronous() && !memory() &&
        !parts_of_move())
      lanewise();
    return i;
  }

 private:
  Module& m;
  Instruction i;
  string name;
  Strings parts, operands;

  void want(size_t n) const {
    if (operands.size() != n) unknown("not " + std::to_string(n) + " operands");
  }
  s32 word(size_t k) { return source(m, operands[k], 4); }
  bool starts(const char* first, const char* second = nullptr) const {
    return parts[0] == first && (!second || (parts.size() > 1 && parts[1] == second));
  }

  bool control() {
    if (name == "bra" || name == "bra.uni") {
      want(1), i.kind = Kind::kBranch;
      m.jumps.push_back({(u32)m.code.size(), operands[0]});
    } else if (name == "ret" || name == "exit") {
      i.kind = Kind::kReturn;
    } else if (name == "bar.sync" || name == "barrier.sync") {
      if (operands.empty() || operands.size() > 2) unknown("which barrier");
      i.kind = Kind::kBarrier, i.a = word(0), i.b = operands.size() > 1 ? word(1) : -1;
    } else {
      return false;
    }
    return true;
  }
  bool collective() {
    i.kind = Kind::kCollective;
    if (name == "bar.warp.sync") {
      want(1), i.execute = warp_sync, i.members = word(0);
    } else if (name == "shfl.sync.bfly.b32" || name == "shfl.sync.idx.b32") {
      want(5), i.execute = parts[2] == "bfly" ? shuffle<true> : shuffle<false>;
      const Strings d = cut(operands[0], '|');
      i.d = destination(m, d[0], 4);
      i.second_result = d.size() > 1 ? destination(m, d[1], 1) : -1;
      i.a = word(1), i.b = word(2), i.c = word(3), i.members = word(4);
    } else if (name == "redux.sync.max.u32") {
      want(3), i.execute = reduce_max;
      i.d = destination(m, operands[0], 4), i.a = word(1), i.members = word(2);
    } else {
      i.kind = Kind::kPlain;
      return false;
    }
    return true;
  }
  bool matrix() {
    static const std::regex moves(
        "(ld|st)matrix\\.sync\\.aligned\\.m8n8\\.x([124])(\\.trans)?\\.shared(::cta)?\\.b16");
    std::smatch match;
    if (std::regex_match(name, match, moves)) {
      const bool stores = match[1] == "st", transposed = match[3].matched;
      want(2), i.count = std::stoi(match[2]);
      i.execute = stores       ? transposed ? store_matrices<true> : store_matrices<false>
                  : transposed ? load_matrices<true>
                               : load_matrices<false>;
      vector_of(m, i, operands[stores], i.count, 0, 4);
      i.address = address_of(m, operands[!stores], Space::kShared);
    } else if (name == "movmatrix.sync.aligned.m8n8.trans.b16") {
      want(2), i.execute = transpose_matrix;
      i.d = destination(m, operands[0], 4), i.a = word(1);
    } else if (starts("mma")) {
      const string product = "mma.sync.aligned.m16n8k16.row.col.";
      if (name == product + "f32.f16.f16.f32")
        i.execute = multiply<true, kHalf>;
      else if (name == product + "f32.bf16.bf16.f32")
        i.execute = multiply<true, kBrain>;
      else if (name == product + "f16.f16.f16.f16")
        i.execute = multiply<false, kHalf>;
      else
        unknown("unknown product");
      const int sums = i.execute == (Execute)multiply<false, kHalf> ? 2 : 4;
      want(4);
      const int counts[] = {sums, 4, 2, sums}, from[] = {0, 4, 8, 12};
      for (size_t k = 0; k < 4; ++k) vector_of(m, i, operands[k], counts[k], from[k], 4);
    } else {
      return false;
    }
    i.kind = Kind::kCollective;
    return true;
  }
  bool asynchronous() {
    const auto shared = [&](size_t k) { return address_of(m, operands[k], Space::kShared); };
    const auto global = [&](size_t k) { return address_of(m, operands[k], Space::kGlobal); };
    if (starts("mbarrier", "init")) {
      want(2), i.execute = mbarrier_init, i.address = shared(0), i.b = word(1);
    } else if (starts("mbarrier", "arrive")) {
      const bool expects = parts[2] == "expect_tx";
      want(expects ? 3 : 2), i.execute = expects ? mbarrier_arrive<true> : mbarrier_arrive<false>;
      i.address = shared(1), i.b = expects ? word(2) : 0;
    } else if (starts("mbarrier", "try_wait") && parts[2] == "parity") {
      want(3), i.kind = Kind::kTryWait, i.execute = mbarrier_try_wait;
      i.d = destination(m, operands[0], 1), i.address = shared(1), i.b = word(2);
    } else if (name == "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes") {
      want(4), i.execute = bulk_copy<false>;
      i.address = shared(0), i.global = global(1), i.b = word(2), i.mbarrier = shared(3);
    } else if (name == "cp.async.bulk.global.shared::cta.bulk_group") {
      want(3), i.execute = bulk_copy<true>;
      i.global = global(0), i.address = shared(1), i.b = word(2);
    } else if (name == "cp.async.cg.shared.global" || name == "cp.async.ca.shared.global") {
      if (operands.size() != 3 && operands.size() != 4) unknown("not 3 or 4 operands");
      i.execute = piece_copy, i.count = std::stoi(operands[2]);
      i.address = shared(0), i.global = global(1), i.b = word(operands.size() - 1);
    } else if (name == "cp.async.commit_group") {
      i.execute = commit_group<false>;
    } else if (name == "cp.async.bulk.commit_group") {
      i.execute = commit_group<true>;
    } else if (name == "cp.async.wait_group") {
      want(1), i.execute = wait_group<false>, i.a = word(0);
    } else if (name == "cp.async.bulk.wait_group" || name == "cp.async.bulk.wait_group.read") {
      want(1), i.execute = wait_group<true>, i.a = word(0);
    } else if (name == "fence.proxy.async" || name == "fence.proxy.async.shared::cta") {
      i.execute = proxy_fence;
    } else if (starts("fence", "mbarrier_init")) {
      i.execute = no_effect;
    } else {
      return false;
    }
    return true;
  }
  bool memory() {
    if (!starts("ld") && !starts("st")) return false;
    want(2), i.count = 1;
    const bool stores = parts[0] == "st";
    Space space = Space::kGeneric;
    for (size_t k = 1; k + 1 < parts.size(); ++k) {
      const string& p = parts[k];
      if (p == "v2" || p == "v4")
        i.count = p[1] - '0';
      else if (p == "global")
        space = Space::kGlobal;
      else if (p == "shared")
        space = Space::kShared;
      else if (p == "param")
        space = Space::kParameters;
      else
        unknown("unknown qualifier ." + p);  // .nc too: nobody would see what it must not read
    }
    const string &type = parts.back(), &vector = operands[stores];
    const int found = m.find(elements_of(vector)[0]).size,
              size = found ? found : size_of_type(type);
    i.address = address_of(m, operands[!stores], space);
    vector_of(m, i, vector, i.count, 0, size);
    i.execute = space == Space::kGlobal       ? access<Space::kGlobal>(stores, type, size)
                : space == Space::kShared     ? access<Space::kShared>(stores, type, size)
                : space == Space::kParameters ? access<Space::kParameters>(stores, type, size)
                                              : access<Space::kGeneric>(stores, type, size);
    return true;
  }
  bool parts_of_move() {  // between a register and a vector of two
    if (!starts("mov") || operands.size() != 2) return false;
    if (operands[0][0] != '{' && operands[1][0] != '{') return false;
    const bool splits = operands[0][0] == '{';
    const int size = size_of_type(parts[1]) / 2;
    vector_of(m, i, operands[!splits], i.count = 2, 0, size);
    if (splits)
      i.a = source(m, operands[1], 2 * size);
    else
      i.d = destination(m, operands[0], 2 * size);
    if (size == 2)
      i.execute = splits ? split<u32, u16> : join_parts<u32, u16>;
    else
      i.execute = splits ? split<u64, u32> : join_parts<u64, u32>;
    return true;
  }
  void lanewise() {
    for (const Entry& entry : entries()) {
      if (name != entry.name || operands.size() != entry.sizes.size()) continue;
      bool fits = true;
      for (size_t k = 0; k < operands.size(); ++k) {
        const int size = m.find(operands[k]).size;
        fits &= size == 0 || size == entry.sizes[k];
      }
      if (!fits) continue;
      i.execute = entry.execute;
      s32* place[] = {&i.d, &i.a, &i.b, &i.c, &i.e};
      for (size_t k = 0; k < operands.size(); ++k)
        *place[k] = (k ? source : destination)(m, operands[k], entry.sizes[k]);
      return;
    }
    unknown("unknown instruction, or registers of other sizes");
  }
};

inline void read_directive(Module& m, const string& s) {
  static const std::regex entry(
      "\\.visible\\s+\\.entry\\s+(\\w+)\\(\\s*\\.param[^,]*\\s(\\w+)\\[(\\d+)\\]\\s*\\)[^]*");
  static const std::regex limit("[^]*\\.maxntid\\s+(\\d+)[^]*");
  static const std::regex shared("\\.extern\\s+\\.shared\\s[^]*\\s(\\w+)\\[\\]");
  static const std::regex registers("\\.reg\\s+\\.(\\w+)\\s+([^]*)"), family("([^<]+)<(\\d+)>");
  std::smatch match, member;
  if (std::regex_match(s, match, entry)) {
    if (!m.name.empty()) unknown("a second kernel");
    m.name = match[1], m.parameter = match[2], m.parameters_size = (u32)std::stoul(match[3]);
    if (std::regex_match(s, match, limit)) m.max_threads = (u32)std::stoul(match[1]);
  } else if (std::regex_match(s, match, shared)) {
    m.shared = match[1];
  } else if (std::regex_match(s, match, registers)) {
    const int size = size_of_type(match[1]);
    for (const string& n : cut(match[2], ',')) {
      Scope& scope = m.scopes.back();
      if (std::regex_match(n, member, family))
        scope.families[member[1]] = {size, std::vector<s32>(std::stoul(member[2]), -1)};
      else
        scope.names[n] = {size, m.room(size)};
    }
  } else if (s.compare(0, 7, ".pragma") && s.compare(0, 7, ".global")) {
    unknown("unknown directive");  // .global: constants that no instruction can name, since no
                                   // operand is found
  }
}
inline void parse(Module& m, string text) {
  const std::regex ignored("//[^\n]*|\\.(version|target|address_size)\\s[^\n]*");
  text = std::regex_replace(text, ignored, "");
  u32 line = 1;
  for (size_t at = 0; at < text.size();) {
    const char c = text[at];
    if (isspace((u8)c))
      line += c == '\n', ++at;
    else if (c == '{')
      m.scopes.emplace_back(), ++at;
    else if (c == '}')
      m.scopes.pop_back(), ++at;
    else {
      const bool directive = c == '.';
      size_t end = text.find_first_of(directive ? ";{" : ";:", at);
      while (text[end] == ':' && text[end + 1] == ':') end = text.find_first_of(";:", end + 2);
      string s = text.substr(at, end - at);
      at = end + (text[end] != '{');
      const u32 lines = (u32)std::count(s.begin(), s.end(), '\n');
      while (isspace((u8)s.back())) s.pop_back();
      try {
        if (directive) {
          read_directive(m, s);
        } else if (text[end] == ':') {
          if (!m.labels.emplace(s, (u32)m.code.size()).second)
            unknown("a second label of that name");
        } else {
          Instruction i = InstructionReader(m, s).read();
          i.line = line;
          m.code.push_back(i), m.text.push_back(s);
        }
      } catch (const std::exception& error) {
        unknown("line " + std::to_string(line) + ": " + s + ": " + error.what());
      }
      line += lines;
    }
  }
  for (const auto& [index, label] : m.jumps) m.code[index].target = (s32)m.labels.at(label);
  m.code.emplace_back().kind = Kind::kReturn, m.text.push_back("the end of the code");
}
