// Instructions that each lane carries out alone: one line for each name and type. An entry fits an
// instruction of its name whose registers have the sizes of its types (the lower part of a wider
// register counts as an entry of its own).
#pragma once
#include "memory.h"
#include "numbers.h"

struct Predicate {};  // of 32 lanes: one mask
template <class T>
constexpr int kSize = (int)sizeof(T);
template <>
constexpr int kSize<Predicate> = 1;

struct Entry {
  const char* name;
  std::vector<int> sizes;  // of the result and the operands, in bytes of a lane; 1: a predicate
  Execute execute;
};

template <class F>
void run_lanes(u32 lanes, F&& f) {
  if (lanes == kAllLanes) {
    _Pragma("GCC ivdep") for (int lane = 0; lane < 32; ++lane) f(lane);
  } else {
    each_lane(lanes, f);
  }
}
template <class D, class A, auto kF>
void unary(u8* frame, Instruction& i, u32 lanes) {
  D* d = lanes_of<D>(frame, i.d);
  const A* a = lanes_of<A>(frame, i.a);
  run_lanes(lanes, [=](int l) { d[l] = (D)kF(a[l]); });
}
template <class D, class A, class B, auto kF>
void binary(u8* frame, Instruction& i, u32 lanes) {
  D* d = lanes_of<D>(frame, i.d);
  const A* a = lanes_of<A>(frame, i.a);
  const B* b = lanes_of<B>(frame, i.b);
  run_lanes(lanes, [=](int l) { d[l] = (D)kF(a[l], b[l]); });
}
template <class D, class A, auto kF>
void ternary(u8* frame, Instruction& i, u32 lanes) {
  D* d = lanes_of<D>(frame, i.d);
  const A *a = lanes_of<A>(frame, i.a), *b = lanes_of<A>(frame, i.b);
  const D* c = lanes_of<D>(frame, i.c);
  run_lanes(lanes, [=](int l) { d[l] = (D)kF(a[l], b[l], c[l]); });
}
template <class T, auto kF>
void quaternary(u8* frame, Instruction& i, u32 lanes) {
  T* d = lanes_of<T>(frame, i.d);
  const T *a = lanes_of<T>(frame, i.a), *b = lanes_of<T>(frame, i.b), *c = lanes_of<T>(frame, i.c),
          *e = lanes_of<T>(frame, i.e);
  run_lanes(lanes, [=](int l) { d[l] = kF(a[l], b[l], c[l], e[l]); });
}
template <class A, auto kF>
void compare(u8* frame, Instruction& i, u32 lanes) {
  const A *a = lanes_of<A>(frame, i.a), *b = lanes_of<A>(frame, i.b);
  u32 r = 0;
  for (int l = 0; l < 32; ++l) r |= (u32)kF(a[l], b[l]) << l;
  set_lanes(predicate(frame, i.d), r, lanes);
}
template <auto kF>
void logic(u8* frame, Instruction& i, u32 lanes) {
  set_lanes(predicate(frame, i.d), kF(predicate(frame, i.a), predicate(frame, i.b)), lanes);
}
template <class T>
void select(u8* frame, Instruction& i, u32 lanes) {
  T* d = lanes_of<T>(frame, i.d);
  const T *a = lanes_of<T>(frame, i.a), *b = lanes_of<T>(frame, i.b);
  const u32 p = predicate(frame, i.c);
  run_lanes(lanes, [=](int l) { d[l] = p >> l & 1 ? a[l] : b[l]; });
}
// mov between a register and a vector of its parts, the lowest first ("mov").
template <class Whole, class Part>
void split(u8* frame, Instruction& i, u32 lanes) {
  each_lane(lanes, [&](int l) {
    const Whole x = lanes_of<Whole>(frame, i.a)[l];
    for (int j = 0; j < i.count; ++j)
      lanes_of<Part>(frame, i.elements[j])[l] = (Part)(x >> (8 * sizeof(Part) * (size_t)j));
  });
}
template <class Whole, class Part>
void join_parts(u8* frame, Instruction& i, u32 lanes) {
  each_lane(lanes, [&](int l) {
    Whole x = 0;
    for (int j = 0; j < i.count; ++j)
      x |= (Whole)lanes_of<Part>(frame, i.elements[j])[l] << (8 * sizeof(Part) * (size_t)j);
    lanes_of<Whole>(frame, i.d)[l] = x;
  });
}

// clang-format off
#define OF_A [](auto a)
#define OF_AB [](auto a, [[maybe_unused]] auto b)
#define OF_ABC [](auto a, auto b, auto c)
#define UNARY(name, D, A, x) {name, {kSize<D>, kSize<A>}, unary<D, A, OF_A { return (x); }>}
#define BINARY(name, D, A, B, x) {name, {kSize<D>, kSize<A>, kSize<B>}, binary<D, A, B, OF_AB { return (x); }>}
#define TERNARY(name, D, A, x) {name, {kSize<D>, kSize<A>, kSize<A>, kSize<D>}, ternary<D, A, OF_ABC { return (x); }>}
#define LOGIC(name, n, x) {name, std::vector<int>(n, 1), logic<OF_AB { return (x); }>}
#define COMPARE(name, T, x) {"setp." name, {1, kSize<T>, kSize<T>}, compare<T, OF_AB { return (x); }>}
#define SELECT(type, T) {"selp." type, {kSize<T>, kSize<T>, kSize<T>, 1}, select<T>}
#define INTEGERS(name, x) \
  BINARY(name ".s16", s16, s16, s16, x), BINARY(name ".u16", u16, u16, u16, x), \
  BINARY(name ".s32", s32, s32, s32, x), BINARY(name ".u32", u32, u32, u32, x), \
  BINARY(name ".s64", s64, s64, s64, x), BINARY(name ".u64", u64, u64, u64, x)
#define BITS(name, x) \
  BINARY(name ".b16", u16, u16, u16, x), BINARY(name ".b32", u32, u32, u32, x), \
  BINARY(name ".b64", u64, u64, u64, x), LOGIC(name ".pred", 3, x)
#define REALS(name, x) \
  BINARY(name ".f32", float, float, float, x), BINARY(name ".rn.f32", float, float, float, x), \
  BINARY(name ".f64", double, double, double, x), BINARY(name ".rn.f64", double, double, double, x)
#define COMPARE_REALS(c, x) COMPARE(c ".f32", float, x), COMPARE(c ".f64", double, x)
#define COMPARE_ALL(c, x) \
  COMPARE(c ".b16", u16, x), COMPARE(c ".s16", s16, x), COMPARE(c ".u16", u16, x), \
  COMPARE(c ".b32", u32, x), COMPARE(c ".s32", s32, x), COMPARE(c ".u32", u32, x), \
  COMPARE(c ".b64", u64, x), COMPARE(c ".s64", s64, x), COMPARE(c ".u64", u64, x), COMPARE_REALS(c, x)
#define SHIFTS(B, U, S, Bits, T, top) \
  BINARY("shl." B, Bits, Bits, u32, b > top ? 0 : a << b), BINARY("shr." U, Bits, Bits, u32, b > top ? 0 : a >> b), \
  BINARY("shr." B, Bits, Bits, u32, b > top ? 0 : a >> b), BINARY("shr." S, T, T, u32, a >> (b > top ? top : b))
#define MOVES(type, T) UNARY("mov." type, T, T, a)

inline const std::vector<Entry>& entries() {
  static const std::vector<Entry> table = {
    MOVES("u16", u16), MOVES("b16", u16), MOVES("u32", u32), MOVES("b32", u32), MOVES("f32", u32), MOVES("s32", u32),
    MOVES("u64", u64), MOVES("b64", u64), MOVES("s64", u64), MOVES("f64", u64),
    LOGIC("mov.pred", 2, a), LOGIC("not.pred", 2, ~a),
    UNARY("cvta.to.global.u64", u64, u64, global_address(a)), UNARY("cvta.global.u64", u64, u64, a),
    UNARY("cvta.shared.u64", u64, u64, a + kSharedWindow), UNARY("cvta.to.shared.u64", u64, u64, a - kSharedWindow),
    // integers
    INTEGERS("add", (u64)a + (u64)b), INTEGERS("sub", (u64)a - (u64)b), INTEGERS("mul.lo", (u64)a * (u64)b),
    INTEGERS("div", divide(a, b, false)), INTEGERS("rem", divide(a, b, true)),
    INTEGERS("min", a < b ? a : b), INTEGERS("max", a > b ? a : b),
    BINARY("mul.hi.s32", s32, s32, s32, (s64)a * b >> 32), BINARY("mul.hi.u32", u32, u32, u32, (u64)a * b >> 32),
    BINARY("mul.wide.s16", s32, s16, s16, (s32)a * b), BINARY("mul.wide.u16", u32, u16, u16, (u32)a * b),
    BINARY("mul.wide.s32", s64, s32, s32, (s64)a * b), BINARY("mul.wide.u32", u64, u32, u32, (u64)a * b),
    TERNARY("mad.lo.s32", u32, u32, a * b + c), TERNARY("mad.lo.u32", u32, u32, a * b + c),
    TERNARY("mad.lo.s64", u64, u64, a * b + c), TERNARY("mad.lo.u64", u64, u64, a * b + c),
    TERNARY("mad.wide.u32", u64, u32, (u64)a * b + c), TERNARY("mad.wide.s32", s64, s32, (s64)a * b + c),
    UNARY("neg.s16", u16, u16, 0 - a), UNARY("neg.s32", u32, u32, 0 - a), UNARY("neg.s64", u64, u64, 0 - a),
    UNARY("abs.s32", u32, s32, a < 0 ? 0 - (u32)a : (u32)a),
    UNARY("clz.b32", u32, u32, a ? __builtin_clz(a) : 32), UNARY("popc.b32", u32, u32, __builtin_popcount(a)),
    {"bfi.b32", {4, 4, 4, 4, 4}, quaternary<u32, [](u32 a, u32 b, u32 c, u32 e) { return insert_bits(a, b, c, e); }>},
    TERNARY("bfe.u32", u32, u32, extract_bits(a, b, c)), TERNARY("prmt.b32", u32, u32, permute_bytes(a, b, c)),
    TERNARY("shf.l.wrap.b32", u32, u32, funnel(a, b, c, true, true)),
    TERNARY("shf.r.wrap.b32", u32, u32, funnel(a, b, c, false, true)),
    TERNARY("shf.l.clamp.b32", u32, u32, funnel(a, b, c, true, false)),
    TERNARY("shf.r.clamp.b32", u32, u32, funnel(a, b, c, false, false)),
    // bits
    BITS("and", a & b), BITS("or", a | b), BITS("xor", a ^ b),
    UNARY("not.b16", u16, u16, ~a), UNARY("not.b32", u32, u32, ~a), UNARY("not.b64", u64, u64, ~a),
    SHIFTS("b16", "u16", "s16", u16, s16, 15), SHIFTS("b32", "u32", "s32", u32, s32, 31),
    SHIFTS("b64", "u64", "s64", u64, s64, 63),
    // comparisons; those that end in u hold where a NaN is compared
    COMPARE_ALL("eq", a == b), COMPARE_ALL("lt", a < b), COMPARE_ALL("le", a <= b), COMPARE_ALL("gt", a > b),
    COMPARE_ALL("ge", a >= b), COMPARE_ALL("ne", a < b || a > b), COMPARE_REALS("equ", !(a < b || a > b)),
    COMPARE_REALS("neu", a != b), COMPARE_REALS("ltu", !(a >= b)), COMPARE_REALS("leu", !(a > b)),
    COMPARE_REALS("gtu", !(a <= b)), COMPARE_REALS("geu", !(a < b)), COMPARE_REALS("nan", a != a || b != b),
    COMPARE_REALS("num", a == a && b == b), COMPARE("lo.u32", u32, a < b), COMPARE("hi.u32", u32, a > b),
    SELECT("u16", u16), SELECT("b16", u16), SELECT("s16", u16), SELECT("b32", u32), SELECT("u32", u32),
    SELECT("s32", u32), SELECT("f32", u32), SELECT("b64", u64), SELECT("u64", u64), SELECT("s64", u64),
    SELECT("f64", u64),
    // real numbers; mul and add without .rn are not fused here, as ptxas may
    REALS("add", a + b), REALS("sub", a - b), REALS("mul", a * b),
    BINARY("div.rn.f32", float, float, float, a / b), BINARY("div.rn.f64", double, double, double, a / b),
    UNARY("rcp.rn.f32", float, float, 1.f / a), UNARY("sqrt.rn.f32", float, float, std::sqrt(a)),
    TERNARY("fma.rn.f32", float, float, __builtin_fmaf(a, b, c)), TERNARY("fma.rm.f32", float, float, fma_downward(a, b, c)),
    TERNARY("fma.rn.f64", double, double, __builtin_fma(a, b, c)),
    UNARY("neg.f32", u32, u32, a ^ 0x80000000u), UNARY("neg.f64", u64, u64, a ^ 1ull << 63),
    UNARY("abs.f32", u32, u32, a & 0x7fffffffu), UNARY("abs.f64", u64, u64, a & ~(1ull << 63)),
    BINARY("max.f32", float, float, float, maximum(a, b)), BINARY("min.f32", float, float, float, minimum(a, b)),
    BINARY("copysign.f32", u32, u32, u32, (b & 0x7fffffffu) | (a & 0x80000000u)),  // a's sign, b's size
    UNARY("ex2.approx.ftz.f32", float, float, flush_subnormal((float)std::exp2((double)flush_subnormal(a)))),
    // pairs of 16-bit numbers
    TERNARY("fma.rn.f16x2", u32, u32, fma_half2(a, b, c)), TERNARY("fma.rn.bf16x2", u32, u32, fma_brain2(a, b, c)),
    BINARY("add.f16x2", u32, u32, u32, fma_half2(a, 0x3c003c00u, b)), BINARY("add.rn.f16x2", u32, u32, u32, fma_half2(a, 0x3c003c00u, b)),
    BINARY("sub.f16x2", u32, u32, u32, fma_half2(b, 0xbc00bc00u, a)), BINARY("sub.rn.f16x2", u32, u32, u32, fma_half2(b, 0xbc00bc00u, a)),
    BINARY("mul.f16x2", u32, u32, u32, multiply_half2(a, b)), BINARY("mul.rn.f16x2", u32, u32, u32, multiply_half2(a, b)),
    BINARY("mul.bf16x2", u32, u32, u32, multiply_brain2(a, b)), BINARY("mul.rn.bf16x2", u32, u32, u32, multiply_brain2(a, b)),
    UNARY("neg.f16x2", u32, u32, a ^ 0x80008000u), UNARY("neg.bf16x2", u32, u32, a ^ 0x80008000u),
    UNARY("abs.f16x2", u32, u32, a & 0x7fff7fffu), UNARY("abs.bf16x2", u32, u32, a & 0x7fff7fffu),
    BINARY("max.f16x2", u32, u32, u32, larger2(a, b, 0x7c00)), BINARY("max.bf16x2", u32, u32, u32, larger2(a, b, 0x7f80)),
    BINARY("max.xorsign.abs.f16x2", u32, u32, u32, larger_size2(a, b, 0x7c00)),
    BINARY("max.xorsign.abs.bf16x2", u32, u32, u32, larger_size2(a, b, 0x7f80)),
    // conversions; of a pair, a becomes the upper half ("cvt")
    BINARY("cvt.rn.f16x2.f32", u32, float, float, float_to_half(b) | (u32)float_to_half(a) << 16),
    BINARY("cvt.rn.bf16x2.f32", u32, float, float, float_to_brain(b) | (u32)float_to_brain(a) << 16),
    UNARY("cvt.f32.f16", float, u16, half_to_float(a)), UNARY("cvt.rn.f16.f32", u16, float, float_to_half(a)),
    UNARY("cvt.f32.bf16", float, u16, brain_to_float(a)), UNARY("cvt.rn.bf16.f32", u16, float, float_to_brain(a)),
    UNARY("cvt.s64.s32", s64, s32, a), UNARY("cvt.s64.s32", s64, s64, (s32)a), UNARY("cvt.u64.u32", u64, u32, a),
    UNARY("cvt.u64.u32", u64, u64, (u32)a), UNARY("cvt.u32.u64", u32, u64, a), UNARY("cvt.u16.u64", u16, u64, a),
    UNARY("cvt.u16.u32", u16, u32, a), UNARY("cvt.u32.u16", u32, u16, a), UNARY("cvt.s32.s16", s32, s16, a),
    UNARY("cvt.u64.u16", u64, u16, a), UNARY("cvt.s64.s16", s64, s16, a),
    UNARY("cvt.rn.f32.s32", float, s32, a), UNARY("cvt.rn.f32.u32", float, u32, a), UNARY("cvt.rn.f32.s64", float, s64, a),
    UNARY("cvt.rn.f64.s64", double, s64, a), UNARY("cvt.rn.f64.s32", double, s32, a), UNARY("cvt.rn.f64.u32", double, u32, a),
    UNARY("cvt.f64.f32", double, float, a), UNARY("cvt.rn.f32.f64", float, double, a),
    UNARY("cvt.rni.f64.f64", double, double, std::nearbyint(a)), UNARY("cvt.rzi.f64.f64", double, double, std::trunc(a)),
    UNARY("cvt.rzi.s64.f64", s64, double, truncated(a)),
    UNARY("cvt.sat.f32.f32", float, float, a > 0.f ? (a < 1.f ? a : 1.f) : 0.f),
  };
  return table;
}
// clang-format on
