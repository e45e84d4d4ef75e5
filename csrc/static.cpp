// The bias of a layer whose activations have a zero point: what the sums of codes have too much is
// known beforehand. The sums of the weights are what a row of ones gives.
#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "gemm.h"
#include "lowbit.h"
#include "parallel.h"
#include "scratch.h"

namespace lowbit {
namespace {

// How the weights' K is made up: taps of `tap` k, of which the first `used` are weights.
struct Taps {
  int64_t tap, used;
};

// sums[c] = the sum of the values of the weights of channel c of a panel, without the channel's
// scale.
class WeightSums {
 public:
  WeightSums(const Kernel& kernel, const Weights& weights, const Depth& depth, Taps taps,
             Scratch& scratch)
      : kernel_(kernel), weights_(weights), depth_(depth) {
    const int64_t k = weights.k, padded = depth.steps * traits(weights.format).depth();
    scratch.cut(piece(ones_, padded + kVectorBytes),
                piece(sums_, int64_t{kernel.tall_mr} * kernel.nr),
                piece(tile_.room, kernel.room(padded)));
    std::memset(ones_, 0, static_cast<size_t>(padded + kVectorBytes));
    for (int64_t i = 0; i < k; ++i) ones_[i] = i % taps.tap < taps.used;
    tile_.rows = tile_.planes = tile_.panels = tile_.fetch = 1;
    tile_.tall = true;
    tile_.panel_stride = depth.steps * kVectorBytes;
    tile_.groups = tile_.offset_pitch = 1;
    tile_.sums = sums_;
  }

  void run(int64_t index, int cols, double* sums) {
    const uint8_t* const panel = weights_.packed + index * depth_.steps * kVectorBytes;
    std::fill_n(sums, cols, 0.0);
    for (int64_t g = 0; g < depth_.groups; ++g) {
      double group[kPanel] = {};  // integers below 2^53
      double count = 0;
      for (int64_t i = 0; i < depth_.chunks_per_group; ++i)
        count += add_chunk(panel, depth_.chunk(g, i), cols, group);
      const int64_t at = (index * depth_.groups + g) * kPanel;
      float factor[kPanel];
      if (weights_.group_scale) {
        kernel_.widen_scales(weights_.group_scale + at, 0, 1, factor);
        for (int c = 0; c < cols; ++c) group[c] *= double{factor[c]};
      }
      if (weights_.group_zero) {
        kernel_.widen_scales(weights_.group_zero + at, 0, 1, factor);
        for (int c = 0; c < cols; ++c) group[c] += double{factor[c]} * count;
      }
      for (int c = 0; c < cols; ++c) sums[c] += group[c];
    }
  }

 private:
  // Adds the sums of a chunk's weights, and returns how many these are.
  int64_t add_chunk(const uint8_t* panel, const Depth::Chunk& chunk, int cols, double* sums) {
    if (chunk.size == 0) return 0;
    const int8_t* const ones = ones_ + chunk.k;
    const auto count = static_cast<int32_t>(std::count(ones, ones + chunk.size, int8_t{1}));
    const int32_t offset = count * traits(weights_.format).add;
    tile_.codes = ones;
    tile_.w = panel + chunk.step * kVectorBytes;
    tile_.ahead = tile_.w + kAhead;
    tile_.steps = tile_.group_steps = chunk.steps;
    tile_.offset = &offset;
    kernel_.dot[static_cast<int>(weights_.format)](tile_);
    for (int c = 0; c < cols; ++c) sums[c] += sums_[c];
    return count;
  }

  static constexpr int64_t kAhead = 128 * kVectorBytes;

  const Kernel& kernel_;
  const Weights& weights_;
  const Depth& depth_;
  Tile tile_{};
  int8_t* ones_;
  int32_t* sums_;
};

void make_bias(const Weights& w, int64_t blocks, Taps taps, const StaticActivation& activation,
               float* out, int threads) {
  if (activation.zero == 0 || w.k == 0) {
    if (w.bias)
      std::copy_n(w.bias, w.n, out);
    else
      std::fill_n(out, w.n, 0.0f);
    return;
  }
  const Kernel& kernel = lowbit::kernel();
  const Depth depth(w.format, w.k, w.group_size);
  const int64_t rows = w.n / blocks, panels = packed_panels(rows);
  parallel(worthwhile_threads(threads, w.n * w.k), [&](int thread, int team) {
    static thread_local Scratch scratch;
    WeightSums sums(kernel, w, depth, taps, scratch);
    const Range mine = part(blocks * panels, thread, team);
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      const int64_t in_block = p % panels * kPanel, c0 = p / panels * rows + in_block;
      const int cols = static_cast<int>(std::min<int64_t>(kPanel, rows - in_block));
      double sum[kPanel];
      sums.run(p, cols, sum);
      for (int c = 0; c < cols; ++c) {
        const float scale = activation.scale * w.scale[c0 + c];
        const double bias = w.bias ? double{w.bias[c0 + c]} : 0.0;
        out[c0 + c] = static_cast<float>(bias - double{scale} * (activation.zero * sum[c]));
      }
    }
  });
}

}  // namespace

void static_bias(const Weights& weights, const StaticActivation& activation, float* out,
                 int threads) {
  const int64_t k = std::max<int64_t>(weights.k, 1);
  make_bias(weights, 1, {k, k}, activation, out, threads);
}

void static_bias(const Weights& weights, const Conv2dGeometry& g,
                 const StaticActivation& activation, float* out, int threads) {
  const int64_t used = g.channels / g.groups;
  make_bias(weights, g.blocks(), {tap_channels(weights.format, used), used}, activation, out,
            threads);
}

}  // namespace lowbit
