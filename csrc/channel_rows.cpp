#include "channel_rows.h"

#include <algorithm>

#include "parallel.h"

namespace lowbit {

bool ChannelRows::fits(const Conv2dGeometry& g, const Weights& weights, const Depth& depth,
                       Activation activation) {
  // The last panel is partly empty: of fewer pixels, transposing costs less.
  constexpr int64_t kLeastPixels = 512;
  return g.kernel_h * g.kernel_w * g.stride_h * g.stride_w == 1 && g.groups == 1 &&
         g.out_height == g.height && g.out_width == g.width && g.pad_top + g.pad_left == 0 &&
         !g.x_channels_last && !g.y_channels_last && activation == Activation::int8 &&
         !weights.group_scale && depth.chunks() == 1 && g.height * g.width >= kLeastPixels;
}

ChannelRows::ChannelRows(const Kernel& kernel, const Conv2dGeometry& g, const Weights& weights,
                         const Images& images, Scratch& scratch)
    : kernel_(kernel),
      weights_(weights),
      images_(images),
      k_(g.channels),
      depth_(Format::int8, k_, 0),
      // A spare line lets rows that are a power of two long not share a set of the cache.
      pitch_(round_up(weights.k, kVectorBytes) + kVectorBytes) {
  const int64_t channels = round_up(weights.n, kPanel);
  scratch.cut(piece(rows_, channels * pitch_), piece(sums_, weights.n),
              piece(bias_, channels * kPanel));
}

void ChannelRows::make(int thread, int team) const {
  const int64_t steps = packed_steps(weights_.format, weights_.k);
  const Range mine = part(packed_panels(weights_.n), thread, team);
  for (int64_t p = mine.begin; p < mine.end; ++p) {
    int8_t* const rows = rows_ + p * kPanel * pitch_;
    kernel_.value_rows(weights_.packed + p * steps * kVectorBytes, steps, traits(weights_.format),
                       rows, pitch_);
    const int64_t first = p * kPanel, count = std::min<int64_t>(kPanel, weights_.n - first);
    for (int64_t r = 0; r < count; ++r) {
      int8_t* const row = rows + r * pitch_;
      std::fill(row + k_, row + round_up(k_, 4), int8_t{0});
      depth_.sum(kernel_, row, sums_ + first + r);
      if (weights_.bias)
        std::fill_n(bias_ + (first + r) * kPanel, kPanel, weights_.bias[first + r]);
    }
  }
}

void ChannelRows::run(int64_t image, int64_t first, int64_t count, float* y, ptrdiff_t plane,
                      bool far, Scratch& scratch) const {
  float* scale;
  scratch.cut(piece(scale, round_up(count, kPanel)));
  std::fill_n(scale, round_up(count, kPanel), images_.scale(image));
  Weights pixels{};
  pixels.format = Format::int8;
  pixels.n = count;
  pixels.k = k_;
  pixels.packed = images_.panels(image, first);
  pixels.scale = scale;
  pixels.epilogue = weights_.epilogue;
  Rows rows;
  rows.count = weights_.n;
  rows.codes = rows_;
  rows.pitch = pitch_;
  rows.scale = weights_.scale;
  rows.sums = sums_;
  rows.bias = weights_.bias ? bias_ : nullptr;
  rows.far = far;
  gemm(kernel_, pixels, depth_, rows, 0, count, y, plane);
}

}  // namespace lowbit
