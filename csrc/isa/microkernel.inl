// The integer GEMM microkernels, once, over the vocabulary that an ISA's file defines before it
// includes this one:
//
//   Reg                     a register of int32 lanes; kRegs of them make one 64-byte vector
//   FloatReg                the same of float32
//   kMr, kPanels            the tile where there are several: kMr rows x kPanels panels of 16
//   kTallMr, kTallPanels    a tall one, for few rows: weights are read once
//   kGroupSums              so many registers of sums leave as many for outputs from group to group
//   zero() load(p) store(p, v) bytes(x) opaque(v)
//   broadcast(p)            4 bytes to every lane
//   unpack<B, P, S, Tight>(v) bit field P (B bits wide) of every byte, moved to bit S; Tight: no
//                           register is left for a constant
//   dot<B>(acc, u, a)       acc[lane] += sum of 4 products u8 * s8 (u < 2^B)
//   signed_dot(acc, a, b)   of s8 * s8, with LOWBIT_SIGNED_DOT
//   bit_xor(a, b) bit_and(a, b) add(a, b) sub(a, b): the last two on lanes
//   shift_left<N>(v) shift_right<N>(v): lanes, arithmetic
//   interleave(t0..t3, out) 16 bytes of each of 4 taps to 16 lanes of 4 bytes
//   to_float(v) half_load(p) float_load(p) float_store(p, v) float_broadcast(p) float_splat(x)
//   multiply(a, b) float_add(a, b) fmadd(a, b, c) opaque_float(v)
//   float_max(a, b) float_min(a, b): b where a is NaN
//   Windows(stride) windows(v): lane i has the bytes [i * stride, i * stride + 4) of v, for strides
//                           up to 4, with LOWBIT_WINDOWS
//   float_quads(p, stride)  4 floats of every `stride`
//   zip_low(a, b) zip_high(a, b) pair_low(a, b) pair_high(a, b): in quarters of 4 lanes, the low or
//                           high half of both, lanes or pairs of them in turn
//   magnitude(v)            |v|
//   negative(v)             bit i: whether lane i is not >= 0
//   nearest(v)              to int32, halves to even
//   store_codes(p, v) load_codes(p)   a byte a lane, signed; stored saturated
//
// and what these ask for: dot.inl or, with LOWBIT_INT16_SUMS, _LANE_DOT, _MATRIX_DOT or _LONG_DOT,
// what is included instead; xnor.inl or, with LOWBIT_CARRY_SAVE or _BYTE_COUNTS, another.
//
// Everything is in an unnamed namespace: code compiled for one ISA must not be linked into
// another's. GCC keeps big accumulator arrays on the stack unless every loop over them is unrolled:
// hence the pragmas.

#define LOWBIT_UNROLL _Pragma("GCC unroll 16")
#define LOWBIT_INLINE inline __attribute__((always_inline))
#define LOWBIT_NOINLINE __attribute__((noinline))

constexpr int kNr = kPanels * kPanel;  // channels of a tile
constexpr int kRegBytes = kVectorBytes / kRegs;
constexpr int kLanes = kRegBytes / 4;

#include "epilogue.inl"

template <int MR, int V>
LOWBIT_INLINE void clear(Reg (&sums)[MR][V]) {
  LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int v = 0; v < V; ++v) sums[r][v] =
      zero();
}

// call(IntConstant<rows>) for Low <= rows <= High.
template <int Low, int High, class Call>
LOWBIT_INLINE void with_rows(int rows, Call call) {
  if constexpr (Low < High) {
    if (rows < High) return with_rows<Low, High - 1>(rows, call);
  }
  call(IntConstant<High>{});
}

// Rows [first, first + rows) of a tile, of one panel or more.
inline Tile rows_of(const Tile& t, int first, int rows) {
  Tile part = t;
  const int outputs = first / t.planes;
  part.rows = rows;
  if (t.codes) part.codes += first * t.pitch;
  if (t.bits) part.bits += first * t.pitch;
  if (t.mask) part.mask += first * t.pitch;
  part.offset += first * t.offset_pitch;
  if (t.sums) {
    part.sums += first * kNr;
  } else {
    if (t.group_sum) part.group_sum += outputs * t.groups;
    part.row_scale += outputs;
    part.bias += outputs * t.bias_pitch;
    part.y += outputs * t.y_pitch;
    part.y_fetched += outputs * t.y_pitch;
    if (t.q) part.q += outputs;
    if (t.residual) part.residual += outputs;
  }
  return part;
}

// What to prefetch while a panel is read, or the panel itself.
inline const uint8_t* ahead_of(const Tile& t, int panel) {
  return (panel % kPanels < t.fetch ? t.ahead : t.w) + panel * t.panel_stride;
}

#include "probes.inl"

// Calls call(sub-tile, rows) for all rows, in tiles of at most `most`, as equal as possible. Rows
// of an int16 activation stay together.
template <class Call>
LOWBIT_INLINE void over_rows(const Tile& t, int most, Call call) {
  const int units = t.rows / t.planes, parts = (t.rows + most - 1) / most;
  for (int i = 0; i < parts; ++i) {
    const int first = units * i / parts * t.planes, end = units * (i + 1) / parts * t.planes;
    call(rows_of(t, first, end - first), end - first);
  }
}

#if defined(LOWBIT_INT16_SUMS)
#include "int16_dot.inl"
#elif defined(LOWBIT_LANE_DOT)
#include "lane_tiles.inl"
#elif defined(LOWBIT_MATRIX_DOT)
#include "matrix_dot.inl"
#elif defined(LOWBIT_LONG_DOT)
#include "long_dot.inl"
#else
#include "dot.inl"
#endif

#ifndef LOWBIT_CENTRED_DOT
constexpr void (*dot_centred)(const Tile&) = nullptr;
#endif

#ifndef LOWBIT_ROW_DOT
void dot_rows(const Tile& t) { Dot<8, 0>::run(t); }
#endif

#ifndef LOWBIT_SEGMENTS
constexpr bool kSegments = false;
#endif

#if defined(LOWBIT_CARRY_SAVE)
#include "carry_save.inl"
#elif defined(LOWBIT_BYTE_COUNTS)
#include "neon_xnor.inl"
#else
#include "xnor.inl"
#endif

#include "codes.inl"
#include "depthwise.inl"
#include "grouped.inl"
#include "plane.inl"
