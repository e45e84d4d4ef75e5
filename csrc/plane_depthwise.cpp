#include "plane_depthwise.h"

#include <algorithm>
#include <cstring>

#include "images.h"
#include "parallel.h"

namespace lowbit {
namespace {

constexpr int64_t kMostStride = 4;

// The channels of one thread.
class Planes {
 public:
  Planes(const Kernel& kernel, const Conv2dGeometry& g, const Weights& weights,
         const Images& images, Scratch& scratch)
      : kernel_(kernel),
        geometry_(g),
        weights_(weights),
        steps_(packed_steps(weights.format, weights.k)),
        taps_(g.kernel_h == 3 ? 4 : 8),
        value_pitch_(round_up(weights.k, kVectorBytes)) {
    tile_.pitch = images.width();
    const int64_t size = images.height() * tile_.pitch + Images::kBehind;
    scratch.cut(piece(codes_, size), piece(w_, g.kernel_h * taps_),
                piece(values_, kPanel * value_pitch_));
    std::memset(codes_, 0, static_cast<size_t>(size));
    std::memset(w_, 0, static_cast<size_t>(g.kernel_h * taps_));
    tile_.height = g.height;
    tile_.width = g.width;
    tile_.codes = codes_ + g.pad_top * tile_.pitch + g.pad_left;
    tile_.from = codes_;
    tile_.rows = static_cast<int>(g.kernel_h);
    tile_.stride_h = g.stride_h;
    tile_.stride_w = g.stride_w;
    tile_.w = w_;
    tile_.outputs = g.out_height;
    tile_.pixels = g.out_width;
  }

  // x and y: of the image.
  void run_panel(int64_t panel, const UnitScale& unit, const float* x, float* y) {
    const int64_t in = geometry_.height * geometry_.width;
    const int64_t out = geometry_.out_height * geometry_.out_width;
    kernel_.value_rows(weights_.packed + panel * steps_ * kVectorBytes, steps_,
                       traits(weights_.format), values_, value_pitch_);
    tile_.inverse = unit.inverse;
    // From the end: what was searched last for the largest is still in the cache.
    for (int64_t c = std::min(weights_.n, (panel + 1) * kPanel); c-- > panel * kPanel;) {
      set_weights(values_ + (c - panel * kPanel) * value_pitch_);
      tile_.scale = unit.scale * weights_.scale[c];
      tile_.bias = weights_.bias ? weights_.bias[c] : 0.0f;
      tile_.x = x + c * in;
      tile_.y = y + c * out;
      kernel_.plane(tile_);
      kernel_.apply(weights_.epilogue, 1, out, tile_.y, out);
    }
  }

 private:
  void set_weights(const int8_t* values) {
    const int64_t taps = geometry_.kernel_w;
    int32_t sum = 0;
    for (int64_t i = 0; i < weights_.k; ++i) sum += values[i];
    for (int64_t r = 0; r < geometry_.kernel_h; ++r)
      std::copy_n(values + r * taps, taps, w_ + r * taps_);
    tile_.seed = -128 * sum;
  }

  const Kernel& kernel_;
  const Conv2dGeometry& geometry_;
  const Weights& weights_;
  const int64_t steps_, taps_, value_pitch_;
  PlaneTile tile_{};
  int8_t *codes_, *w_, *values_;
};

}  // namespace

bool is_plane_depthwise(const Kernel& kernel, const Conv2dGeometry& g, const Weights& weights,
                        Activation activation, const StaticActivation* fixed) {
  const bool small = g.kernel_h == 3 && g.kernel_w <= 4;
  const bool large = (g.kernel_h == 5 || g.kernel_h == 7) && g.kernel_w > 4 && g.kernel_w <= 8;
  return kernel.plane && (small || large) && g.depthwise() && !g.x_channels_last &&
         !g.y_channels_last && activation == Activation::int8 && !fixed && !weights.group_scale &&
         g.dilation_h == 1 && g.dilation_w == 1 && g.stride_w <= kMostStride &&
         std::min(g.width, g.out_width) >= kPanel;
}

void plane_depthwise(const Kernel& kernel, const Conv2dGeometry& g, const Weights& weights,
                     const float* x, float* y, int threads) {
  const int64_t in = g.channels * g.height * g.width;
  const int64_t out = g.out_channels * g.out_height * g.out_width;
  static thread_local Scratch scratch;
  Images images(kernel, g, UnitScale{}, Images::Layout::none, scratch);
  threads = worthwhile_threads(threads, g.batch * out * weights.k);
  parallel(threads, [&](int thread, int team) {
    static thread_local Scratch own_scratch;
    images.quantize(x, thread, team);
    Planes planes(kernel, g, weights, images, own_scratch);
    const bool own = g.batch % team == 0;
    const int64_t count = packed_panels(weights.n);
    const Range batch = own ? part(g.batch, thread, team) : Range{0, g.batch};
    const Range mine = own ? Range{0, count} : part(count, thread, team);
    for (int64_t i = batch.begin; i < batch.end; ++i)
      for (int64_t p = mine.end; p-- > mine.begin;)
        planes.run_panel(p, images.unit(i), x + i * in, y + i * out);
  });
}

}  // namespace lowbit
