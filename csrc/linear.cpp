// The Linear op: quantize the rows, then tiles of rows x channels, on a team of threads.
#include <algorithm>
#include <cstring>
#include <optional>

#include "activations.h"
#include "dispatch.h"
#include "gemm.h"
#include "lowbit.h"
#include "pages.h"
#include "parallel.h"
#include "scratch.h"

namespace lowbit {
namespace {

// What a thread does of m x n outputs. Together: the team shares the codes of all rows, and waits
// for them; otherwise each thread quantizes the rows that it needs.
struct Share {
  Range rows, channels;
  bool together;
};

// A thread with so many rows has enough to do with each weight, so it takes all channels: what it
// quantizes stays in its cache. Measured, see README.md.
constexpr int64_t kOwnRows = 48;

// Up to so many values it is quicker that each thread quantizes all of them than that one waits for
// the codes of another.
constexpr int64_t kOwnValues = int64_t{1} << 18;

Share share_of(const Kernel& kernel, int64_t m, const Weights& weights, int planes, int thread,
               int team) {
  if (team == 1) return {{0, m}, {0, weights.n}, false};
  const int64_t row_tiles = ceil_div(m, kernel.mr / planes);
  const int64_t channel_tiles = ceil_div(weights.n, kernel.nr);
  int across = 1, down = team;
  if (m < kOwnRows * team) {
    int64_t least = row_tiles * channel_tiles + 1;
    for (int parts = team; parts >= 1;
         --parts) {  // weights are read once if only channels are split
      const int64_t longest = ceil_div(channel_tiles, parts) * ceil_div(row_tiles, team / parts);
      if (longest < least) across = parts, down = team / parts, least = longest;
    }
  }
  const bool together = down < team && m * weights.k * team > kOwnValues;
  if (thread >= across * down) return {{0, 0}, {0, 0}, together};
  // Tiles of full width, unless these cannot be shared equally.
  const int64_t width = channel_tiles % across == 0 ? kernel.nr : kernel.tall_nr;
  const Range c = part(ceil_div(weights.n, width), thread % across, across);
  return {part(m, thread / across, down),
          {c.begin * width, std::min(weights.n, c.end * width)},
          together};
}

// Rows that a power of two apart would share a cache set.
int64_t code_pitch(int64_t k) {
  const int64_t pitch = round_up(std::max<int64_t>(k, 1), 64);
  return pitch % 1024 == 0 ? pitch + 64 : pitch;
}

// Codes live for one pass over the weights: enough rows to make up for reading these again, not
// more memory.
constexpr int64_t kPassBytes = int64_t{8} << 20, kMinPassRows = 1024;

struct RowBuffers {
  RowBuffers(Scratch& scratch, int64_t m, int64_t k, int planes, const Depth& depth, bool use_bits)
      : pitch(use_bits ? std::max<int64_t>(depth.steps, 1) : code_pitch(k)) {
    scratch.cut(piece(codes, use_bits ? 0 : m * planes * pitch),
                piece(bits, use_bits ? m * pitch : 0), piece(scale, m),
                piece(sums, m * planes * depth.chunks()));
  }

  int64_t pitch;
  int8_t* codes = nullptr;
  uint32_t* bits = nullptr;
  float* scale;
  int32_t* sums;
};

// Up to this length rows become bits side by side: longer ones come from memory, one at a time.
constexpr int64_t kShortRow = 2048;

// How a layer's rows become codes.
struct Quantizer {
  const Kernel& kernel;
  const Depth& depth;
  Activation activation;
  UnitScale fixed;
  int64_t k;

  // x [count, k] to the first rows of `out` behind `first`.
  void rows(const float* x, int64_t first, int64_t count, RowBuffers& out) const {
    int64_t i = 0;
    if (out.bits) {
      if (!fixed.fixed && k <= kShortRow)
        for (; i + kBitRows <= count; i += kBitRows) bit_rows(x + i * k, first + i, out);
      for (; i < count; ++i) bit_row(x + i * k, first + i, out);
    } else if (activation == Activation::int8 && !fixed.fixed && depth.chunks() == 1) {
      uint32_t amax = count ? kernel.amax_bits(x, k) : 0;
      for (; i < count; ++i)
        amax = row8(x + i * k, i + 1 < count ? x + (i + 1) * k : nullptr, amax, first + i, out);
    } else {
      for (; i < count; ++i) row(x + i * k, first + i, out);
    }
  }

 private:
  void bit_rows(const float* x, int64_t first, RowBuffers& out) const {
    float lanes[kBitRows][kSumLanes] = {};
    kernel.binarize_rows(x, k, out.bits + first * out.pitch, out.pitch, lanes[0]);
    for (int r = 0; r < kBitRows; ++r) {
      out.scale[first + r] = unit_scale(kernel, lanes[r], x + r * k, k).scale;
      count_bits(first + r, out);
    }
  }

  void bit_row(const float* x, int64_t row, RowBuffers& out) const {
    float lanes[kSumLanes] = {};
    const uint32_t seen =
        encode_bits(kernel, fixed, x, k, out.bits + row * out.pitch, fixed.fixed ? nullptr : lanes);
    out.scale[row] = fixed.fixed ? scale_of(fixed, seen) : unit_scale(kernel, lanes, x, k).scale;
    count_bits(row, out);
  }

  // How many count.
  void count_bits(int64_t row, RowBuffers& out) const {
    int32_t* const sums = out.sums + row * depth.chunks();
    for (int64_t i = 0; i < depth.chunks(); ++i)
      sums[i] = static_cast<int32_t>(
          depth.chunk(i / depth.chunks_per_group, i % depth.chunks_per_group).size);
  }

  // The usual case: amax is that of x, and that of `next`, unless it is null, is returned.
  uint32_t row8(const float* x, const float* next, uint32_t amax, int64_t row,
                RowBuffers& out) const {
    const UnitScale unit = unit_scale(kernel, activation, amax, x, k);
    int8_t* const q = out.codes + row * out.pitch;
    out.scale[row] = unit.scale;
    uint32_t following = 0;
    if (unit.inverse == 0.0f) {
      std::memset(q, 0, static_cast<size_t>(out.pitch));
      out.sums[row] = 0;
      return next ? kernel.amax_bits(next, k) : 0;
    }
    out.sums[row] = kernel.quantize_row8(x, k, unit.inverse, q, next, &following);
    std::memset(q + k, 0, static_cast<size_t>(out.pitch - k));
    return following;
  }

  void row(const float* x, int64_t row, RowBuffers& out) const {
    const int count = planes(activation);
    const UnitScale unit =
        fixed.fixed ? fixed
                    : unit_scale(kernel, activation, unit_amax(kernel, activation, x, k), x, k);
    int8_t* q = out.codes + row * count * out.pitch;
    out.scale[row] = scale_of(unit, encode(kernel, activation, unit, x, k, q, q + out.pitch));
    int32_t* const sums = out.sums + row * count * depth.chunks();
    for (int p = 0; p < count; ++p, q += out.pitch) {
      std::memset(q + k, 0, static_cast<size_t>(out.pitch - k));
      depth.sum(kernel, q, sums + p * depth.chunks());
    }
  }
};

// Of the calling thread, which frees it when it ends.
Scratch& own_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

// As many rows as one pass quantizes at once.
void linear_pass(const float* x, int64_t m, const Weights& weights, Activation activation, float* y,
                 int threads, const UnitScale& fixed) {
  const Kernel& kernel = lowbit::kernel();
  const Depth depth(weights.format, weights.k, weights.group_size);
  // A zero point needs the sum of the activations, which bits do not have.
  const bool use_bits =
      traits(weights.format).bits == 1 && activation == Activation::binary && !weights.group_zero;
  const int count = planes(activation);
  const Quantizer quantizer{kernel, depth, activation, fixed, weights.k};
  threads = worthwhile_threads(threads, linear_work(m, weights));
  const auto buffers_for = [&](int64_t rows) {
    return RowBuffers(own_scratch(), rows, weights.k, count, depth, use_bits);
  };
  std::optional<RowBuffers> shared;  // null where a team that is smaller than asked for wants it
  if (share_of(kernel, m, weights, count, 0, threads).together) shared = buffers_for(m);

  parallel(threads, [&](int thread, int team) {
    const Share share = share_of(kernel, m, weights, count, thread, team);
    const Range r = share.rows, c = share.channels;
    const bool together = share.together && shared;
    RowBuffers buffers = together ? *shared : buffers_for(r.end - r.begin);
    const Range mine = together ? part(m, thread, team) : r;
    const int64_t base = together ? 0 : r.begin;  // the buffers' first row
    quantizer.rows(x + mine.begin * weights.k, mine.begin - base, mine.end - mine.begin, buffers);
    if (together) team_barrier(team);
    if (r.begin == r.end || c.begin == c.end) return;

    const int64_t first = r.begin - base;
    Rows rows;
    rows.count = r.end - r.begin;
    rows.planes = count;
    rows.pitch = buffers.pitch;
    if (buffers.bits)
      rows.bits = buffers.bits + first * buffers.pitch;
    else
      rows.codes = buffers.codes + first * count * buffers.pitch;
    rows.scale = buffers.scale + first;
    rows.sums = buffers.sums + first * count * depth.chunks();
    rows.far = is_far(m * weights.n);
    gemm(kernel, weights, depth, rows, c.begin, c.end, y + r.begin * weights.n, weights.n);
  });
}

}  // namespace

int64_t linear_work(int64_t m, const Weights& weights) {
  // One row of 8-bit weights takes as long as four where they are multiplied alone.
  const int64_t rows = std::max<int64_t>(m, traits(weights.format).bits / 2);
  return rows * weights.n * weights.k;
}

void linear(const float* x, int64_t m, const Weights& weights, Activation activation, float* y,
            int threads, const StaticActivation* fixed) {
  if (weights.n == 0) return;
  prefer_huge_pages(y, static_cast<size_t>(m * weights.n) * sizeof(*y));
  const UnitScale unit = fixed_scale(fixed);
  const int64_t row_bytes = planes(activation) * code_pitch(weights.k);
  const int64_t rows = std::max(kPassBytes / row_bytes, kMinPassRows);
  for (int64_t first = 0; first < m; first += rows)
    linear_pass(x + first * weights.k, std::min(rows, m - first), weights, activation,
                y + first * weights.n, threads, unit);
}

}  // namespace lowbit
