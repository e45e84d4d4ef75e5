// The table that one ISA fills: everything that is compiled more than once.
//
// Vocabulary. A *panel* is 16 output channels; one *step* of it is a 64-byte vector. A *tile* is
// `rows` activation rows times up to `nr` channels; its integer sums are int32 [rows][nr]. Rows are
// int8 with a common pitch; an int16 activation is two rows (hi, lo). Binary rows for xnor hold 32
// k in a dword, in the order of the W1 layout.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats.h"

namespace lowbit {

// From float outputs to codes: q = clamp(round(v * inverse), low, high) + zero, halves to even,
// where v is y + residual_scale * (r - residual_zero) with the code r of a residual, or y. Bounds
// are integers. ReLU and ReLU6 are bounds as well, since rounding keeps the order. With a table, q
// = table[i - first] for i = clamp(round(v * inverse), low, high).
struct Requantize {
  float inverse, low, high;
  int zero;
  float residual_scale;
  int residual_zero;
  bool saturates;       // the bounds are those of a byte, and |v * inverse| stays below 2^22
  bool hardswish;       // of v, before all this
  const int8_t* table;  // or null
  int first;

  // What microkernels do in registers: everything else is Kernel::requantize.
  bool in_registers() const { return !hardswish && !table; }
};

// One call of a GEMM microkernel: up to mr rows times up to nr channels, all of K. Steps are cut
// into groups of `group_steps`; the last one may be shorter.
struct Tile {
  int rows;                     // of codes or bits: an int16 activation is two (hi, lo)
  int panels;                   // of 16 channels, `panel_stride` bytes apart
  bool tall;                    // up to tall_mr rows, and any number of panels
  const int8_t* codes;          // activations (dot)
  const uint32_t *bits, *mask;  // the same (xnor): 1 where x < 0; which of them count, null: all
  ptrdiff_t pitch;              // of a row, in elements of codes or bits
  const uint8_t* w;             // the panels
  const uint8_t* ahead;         // what to prefetch meanwhile, step by step:
  int fetch;                    // so many panels, `panel_stride` apart
  bool in_order;                // or what follows in the memory, where panels are read side by side
  ptrdiff_t panel_stride;
  uint8_t* room;  // Kernel::room bytes of scratch, 64-byte aligned
  int64_t steps, group_steps, groups;
  // Not null (Kernel::segments): a row is in pieces of `segment_steps` steps, which begin so many
  // bytes behind `codes`; without groups.
  const ptrdiff_t* segments;
  int64_t segment_steps;
  const int32_t* offset;  // [rows][groups], `offset_pitch` apart: added to a group's sums
  ptrdiff_t offset_pitch;
  int32_t* sums;  // not null: sums of the only group go to [rows][nr], and no more

  // Epilogue; columns up to a multiple of 16 are read and written.
  int planes;  // 2: rows 2r and 2r + 1 make one, 256 * hi + lo, within int32
  const uint16_t *group_scale, *group_zero;  // float16 [panels][groups][16], or null
  const float* group_sum;     // [rows / planes][groups]: sums of activations, with group_zero
  const float* row_scale;     // [rows / planes]
  const float *scale, *bias;  // [nr]
  ptrdiff_t bias_pitch;       // 0, or 16: bias is [rows / planes][16], of a row
  bool stored;                // of one group: ends in finish_stored (codes, a bias of rows)
  float* y;                   // [rows / planes][nr], `y_pitch` apart
  ptrdiff_t y_pitch;
  const float* y_fetched;  // what is fetched meanwhile: y, or that of a later tile
  // Not null: codes in place of floats, row_scale is 1; row r's panels go to q[r] + q_first.
  const Requantize* requantize;
  int8_t* const* q;
  const int8_t* const* residual;  // as q, or null
  ptrdiff_t q_first;
  const int32_t* seed;  // [nr]: sums start there (dot_centred)
};

// One call of the depthwise microkernel: one or two rows of outputs, of `panels` panels of
// channels. It takes four rows of the image at a time, a *quad*: interleaved, they are *columns*,
// 16 channels x 4 rows in a vector, which meet the weights of each tap across by one dot product of
// four rows.
struct DepthwiseTile {
  const int8_t* const* rows;  // [quads * 4] of `width` pixels, `pitch` bytes apart
  int64_t width;
  ptrdiff_t pitch;
  int quads, taps;         // rows of the kernel, by four; taps across
  int64_t dilation;        // pixels from a tap to the next
  int64_t pixels, stride;  // outputs of a row; pixels of the image from one to the next
  int outputs;             // rows of outputs, 1 or 2
  int64_t first;           // channel of a pixel
  int panels;              // from there on
  const int8_t*
      w;  // [panel][output][tap][quad]: weights of a column; 0 where a row is not the kernel's
  ptrdiff_t w_stride;   // from a panel to the next
  const int32_t* seed;  // [panel][16]
  uint8_t* columns;     // width * quads * column_bytes of scratch
  int32_t* acc;         // not null: sums go to [pixel][nr], of one row of outputs, and no more
  const float *scale, *bias;  // [panel][16]; the scale is that of weights times that of activations
  float* y;                   // whole panels are written
  ptrdiff_t y_pitch, y_row;   // from a pixel to the next, from a row to the next
  const Requantize* requantize;  // not null: codes in place of floats, without a residual
  int8_t* q;                     // with y_pitch and y_row
};

// One channel of a depthwise convolution of channels first: its floats become codes within a border
// of zeros, and 16 neighbouring outputs are lanes, each with a *window* of four bytes of a row,
// which meet four taps by one dot product.
struct PlaneTile {
  const float* x;  // [height][width], 16 wide at least
  int64_t height, width;
  float inverse;  // of the scale; 0: all codes are 0
  int8_t* codes;  // of x[0][0]; rows `pitch` apart
  ptrdiff_t pitch;
  const int8_t* from;  // the first output's receptive field; 80 bytes behind the last can be read
  int rows;            // of the kernel: 3, of up to 4 taps across, or 5 or 7, of up to 8
  int64_t stride_h, stride_w;  // the latter 4 at most
  const int8_t* w;             // [rows][4 or 8 taps], 0 behind the last
  int32_t seed;
  float scale, bias;  // the scale is that of weights times that of activations
  float* y;           // [outputs][pixels], 16 pixels at least
  int64_t outputs, pixels;
};

// Where a weight of each channel is in a panel, what its code means, and which byte of four it
// becomes in a place of DepthwiseTile::w or GroupedTile::w.
struct TapField {
  ptrdiff_t at;  // the vector
  int from, bits, shift, add, to;
};

// What makes up all places of a panel.
struct Places {
  int count;
  const TapField* fields;
  const int* ends;  // [count]: behind a place's last field
  int counted;      // the first ones, whose weights a seed is made of
};

// One call of the microkernel of grouped convolutions whose panels hold several groups.
struct GroupedTile {
  const int8_t* from;     // the first output's receptive field, of the first panel
  ptrdiff_t stride;       // bytes from an output's to the next
  int64_t pixels;         // outputs
  const ptrdiff_t* taps;  // [tap_count] bytes from there on
  int tap_count, steps;   // steps of 4 channels of a group
  int panels;
  ptrdiff_t panel_bytes;   // from what a panel reads to what the next one does
  const uint8_t* control;  // [step][16][4]: which of the 16 bytes, above 127: none
  const int8_t* w;      // [panel][tap][step]: weights as of a column, 0 where there is no channel
  ptrdiff_t w_stride;   // from a panel to the next
  const int32_t* seed;  // [panel][16]
  const float *scale, *bias;  // [panel][16]; the scale is that of weights times that of activations
  float* y;                   // whole panels are written
  ptrdiff_t y_pitch;
  const Requantize* requantize;  // as above
  int8_t* q;
};

// How floats become codes: quantize8, or saturate8 (with a zero point).
struct PlaneCodes {
  float inverse;
  int zero;
  bool saturates;
};

constexpr int kBitRows = 4;  // see Kernel::binarize_rows

struct Kernel {
  const char* name;
  int mr, nr;            // rows (even) and channels (a multiple of 16) of the largest tile
  int tall_mr, tall_nr;  // the same of a tall one, for few rows: weights are read once
  int group_mr;          // rows of a tall one that combines groups in registers, or 0

  bool segments;  // whether `dot` takes rows in pieces: mr or mr - 1, of nr or tall_nr channels
  int64_t (*room)(int64_t k);  // bytes of scratch that `dot` needs for rows of k

  // s[r][c] = offset + sum over k of mul * code[c][k] * a[r][k], a group; int32 arithmetic modulo
  // 2^32. Then f = float(s), or fma(group_scale, float(s), f) over the groups with, where there is
  // a zero, fma(group_zero, group_sum, f) after each; y = fma(f, row_scale * scale, bias).
  // Index: Format.
  void (*dot[kFormatCount])(const Tile& tile);

  // Of 8-bit codes less 128, signed, in place of codes, and activations plus 128: s = seed + sum
  // over k of w[c][k] * (a[r][k] + 128), without groups. Null: an ISA has none.
  void (*dot_centred)(const Tile& tile);

  // dot of 8-bit codes whose rows have a bias of their own (Tile::bias_pitch), one group.
  void (*dot_rows)(const Tile& tile);

  // The same with s = offset + 2 * (number of k where bit w differs from bit a and bit `mask` is
  // set). With a = 1 for a negative activation these are the agreements of the signs.
  void (*xnor)(const Tile& tile);

  int column_bytes;  // of a column, and of its weights: 64, or 128 where bytes are widened
  void (*depthwise)(const DepthwiseTile& tile);
  void (*plane)(const PlaneTile& tile);  // null: an ISA has none
  // Codes, plus 128, of `panels` times 16 neighbouring outputs as panels of 8-bit weights: step s
  // of them are windows at from + places[s], outputs `stride` bytes apart (4 at most). Null as
  // `plane`.
  void (*window_panels)(const int8_t* from, const ptrdiff_t* places, int64_t steps, int64_t stride,
                        int64_t panels, uint8_t* out);
  void (*grouped)(const GroupedTile& tile);
  // `panels` panels of packed weights, `stride` apart, to the weights of the tiles above,
  // `w_stride` apart, and to their seed.
  void (*spread)(const uint8_t* packed, ptrdiff_t stride, int panels, const Places& places,
                 int8_t* w, ptrdiff_t w_stride, int32_t* seed);

  // Activations.
  uint32_t (*amax_bits)(const float* x,
                        int64_t n);  // largest |x| as an IEEE pattern; NaN is largest
  // Adds |x| to 16 strided lanes, the first to lane at % 16: element by element, in order.
  void (*add_abs)(const float* x, int64_t n, int64_t at, float* lanes);
  void (*quantize8)(const float* x, int64_t n, float inverse_scale, int8_t* q);
  // quantize8 of a row, and the sum of its codes; meanwhile, unless `next` is null, amax_bits of
  // next [n]. n is at most kChunk.
  int32_t (*quantize_row8)(const float* x, int64_t n, float inverse_scale, int8_t* q,
                           const float* next, uint32_t* amax);
  void (*quantize16)(const float* x, int64_t n, float inverse_scale, int8_t* hi, int8_t* lo);
  // With a scale that does not depend on x: codes are saturated. They return the largest |x| as
  // amax_bits does.
  uint32_t (*saturate8)(const float* x, int64_t n, float inverse_scale, int zero, int8_t* q);
  uint32_t (*saturate16)(const float* x, int64_t n, float inverse_scale, int8_t* hi, int8_t* lo);
  void (*binarize)(const float* x, int64_t n, int8_t* q);  // +1 where x >= 0, else -1
  // 1 where x < 0; the rest of a dword 0. Unless `lanes` is null, add_abs at 0 as well.
  void (*binarize_bits)(const float* x, int64_t n, uint32_t* bits, float* lanes);
  // The same with lanes for kBitRows rows [n], one after the other; bits `pitch` apart, lanes 16.
  void (*binarize_rows)(const float* x, int64_t n, uint32_t* bits, ptrdiff_t pitch, float* lanes);
  // out[g] = sum of q[i] over the g-th `group` of them, for all n; the last may be shorter.
  void (*sum_groups)(const int8_t* q, int64_t n, int64_t group, int32_t* out);
  // out[r] = sum of the k codes of row r.
  void (*sum_rows)(const int8_t* rows, ptrdiff_t pitch, int64_t count, int64_t k, int32_t* out);
  // Receptive fields as rows: the s-th `bytes` bytes of row i are those at from + i * stride +
  // segments[s]. Up to 63 bytes more are read and written after each.
  void (*gather)(const int8_t* from, ptrdiff_t stride, int64_t count, const ptrdiff_t* segments,
                 int64_t segment_count, int64_t bytes, int8_t* to, ptrdiff_t pitch);
  // Codes of channels first to channels last: out[i][offset + c] is that of x[c * plane + i], for i
  // < count, c < channels <= 64, and 0 for channels <= c < width <= 64. Where the width is no
  // multiple of 4, up to 3 bytes more are written, but not behind the last pixel's; those of a
  // pixel are written before those of the next. Returns the largest |x| as amax_bits does where
  // codes saturate, else 0.
  uint32_t (*encode_planes)(const PlaneCodes& how, const float* x, ptrdiff_t plane, int count,
                            int channels, int width, int8_t* const* out, ptrdiff_t offset);
  // The same of three channels whose pixels lie side by side: q[3 * i + c], nothing behind the
  // last.
  uint32_t (*encode_triples)(const PlaneCodes& how, const float* x, ptrdiff_t plane, int64_t count,
                             int8_t* q);
  // Codes of channels first, plus 128, to panels of 16 pixels, `stride` bytes apart, as packed
  // 8-bit weights have them: x[c * plane + i] for i < 16 * panels. Returns the same.
  uint32_t (*encode_panels)(const PlaneCodes& how, const float* x, ptrdiff_t plane, int64_t panels,
                            int64_t channels, uint8_t* out, ptrdiff_t stride);
  // A panel of packed weights as 16 rows of values in the order of k, `pitch` (a multiple of 4)
  // bytes apart.
  void (*value_rows)(const uint8_t* packed, int64_t steps, const FormatTraits& format, int8_t* rows,
                     ptrdiff_t pitch);

  // Epilogue where a tile's sums are not its output, on `rows` x nr.
  void (*to_float)(int rows, const int32_t* sums, float* f);
  // wide[r] += 256 * hi + lo of rows 2r and 2r + 1 of sums (planes 2), or += sums[r] (planes 1)
  void (*widen)(int rows, int planes, const int32_t* sums, double* wide);
  void (*narrow)(int rows, const double* wide, float* f);  // f = float(wide)
  // f[r][c] = fma(scale[c], x[r][c], f[r][c])
  void (*madd)(int rows, const float* scale, const float* x, float* f);
  // y[r][c] = fma(f[r][c], row_scale[r] * scale[c], bias[c]) for c < cols; bias null: 0
  void (*finish)(int rows, int cols, const float* f, const float* row_scale, const float* scale,
                 const float* bias, float* y, ptrdiff_t y_pitch);
  void (*apply)(Epilogue epilogue, int64_t rows, int64_t cols, float* y, ptrdiff_t y_pitch);
  // y[c * y_pitch + r] = x[r * x_pitch + c]: pixels to channels first, or back
  void (*transpose)(int64_t rows, int64_t cols, const float* x, ptrdiff_t x_pitch, float* y,
                    ptrdiff_t y_pitch);
  // to[p][c] = float(from[p][c]), panels of 16 float16; those of `from` are `stride` apart
  void (*widen_scales)(const uint16_t* from, ptrdiff_t stride, int panels, float* to);

  // Codes of a program. y [rows][cols] to q[r][first .. first + cols); residual: null or as q.
  void (*requantize)(const Requantize& to, int64_t rows, int64_t cols, ptrdiff_t first,
                     const float* y, ptrdiff_t y_pitch, const int8_t* const* residual,
                     int8_t* const* q);
  // y = fma(b - zero_b, scale_b, (a - zero_a) * scale_a)
  void (*add_codes)(int64_t n, const int8_t* a, int zero_a, float scale_a, const int8_t* b,
                    int zero_b, float scale_b, float* y);
  // y = float((a - zero_a) * (b - zero_b)) * scale
  void (*multiply_codes)(int64_t n, const int8_t* a, int zero_a, const int8_t* b, int zero_b,
                         float scale, float* y);
  void (*max_codes)(int64_t n, const int8_t* a, int8_t* q);                    // q = max(q, a)
  void (*total_codes)(int64_t n, const int8_t* a, int32_t* sum);               // sum += a
  void (*lookup)(int64_t n, const int8_t* a, const int8_t* table, int8_t* q);  // table[uint8(a)]
  void (*dequantize)(int64_t n, const int8_t* a, int zero, float scale, float* y);

  // How well the nearest codes in [low, high] fit x at a scale, over i with mask[i] = 1 (it is 0
  // elsewhere), with v = mul * code + add: out = {sum of (x - scale * v)^2, sum of v * x, sum of v
  // * v}.
  void (*fit)(const float* x, const float* mask, int64_t n, float scale, float low, float high,
              float mul, float add, float* out);

  // Ceilings: run `iterations` of the instruction mix, return the multiply-accumulates done.
  // probe_dot's index: codes of 8, 4, 2, 1 bits.
  double (*probe_dot[4])(int64_t iterations);
  double (*probe_fma)(int64_t iterations);
  double (*probe_xnor)(int64_t iterations);
  uint64_t (*read)(const void* p, int64_t bytes);  // a sum of everything read
};

}  // namespace lowbit
