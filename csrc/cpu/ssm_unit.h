// The kernel of a state space model, and its gradient: sums of exponentials as matrix products.
#pragma once
#include "isa.h"
#include "ssm_tables.h"

namespace seqconv::SEQCONV_ISA {

// sum[i][j] (+)= sum_m left[m][i] right[m][j], for kTile by three vectors.
template <class T>
SEQCONV_INLINE void product(const T* left, const T* right, int64_t count, Vec<T> (*sum)[3]) {
  for (int64_t m = 0; m < count; ++m, left += kTile, right += kColumns<T>) {
    const Vec<T> b[3] = {load_vector(right), load_vector(right + kLanes<T>),
                         load_vector(right + 2 * kLanes<T>)};
    SEQCONV_UNROLL
    for (int i = 0; i < kTile; ++i) {
      const Vec<T> x = splat(left[i]);
      SEQCONV_UNROLL
      for (int j = 0; j < 3; ++j) sum[i][j] += x * b[j];
    }
  }
}

// A tile of the kernel; `to` has room for all of it.
template <class T>
void forward_tile(const T* left, const T* right, int64_t count, T* to, int64_t stride) {
  Vec<T> sum[kTile][3] = {};
  product<T>(left, right, count, sum);
  SEQCONV_UNROLL
  for (int i = 0; i < kTile; ++i) {
    SEQCONV_UNROLL
    for (int j = 0; j < 3; ++j) store_vector(to + i * stride + j * kLanes<T>, sum[i][j]);
  }
}

// A block of the kernel k. `edge`: room for a tile that sticks out of it.
template <class T>
void forward_block(const SsmProblem& p, const SsmTables<T>& t, int64_t block, T* edge, T* k) {
  for (int64_t r = 0; r < t.columns; r += kColumns<T>) {
    const T* panel = t.right + r * t.table_row;
    for (int64_t q = 0; q < t.count(block); q += kTile) {
      const int64_t start = (t.first_row(block) + q) * t.columns + r;
      const T* tile = t.left + q * t.table_row;
      const int64_t last = start + (kTile - 1) * t.columns + kColumns<T>;
      if (last <= p.length) {
        forward_tile<T>(tile, panel, 2 * t.modes, k + start, t.columns);
        continue;
      }
      forward_tile<T>(tile, panel, 2 * t.modes, edge, kColumns<T>);
      for (int i = 0; i < kTile; ++i)
        for (int j = 0; j < kColumns<T>; ++j)
          if (start + i * t.columns + j < p.length)
            k[start + i * t.columns + j] = edge[i * kColumns<T> + j];
    }
  }
}

// Blocks `begin` to `end` of one channel, all heads.
template <class T>
void ssm_forward_unit(const SsmProblem& p, int64_t channel, int64_t begin, int64_t end,
                      char* memory) {
  Scratch scratch(memory);
  const SsmTables<T> tables(p, channel, false, scratch);
  alignas(64) T edge[kTile * kColumns<T>];
  tables.make_right();
  for (int64_t block = begin; block < end; ++block) {
    for (int64_t head = 0; head < p.heads; ++head) {
      const int64_t kernel = head * p.channels + channel;
      tables.make_left(p.w + 2 * kernel * p.modes, block);
      forward_block(p, tables, block, edge, reinterpret_cast<T*>(p.k) + kernel * p.length);
    }
  }
}

// A unit of the gradient.
template <class T>
struct SsmSums {
  const SsmProblem& p;
  const SsmTables<T> t;
  // panel[r / kColumns][group][part][kTile modes][kColumns]: sums over q of left times dk.
  T* by_column;
  T* packed;  // columns of dk, side by side

  SsmSums(const SsmProblem& problem, int64_t channel, Scratch& scratch)
      : p(problem),
        t(p, channel, true, scratch),
        by_column(scratch.take<T>(2 * t.table_row * t.columns)),
        packed(scratch.take<T>(t.block * kColumns<T>)) {}

  void make_right() const {
    t.make_right();
    // Powers past the end meet zeros, and those of a growing mode may have overflown.
    for (int64_t r = p.length; r < t.columns; ++r)
      for (int64_t m = 0; m < 2 * t.modes; ++m)
        t.right[(r / kColumns<T> * t.table_row + m) * kColumns<T> + r % kColumns<T>] = 0;
  }

  void clear() const {
    for (int64_t i = 0; i < 2 * t.table_row * t.columns; ++i) by_column[i] = 0;
  }

  // packed[q][kColumns] = columns r on of the block's rows of dk, zero past its end.
  void pack(const T* dk, int64_t block, int64_t r) const {
    const int64_t stride = p.dk_stride[2];
    for (int64_t q = 0; q < t.count(block); ++q) {
      const int64_t start = (t.first_row(block) + q) * t.columns + r;
      T* to = packed + q * kColumns<T>;
      if (stride == 1 && start + kColumns<T> <= p.length) {
        SEQCONV_UNROLL
        for (int j = 0; j < kColumns<T>; j += kLanes<T>)
          store_vector(to + j, load_vector(dk + start + j));
        continue;
      }
      for (int j = 0; j < kColumns<T>; ++j)
        to[j] = start + j < p.length ? dk[(start + j) * stride] : T(0);
    }
  }

  // Adds a block of dk to by_column.
  void add(const T* dk, int64_t block) const {
    for (int64_t r = 0; r < t.columns; r += kColumns<T>) {
      pack(dk, block, r);
      T* to = by_column + 2 * t.table_row * r;
      for (int64_t part = 0; part < 4 * t.groups; ++part) {
        Vec<T> sum[kTile][3] = {};
        product<T>(t.left + part * kTile * t.block, packed, t.count(block), sum);
        SEQCONV_UNROLL
        for (int i = 0; i < kTile; ++i) {
          SEQCONV_UNROLL
          for (int j = 0; j < 3; ++j, to += kLanes<T>)
            store_vector(to, load_vector(to) + sum[i][j]);
        }
      }
    }
  }

  // S_0 and S_1 of mode n, four doubles, from its sums by column.
  void finish(int64_t n, double* to) const {
    const T columns = static_cast<T>(t.columns);
    Vec<T> lane;
    for (int i = 0; i < kLanes<T>; ++i) lane[i] = static_cast<T>(i);
    Vec<T> zero_re = {}, zero_im = {}, one_re = {}, one_im = {};
    for (int64_t r = 0; r < t.columns; r += kLanes<T>) {
      const int64_t panel = r / kColumns<T>, inside = r % kColumns<T>;
      const T* z = t.right + (panel * t.table_row + 2 * n) * kColumns<T> + inside;
      const T* d = by_column + panel * 2 * t.table_row * kColumns<T> +
                   (n / kTile * 4 * kTile + n % kTile) * kColumns<T> + inside;
      const Vec<T> re = load_vector(z), im = load_vector(z + kColumns<T>);
      const Vec<T> d0_re = load_vector(d), d0_im = load_vector(d + kTile * kColumns<T>);
      const Vec<T> number = lane + static_cast<T>(r);
      const Vec<T> d1_re = load_vector(d + 2 * kTile * kColumns<T>) * columns + number * d0_re;
      const Vec<T> d1_im = load_vector(d + 3 * kTile * kColumns<T>) * columns + number * d0_im;
      zero_re += re * d0_re - im * d0_im;
      zero_im += re * d0_im + im * d0_re;
      one_re += re * d1_re - im * d1_im;
      one_im += re * d1_im + im * d1_re;
    }
    to[0] = sum_of<T>(zero_re);
    to[1] = sum_of<T>(zero_im);
    to[2] = sum_of<T>(one_re);
    to[3] = sum_of<T>(one_im);
  }
};

// S_0 and S_1 of every head and mode of a channel over blocks `begin` to `end`: four doubles each,
// at sums[head][channel][mode].
template <class T>
void ssm_backward_unit(const SsmProblem& p, int64_t channel, int64_t begin, int64_t end,
                       double* sums, char* memory) {
  Scratch scratch(memory);
  const SsmSums<T> unit(p, channel, scratch);
  unit.make_right();
  for (int64_t head = 0; head < p.heads; ++head) {
    const T* dk =
        reinterpret_cast<const T*>(p.dk) + head * p.dk_stride[0] + channel * p.dk_stride[1];
    unit.clear();
    for (int64_t block = begin; block < end; ++block) {
      if (head == 0 || end - begin > 1) unit.t.make_left_for_sums(block);
      unit.add(dk, block);
    }
    for (int64_t n = 0; n < p.modes; ++n)
      unit.finish(n, sums + 4 * ((head * p.channels + channel) * p.modes + n));
  }
}

template <class T>
int64_t ssm_blocks(const SsmProblem& p, bool backward) {
  Scratch counting;
  return SsmTables<T>(p, 0, backward, counting).blocks();
}

template <class T>
size_t ssm_scratch(const SsmProblem& p, bool backward) {
  Scratch counting;
  if (backward)
    SsmSums<T>(p, 0, counting);
  else
    SsmTables<T>(p, 0, false, counting);
  return counting.used();
}

template <class T>
constexpr SsmKernel kSsmKernel = {ssm_blocks<T>, ssm_scratch<T>, ssm_forward_unit<T>,
                                  ssm_backward_unit<T>};

}  // namespace seqconv::SEQCONV_ISA
