#include "depthwise.h"

#include <algorithm>
#include <cstring>

namespace lowbit {
namespace {

constexpr int kTilePixels = 8;  // that share one call of the microkernel
constexpr int kMaxPlanes = 2;

class Depthwise {
 public:
  Depthwise(const Kernel& kernel, const Conv2dGeometry& geometry, const Weights& weights,
            const Depth& depth, const Images& images, Scratch& scratch)
      : kernel_(kernel),
        geometry_(geometry),
        weights_(weights),
        depth_(depth),
        images_(images),
        traits_(traits(weights.format)),
        taps_(depth.steps * traits_.depth()) {
    const int64_t tile = int64_t{kTilePixels} * kernel.nr, rows = kTilePixels * kMaxPlanes;
    const int64_t scales = depth.groups * kernel.nr;
    scratch.reserve(2 * Scratch::bytes<int32_t>(tile * kMaxPlanes) +
                    2 * Scratch::bytes<float>(tile) + Scratch::bytes<double>(tile) +
                    2 * Scratch::bytes<float>(scales) + Scratch::bytes<int32_t>(rows) +
                    Scratch::bytes<float>(kTilePixels) +
                    Scratch::bytes<const int8_t*>(rows * taps_));
    acc_ = scratch.take<int32_t>(tile * kMaxPlanes);
    sums_ = scratch.take<int32_t>(tile * kMaxPlanes);
    value_ = scratch.take<float>(tile);
    total_ = scratch.take<float>(tile);
    wide_ = scratch.take<double>(tile);
    group_scale_ = scratch.take<float>(scales);
    group_zero_ = scratch.take<float>(scales);
    no_offset_ = scratch.take<int32_t>(rows);
    row_scale_ = scratch.take<float>(kTilePixels);
    pointers_ = scratch.take<const int8_t*>(rows * taps_);
    std::fill_n(no_offset_, rows, 0);
  }

  void run(int64_t image, int64_t first, int64_t count, float* y) {
    const Conv2dGeometry& g = geometry_;
    std::fill_n(row_scale_, kTilePixels, images_.scale(image));
    for (int64_t at = first; at < first + count; at += kTilePixels) {
      const int pixels = static_cast<int>(std::min<int64_t>(kTilePixels, first + count - at));
      point_taps(image, at, pixels);
      for (int64_t c = 0; c < g.out_channels; c += kernel_.nr) {
        const int cols = static_cast<int>(std::min<int64_t>(kernel_.nr, g.out_channels - c));
        const float* f = channels(c, cols, pixels);
        kernel_.finish(pixels, cols, f, row_scale_, weights_.scale + c,
                       weights_.bias ? weights_.bias + c : nullptr,
                       y + (at - first) * g.out_channels + c, g.out_channels);
      }
    }
  }

 private:
  // Where the taps of each row (pixel, plane) lie; outside the image they are zeros.
  void point_taps(int64_t image, int64_t first, int pixels) {
    const Conv2dGeometry& g = geometry_;
    const int8_t** tap = pointers_;
    for (int i = 0; i < pixels; ++i) {
      const int64_t top = (first + i) / g.out_width * g.stride_h - g.pad_top;
      const int64_t left = (first + i) % g.out_width * g.stride_w - g.pad_left;
      for (int plane = 0; plane < images_.planes(); ++plane) {
        const int8_t** end = tap + taps_;
        for (int64_t ky = 0; ky < g.kernel_h; ++ky)
          for (int64_t kx = 0; kx < g.kernel_w; ++kx)
            *tap++ = images_.pixel(image, plane, top + ky * g.dilation_h, left + kx * g.dilation_w);
        std::fill(tap, end, images_.zeros());
        tap = end;
      }
    }
  }

  const float* channels(int64_t c, int cols, int pixels) {
    const int panels = (cols + kPanel - 1) / kPanel;
    if (weights_.group_scale) {
      kernel_.expand_groups(weights_.group_scale + c * depth_.groups, cols, depth_.groups,
                            group_scale_);
      std::memset(total_, 0, sizeof(float) * static_cast<size_t>(pixels * kernel_.nr));
    }
    if (weights_.group_zero)
      kernel_.expand_groups(weights_.group_zero + c * depth_.groups, cols, depth_.groups,
                            group_zero_);
    for (int64_t group = 0; group < depth_.groups; ++group) {
      const Depth::Chunk chunk = depth_.chunk(group, 0);
      kernel_.depthwise[traits_.width_index()](
          pixels * images_.planes(), pointers_ + chunk.k, taps_, c,
          weights_.packed + (c / kPanel * depth_.steps + chunk.step) * kVectorBytes,
          depth_.steps * kVectorBytes, panels, chunk.steps, traits_.shift(), traits_.add, acc_,
          sums_);
      to_float(pixels, acc_);
      if (!weights_.group_scale) return value_;
      kernel_.madd(pixels, group_scale_ + group * kernel_.nr, value_, total_);
      if (!weights_.group_zero) continue;
      to_float(pixels, sums_);
      kernel_.madd(pixels, group_zero_ + group * kernel_.nr, value_, total_);
    }
    return total_;
  }

  // value_ = exact integers of both planes, rounded to float once.
  void to_float(int pixels, const int32_t* v) {
    if (images_.planes() == 1) return kernel_.to_float(pixels, v, 0, no_offset_, value_);
    std::memset(wide_, 0, sizeof(double) * static_cast<size_t>(pixels * kernel_.nr));
    kernel_.widen(pixels, images_.planes(), v, 0, no_offset_, wide_);
    kernel_.narrow(pixels, wide_, value_);
  }

  const Kernel& kernel_;
  const Conv2dGeometry& geometry_;
  const Weights& weights_;
  const Depth& depth_;
  const Images& images_;
  const FormatTraits& traits_;
  const int64_t taps_;  // of a row, those that only fill the last step included
  int32_t *acc_, *sums_, *no_offset_;
  float *value_, *total_, *group_scale_, *group_zero_, *row_scale_;
  double* wide_;
  const int8_t** pointers_;
};

}  // namespace

void depthwise(const Kernel& kernel, const Conv2dGeometry& geometry, const Weights& weights,
               const Depth& depth, const Images& images, int64_t image, int64_t first,
               int64_t count, float* y) {
  static thread_local Scratch scratch;
  Depthwise(kernel, geometry, weights, depth, images, scratch).run(image, first, count, y);
}

}  // namespace lowbit
