// The shape of a transform of 16-bit rows on tensor cores, and where its threads find things in
// shared memory.
//
// n = R 256 points, position t = 256 i + j: the R points of a column j are transformed at once, and
// then the 256 points of each of the R results, so that a row passes through shared memory once on
// either side of the inner 256 points, whatever n is. R = radix * split: a product with a matrix
// of 16 x 16 transforms up to 16 points (fewer as diagonal blocks, for several groups of columns),
// and butterflies between registers of one lane join 2, 4 or 8 such products. Before and after, a
// row lies in two planes of fp16 numbers, its real and its imaginary parts.
//
// The outer passes work on the transpose: the columns are the rows of the left operand. So both
// directions have the same fragments, and one table of twiddles serves both: registers e = 2 j + h
// of a lane hold column group + 8 h of the results 2 thread + 8 j and the next one.
#pragma once
#include "mma.cuh"

// What a kernel is made for. What is not asked for is not in its code.
enum Flags {
  kPieces = 1,     // rows that asynchronous copies bring, 16 bytes at a time; else any rows
  kWhole = 2,      // pieces: every row has all n points
  kPreGate = 4,    // pieces: inputs are gated; in gradients dy as well
  kPostGate = 8,   // pieces: so are outputs
  kWithGelu = 16,  // pieces: the activation is gelu
  kSlope = 32      // pieces: it is gelu's derivative
};

// kWarps work on a row, and a block has kSlots such teams. Each team works on kPair rows together:
// they share what is read of tables, and give a warp so many independent chains of products.
template <int kPoints, int kWarps, int kSlots, int kPair, int kFlags>
struct Shape {
  static constexpr int points = kPoints, rows = kPoints / 256;
  static constexpr int radix = rows < 16 ? rows : 16, split = rows / radix;
  static constexpr int groups = 16 / radix;  // of 16 columns side by side in a matrix
  static constexpr int warps = kWarps, slots = kSlots, pair = kPair, threads = 32 * kWarps;
  static constexpr int outer = radix / warps, inner = rows / warps;  // tiles of a warp
  static constexpr bool pieces = kFlags & kPieces, whole = kFlags & kWhole, pre = kFlags & kPreGate,
                        post = kFlags & kPostGate, gelu = kFlags & kWithGelu,
                        slope = kFlags & kSlope;

  // The 8 rows that an instruction touches begin in different banks. They are an odd number of 16
  // bytes apart, or 2 of them where some are of other groups of columns (see in_row).
  static constexpr int pitch = 16 * (rows <= 4 ? 34 : 33), plane = rows * pitch;
  // A row comes into a plane of its own, so that the next one can come while it is worked on, and
  // gates do so, too. Where the threads bring it themselves, it comes into the plane of real parts.
  static constexpr int raw = pieces ? 2 : 0, planes = (pieces ? 3 : 2) + pre + post;
  static constexpr int row = planes * plane, slot = pair * (row + 64);  // and the largest sizes

  // Up to 8,192 points the twiddles are in shared memory, and the taps' spectrum with them, where
  // there is room. Else a twiddle is the product of two factors, and the spectrum comes from L2.
  static constexpr bool keeps = kPoints <= 4096 || (kPoints == 8192 && pieces);
  static constexpr int twiddles = keeps ? 4 * kPoints : 4 * 4096 + (split - 1) * 1024;
  static constexpr int spectrum = keeps ? 4 * kPoints : 0;
  // The factors between the products of a column and its butterflies are in matrices of their own
  // for each product, where there is room for them. With 4 products they lie in the 16 bytes that
  // end every row of a plane, 32 rows to a matrix.
  static constexpr bool padded = split == 4 && slots * pair * planes * rows / 32 >= 12;
  static constexpr bool absorbs = split == 2 || padded;
  static constexpr int matrices = absorbs ? split : 1;
  static constexpr int constants = (split == 8 ? 11 : split == 2 ? 16 : 12) * 512;
  static constexpr int turns = absorbs ? 0 : (split - 1) * 64;
  static constexpr int tables = twiddles + constants + turns;  // bytes, as they lie in memory
  static constexpr int padding = twiddles + constants + (split == 2 ? 0 : (split - 1) * 64);
  static constexpr int shared = tables + spectrum + slots * slot;
  // Where in the slots matrix m of those in the rows' ends begins.
  static SEQCONV_DEVICE constexpr int pad(int m) {
    const int each = rows < 32 ? 1 : rows / 32, of_plane = m / each;
    return of_plane / (pair * planes) * slot + of_plane % (pair * planes) * plane +
           m % each * 32 * pitch + 512;
  }
  // Matrices stay in registers for all rows where threads have enough of them.
  static constexpr bool holds = kPoints <= 4096 || (kWarps * kSlots <= 12 && pieces);
};

// Row i of 256 points lies at this place of a plane: the inputs of a product follow each other.
template <class S>
SEQCONV_DEVICE int place_of(int row) {
  return row % S::split * 16 + row / S::split;
}
// Bytes from the beginning of a plane's row. Pieces of 8 columns swap in pairs every 64 columns, so
// that the 8 rows of 16 columns which the inner pass reads at once lie in different banks.
SEQCONV_DEVICE u32 in_row(int column) { return 2 * column ^ (column >> 2 & 16); }

// Where a lane works. These addresses stay in registers, and all others are at constant distances.
template <class S>
struct Lane {
  int warp, lane, slot, rank, barrier;
  u32 base;                                // of everything
  u32 tables, constants, turns, spectrum;  // this lane's 16 bytes of each
  u32 plane;                               // the first one of the team
  u32 own;       // pieces: the first one that this thread brings, if it came to the first plane
  u32 outer[2];  // rows of the outer passes' matrices; every other 4 tiles the second
  u32 inner;     // rows of the inner pass
  u32 largest, pads;

  SEQCONV_DEVICE explicit Lane(const unsigned char* shared) : base(shared_address(shared)) {
    const int all = threadIdx.x >> 5;
    // The compiler does not know how many threads there are.
    warp = S::warps == 1 ? 0 : all % S::warps, slot = S::slots == 1 ? 0 : all / S::warps;
    lane = threadIdx.x & 31, rank = 32 * warp + lane, barrier = 1 + slot;
    plane = base + S::tables + S::spectrum + slot * S::slot;
    tables = base + warp * (S::keeps ? S::split : 1) * 1024 + 16 * lane;
    constants = base + S::twiddles + 16 * lane;
    turns = base + S::twiddles + S::constants + 16 * (lane & 3);
    spectrum = base + S::tables + warp * 1024 + 16 * lane;
    own = plane + place_of<S>(warp) * S::pitch + in_row(8 * lane);
    // Row k of a matrix is point k % radix of a group of columns, `radix` groups after the one
    // before.
    const int k = lane & 15, group = k / S::radix, piece = lane >> 4;
    const u32 row = plane + k % S::radix * S::pitch + group * S::radix * 32 + warp * 32;
    const int swap = (group * S::radix >> 2 & 1) ^ (S::warps > 4 ? warp >> 2 & 1 : 0);
    outer[0] = row + (piece ^ swap) * 16, outer[1] = row + (piece ^ swap ^ 1) * 16;
    inner = plane + warp * S::pitch + (lane & 15) * 32 + ((lane >> 4) ^ (lane >> 2 & 1)) * 16;
    largest = plane + S::pair * S::row;
    pads = base + S::tables + S::spectrum + S::pitch * lane;
    keep(tables), keep(constants), keep(outer[0]), keep(inner), keep(largest);
    if (S::slots > 1) keep(barrier), keep(own);
    if (S::keeps) keep(spectrum);
    if (S::warps <= 4) keep(outer[1]);
    if (S::turns > 0) keep(turns);
    if (S::padded) keep(pads);
  }
  // A row of an outer pass's tile in the first plane.
  SEQCONV_DEVICE u32 at(int tile) const {
    const int second = S::warps <= 4 ? S::warps * tile >> 2 & 1 : 0;
    return outer[second] + S::warps * tile * 32;
  }
  SEQCONV_DEVICE u32 element(int t) const {  // in the first plane
    return plane + place_of<S>(t >> 8) * S::pitch + in_row(t & 255);
  }
  // The team's threads wait for each other.
  SEQCONV_DEVICE void meet() const {
    if (S::warps == 1)
      sync_warp();
    else
      named_barrier(barrier, S::threads);
  }
};
