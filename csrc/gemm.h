// The driver between a layer and the microkernel: tiles, groups, chunks of K, epilogue. One thread,
// no intrinsics.
#pragma once

#include "kernel.h"
#include "lowbit.h"
#include "parallel.h"
#include "scratch.h"

namespace lowbit {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Where the weights of k lie in a panel, as byte `to` of four.
inline TapField tap_field(const FormatTraits& f, int64_t k, int64_t to) {
  const int64_t in = k % f.depth();
  return {k / f.depth() * kVectorBytes,
          static_cast<int>(in % 4 * 8 + in / 4 * f.bits),
          f.bits,
          f.shift(),
          f.add,
          static_cast<int>(to)};
}

// How K is cut: into groups with scales of their own (one without), and those into chunks whose
// int32 sums are exact.
struct Depth {
  Depth(Format format, int64_t k, int64_t group_size);

  struct Chunk {
    int64_t step, steps;  // 64-byte vectors of a panel: the first, how many
    int64_t k, size;      // the same in k; the last one ends with K
  };
  Chunk chunk(int64_t group, int64_t index) const;
  int64_t chunks() const { return groups * chunks_per_group; }

  // sums[i] = the sum of the codes of chunk i.
  void sum(const Kernel& kernel, const int8_t* codes, int32_t* sums) const;

  int64_t groups;
  int64_t chunks_per_group;  // 1, but for a K or a group above kChunk
  int64_t steps;             // of a whole panel
  int64_t group_steps;       // of a group

 private:
  int64_t k_, depth_, group_k_, chunk_k_;
};

// The activations of some rows; row r, plane p lies at (r * planes + p) * pitch.
struct Rows {
  int64_t count = 0;
  int planes = 1;  // 2: int16 as hi, lo
  const int8_t* codes =
      nullptr;  // zero from K to the end of the last step; null where bits are used
  const uint32_t* bits = nullptr;  // W1A1: 1 where x < 0, so that bit w != bit a is an agreement
  const uint32_t* mask = nullptr;  // which bits count, or null: all up to K
  ptrdiff_t pitch = 0;             // in elements of codes or bits
  const float* scale = nullptr;    // [count]
  const int32_t* sums =
      nullptr;  // [count * planes][depth.chunks()]: of codes; of bits, how many count
  const int32_t* seed = nullptr;  // not null: the weights are centred; rows need no sums
  const float* bias =
      nullptr;  // [count][16], not null: a bias of each row (8-bit codes, one group)
  // Not 0: rows are in pieces (Tile::segments), and each `line` of them `line_pitch` bytes behind
  // the last.
  int64_t line = 0;
  ptrdiff_t line_pitch = 0;
  const ptrdiff_t* segments = nullptr;
  int64_t segment_steps = 0;
  // [count], not null: outside these steps a row's codes are all 0 (one chunk). Neither end is
  // behind that of the row before.
  const Range* steps = nullptr;
  bool far = false;  // the caches do not hold all of the output, see is_far()
};

// Whether an output of so many floats comes from behind the second caches.
inline bool is_far(int64_t outputs) { return outputs >= int64_t{2} << 20; }

// The weights with 8-bit codes less 128, padding 0, for Kernel::dot_centred, and their seed [panels
// * 16], cut from `scratch`. A tap of K has tap_channels k, the first `channels` of them used.
Weights centre(const Weights& weights, int64_t channels, Scratch& scratch, const int32_t*& seed);

// Where the codes of an image go, and those that are added before; the last panel is written whole.
struct CodeImage {
  const Requantize* to;
  int8_t* q;             // of output (0, 0)
  ptrdiff_t pixel, row;  // bytes from one to the next
  const int8_t* residual = nullptr;
  ptrdiff_t residual_pixel = 0, residual_row = 0;

  bool in_registers() const { return to->in_registers() && !residual; }
};

// Where the codes of a row go, and those that are added before: pixels' addresses, and the channel
// of the weights' first.
struct CodeRows {
  const Requantize* to;
  int8_t* const* q;               // [count]
  const int8_t* const* residual;  // [count], or null
  int64_t first;
  bool whole;  // whole panels may be written and read
};

// y[r][c] for all rows and the channels [begin, end) of `weights`, its epilogue applied; begin is a
// multiple of kernel.nr.
void gemm(const Kernel& kernel, const Weights& weights, const Depth& depth, const Rows& rows,
          int64_t begin, int64_t end, float* y, ptrdiff_t y_pitch);

// Outputs channels first: y[c * plane + r]. `room`: memory for rows.count x the channels.
struct PlaneRows {
  float* y;
  ptrdiff_t plane;
  float* room;
};
void gemm(const Kernel& kernel, const Weights& weights, const Depth& depth, const Rows& rows,
          int64_t begin, int64_t end, const PlaneRows& planes);

// The same as codes. The rows' scales are 1.
void gemm(const Kernel& kernel, const Weights& weights, const Depth& depth, const Rows& rows,
          int64_t begin, int64_t end, const CodeRows& codes);

}  // namespace lowbit
