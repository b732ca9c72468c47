// A PTX module with one kernel, and the operands of its instructions as places in a warp's
// registers ("Operands", "Parameterized Variable Names", "Constants").
#pragma once
#include <cctype>
#include <cstdlib>
#include <regex>
#include <stdexcept>
#include <unordered_map>

#include "state.h"

using std::string;
using Strings = std::vector<string>;

struct Register {
  int size;  // bytes of a lane; 1: a predicate
  s32 place;
};
struct Family {  // %r<100>: places of those that are used
  int size;
  std::vector<s32> places;
};
struct Scope {
  std::unordered_map<string, Register> names;
  std::unordered_map<string, Family> families;
};
struct Module {
  string name, parameter, shared, error, report;
  std::vector<Instruction> code;
  Strings text;
  std::map<std::pair<int, u64>, s32> constants;  // of a size and a value: its place
  std::map<string, s32> specials;                // %tid.x and so on; the parameters' address
  u32 parameters_size = 0, max_threads = 1024;
  s32 frame = 0;  // bytes of a warp's registers
  u8* frames = nullptr;
  size_t frames_size = 0;
  std::vector<Scope> scopes{1};
  std::map<string, u32> labels;
  std::vector<std::pair<u32, string>> jumps;

  ~Module() { free(frames); }
  s32 room(int size) {
    const s32 place = frame;
    frame += size == 1 ? 64 : 32 * size;
    return place;
  }
  s32 constant(int size, u64 value) {
    if (size == 1)
      value = value ? kAllLanes : 0;
    else if (size < 8)
      value &= (1ull << (8 * size)) - 1;
    const auto [found, fresh] = constants.try_emplace({size, value}, 0);
    return fresh ? found->second = room(size) : found->second;
  }
  s32 special(const string& which, int size) {
    const auto [found, fresh] = specials.try_emplace(which, 0);
    return fresh ? found->second = room(size) : found->second;
  }
  // The innermost register of that name; its size is 0 where there is none.
  Register find(const string& which) {
    for (size_t i = scopes.size(); i--;) {
      const auto plain = scopes[i].names.find(which);
      if (plain != scopes[i].names.end()) return plain->second;
      const size_t digits = which.find_last_not_of("0123456789") + 1;
      const auto family = scopes[i].families.find(which.substr(0, digits));
      if (digits == which.size() || family == scopes[i].families.end()) continue;
      s32& place = family->second.places.at(std::stoul(which.substr(digits)));
      if (place < 0) place = room(family->second.size);
      return {family->second.size, place};
    }
    return {0, 0};
  }
};

[[noreturn]] inline void unknown(const string& what) { throw std::runtime_error(what); }
inline int size_of_type(const string& type) {
  return type == "pred" ? 1 : type == "f16x2" ? 4 : std::stoi(type.substr(1)) / 8;
}
inline Strings cut(const string& s,
                   char at) {  // outside of braces and brackets; blanks are dropped
  Strings parts;
  int depth = 0;
  for (char c : s) {
    if (isspace((u8)c)) continue;
    if (parts.empty()) parts.emplace_back();
    depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (c == at && depth == 0)
      parts.emplace_back();
    else
      parts.back() += c;
  }
  return parts;
}
inline Strings elements_of(const string& s) {
  return cut(s[0] == '{' ? s.substr(1, s.size() - 2) : s, ',');
}

// ---- operands ----
inline u64 whole_number(const string& s) {
  size_t end = 0;
  const u64 value = std::stoull(s, &end, 0);
  if (end != s.size() && s.substr(end) != "U") unknown("no whole number: " + s);
  return value;
}
inline s32 source(Module& m, const string& s, int size) {
  const Register r = m.find(s);
  if (r.size) {
    if (r.size != size)
      unknown(s + " has " + std::to_string(r.size) + " bytes, wanted " + std::to_string(size));
    return r.place;
  }
  if (s.size() > 2 && s[0] == '0' && strchr("fFdD", s[1]))  // the bits of a real number
    return m.constant(size, std::stoull(s.substr(2), nullptr, 16));
  if (isdigit((u8)s[0])) return m.constant(size, whole_number(s));
  if (s[0] == '-') return m.constant(size, 0 - whole_number(s.substr(1)));
  if (s == m.shared) return m.constant(size, kSharedBase);
  if (s == "_") return m.special("_" + std::to_string(size), size);  // an element nobody wants
  if (s == m.parameter && size == 8) return m.special("parameters", 8);
  if (size != 4 || (s != "%tid.x" && s != "%ntid.x" && s != "%ctaid.x" && s != "%nctaid.x"))
    unknown("unknown operand " + s);
  return m.special(s, 4);
}
inline s32 destination(Module& m, const string& s, int size) {
  if (s != "_" && !m.find(s).size) unknown("no such register: " + s);
  return source(m, s, size);
}
inline Address address_of(Module& m, const string& s, Space space) {
  static const std::regex form("\\[([^+-]+)\\+?(-?\\d+)?\\]");
  std::smatch match;
  if (!std::regex_match(s, match, form)) unknown("no address: " + s);
  Address x;
  if (match[2].matched) x.offset = std::stoll(match[2]);
  x.wide = m.find(match[1]).size == 8 || match[1] == m.parameter;
  if (space != Space::kShared && !x.wide) unknown("a 32-bit address outside of shared memory");
  x.base = source(m, match[1], x.wide ? 8 : 4);
  return x;
}
inline void vector_of(Module& m, Instruction& i, const string& s, int count, int from, int size) {
  const Strings parts = elements_of(s);
  if ((int)parts.size() != count) unknown("not " + std::to_string(count) + " elements: " + s);
  for (int k = 0; k < count; ++k) i.elements[from + k] = source(m, parts[(size_t)k], size);
}
