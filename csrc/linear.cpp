// The Linear op: quantize the rows, then tiles of rows x channels, on a team of threads.
#include <algorithm>
#include <cstring>

#include "activations.h"
#include "dispatch.h"
#include "gemm.h"
#include "lowbit.h"
#include "pages.h"
#include "parallel.h"
#include "scratch.h"

namespace lowbit {
namespace {

// How a team shares m x n tiles: `across` parts of the channels times `down` parts of the rows.
struct Grid {
  int across, down;
};

Grid make_grid(int threads, int64_t row_tiles, int64_t channel_tiles) {
  Grid best{1, 1};
  int64_t least = row_tiles * channel_tiles + 1;
  for (int across = threads; across >= 1;
       --across) {  // weights are read once if only channels are split
    const int down = threads / across;
    const int64_t longest = ceil_div(channel_tiles, across) * ceil_div(row_tiles, down);
    if (longest < least) best = {across, down}, least = longest;
  }
  return best;
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

void quantize_row(const Kernel& kernel, Activation activation, const UnitScale& fixed,
                  const Depth& depth, const float* x, int64_t k, int64_t row, RowBuffers& out) {
  const int count = planes(activation);
  int32_t* sums = out.sums + row * count * depth.chunks();
  if (out.bits) {
    uint32_t* const bits = out.bits + row * out.pitch;
    float lanes[kSumLanes] = {};
    const uint32_t seen = encode_bits(kernel, fixed, x, k, bits, fixed.fixed ? nullptr : lanes);
    out.scale[row] = fixed.fixed ? scale_of(fixed, seen) : unit_scale(kernel, lanes, x, k).scale;
    for (int64_t i = 0; i < depth.chunks(); ++i)  // how many count
      sums[i] = static_cast<int32_t>(
          depth.chunk(i / depth.chunks_per_group, i % depth.chunks_per_group).size);
    return;
  }
  const UnitScale unit =
      fixed.fixed ? fixed
                  : unit_scale(kernel, activation, unit_amax(kernel, activation, x, k), x, k);
  int8_t* q = out.codes + row * count * out.pitch;
  out.scale[row] = scale_of(unit, encode(kernel, activation, unit, x, k, q, q + out.pitch));
  for (int p = 0; p < count; ++p, q += out.pitch) {
    std::memset(q + k, 0, static_cast<size_t>(out.pitch - k));
    depth.sum(kernel, q, sums + p * depth.chunks());
  }
}

// As many rows as one pass quantizes at once.
void linear_pass(const float* x, int64_t m, const Weights& weights, Activation activation, float* y,
                 int threads, const UnitScale& fixed) {
  const Kernel& kernel = lowbit::kernel();
  const Depth depth(weights.format, weights.k, weights.group_size);
  // A zero point needs the sum of the activations, which bits do not have.
  const bool use_bits =
      traits(weights.format).bits == 1 && activation == Activation::binary && !weights.group_zero;
  static thread_local Scratch scratch;
  RowBuffers buffers(scratch, m, weights.k, planes(activation), depth, use_bits);
  threads = worthwhile_threads(threads, m * weights.n * weights.k);
  const int64_t row_tiles = ceil_div(m, kernel.mr / planes(activation));
  const int64_t channel_tiles = ceil_div(weights.n, kernel.nr);

  parallel(threads, [&](int thread, int team) {
    const Range mine = part(m, thread, team);
    for (int64_t r = mine.begin; r < mine.end; ++r)
      quantize_row(kernel, activation, fixed, depth, x + r * weights.k, weights.k, r, buffers);
    team_barrier(team);

    const Grid grid = make_grid(team, row_tiles, channel_tiles);
    if (thread >= grid.across * grid.down) return;
    const Range r = part(row_tiles, thread / grid.across, grid.down);
    const Range c = part(channel_tiles, thread % grid.across, grid.across);
    const int64_t tile_rows = kernel.mr / planes(activation);
    const int64_t first = std::min(m, r.begin * tile_rows);
    Rows rows;
    rows.count = std::min(m, r.end * tile_rows) - first;
    rows.planes = planes(activation);
    rows.pitch = buffers.pitch;
    if (buffers.bits)
      rows.bits = buffers.bits + first * buffers.pitch;
    else
      rows.codes = buffers.codes + first * rows.planes * buffers.pitch;
    rows.scale = buffers.scale + first;
    rows.sums = buffers.sums + first * rows.planes * depth.chunks();
    gemm(kernel, weights, depth, rows, c.begin * kernel.nr, std::min(weights.n, c.end * kernel.nr),
         y + first * weights.n, weights.n);
  });
}

}  // namespace

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
