#include "channel_rows.h"

#include <algorithm>

#include "parallel.h"

namespace lowbit {

namespace {

// The last panel is partly empty: of fewer pixels, transposing costs less.
bool is_pointwise(const Conv2dGeometry& g) {
  constexpr int64_t kLeastPixels = 512;
  return g.kernel_h * g.kernel_w * g.stride_h * g.stride_w == 1 && g.out_height == g.height &&
         g.out_width == g.width && g.pad_top + g.pad_left == 0 &&
         g.height * g.width >= kLeastPixels;
}

bool is_first_layer(const Kernel& kernel, const Conv2dGeometry& g) {
  constexpr int64_t kMostChannels = 4, kMostTaps = 8, kMostStride = 4;
  return kernel.window_panels && g.channels <= kMostChannels && g.kernel_w > 1 &&
         g.kernel_w <= kMostTaps && g.kernel_h <= kMostTaps && g.stride_w <= kMostStride &&
         g.dilation_h == 1 && g.dilation_w == 1 && g.out_width % kPanel == 0;
}

}  // namespace

bool ChannelRows::fits(const Kernel& kernel, const Conv2dGeometry& g, const Weights& weights,
                       const Depth& depth, Activation activation) {
  return g.groups == 1 && !g.x_channels_last && !g.y_channels_last &&
         activation == Activation::int8 && !weights.group_scale && depth.chunks() == 1 &&
         (is_pointwise(g) || is_first_layer(kernel, g));
}

ChannelRows::ChannelRows(const Kernel& kernel, const Conv2dGeometry& g, const Weights& weights,
                         const Images& images, Scratch& scratch)
    : kernel_(kernel),
      geometry_(g),
      weights_(weights),
      images_(images),
      first_layer_(layout(g) == Images::Layout::channels),
      taps_(first_layer_ ? round_up(g.kernel_w, 4) : 1),
      k_(g.channels * g.kernel_h * taps_),
      depth_(Format::int8, k_, 0),
      // A spare line lets rows that are a power of two long not share a set of the cache.
      pitch_(round_up(std::max(weights.k, k_), kVectorBytes) + kVectorBytes) {
  const int64_t channels = round_up(weights.n, kPanel);
  scratch.cut(piece(rows_, channels * pitch_), piece(sums_, weights.n),
              piece(bias_, channels * kPanel), piece(places_, first_layer_ ? depth_.steps : 0));
  if (!first_layer_) return;
  const int8_t* const from = images.pixel(0, 0, 0, 0);
  for (int64_t s = 0; s < depth_.steps; ++s) {
    const int64_t at = 4 * s, row = at / taps_;
    places_[s] =
        images.pixel(0, static_cast<int>(row / g.kernel_h), row % g.kernel_h, at % taps_) - from;
  }
}

void ChannelRows::make(int thread, int team) const {
  static thread_local Scratch scratch;
  int8_t* values;
  scratch.cut(piece(values, first_layer_ ? kPanel * pitch_ : 0));
  const int64_t steps = packed_steps(weights_.format, weights_.k);
  const Range mine = part(packed_panels(weights_.n), thread, team);
  for (int64_t p = mine.begin; p < mine.end; ++p) {
    int8_t* const rows = rows_ + p * kPanel * pitch_;
    kernel_.value_rows(weights_.packed + p * steps * kVectorBytes, steps, traits(weights_.format),
                       first_layer_ ? values : rows, pitch_);
    const int64_t first = p * kPanel, count = std::min<int64_t>(kPanel, weights_.n - first);
    for (int64_t r = 0; r < count; ++r) {
      int8_t* const row = rows + r * pitch_;
      if (first_layer_)
        set_row(values + r * pitch_, row);
      else
        std::fill(row + k_, row + round_up(k_, 4), int8_t{0});
      depth_.sum(kernel_, row, sums_ + first + r);
      if (weights_.bias)
        std::fill_n(bias_ + (first + r) * kPanel, kPanel, weights_.bias[first + r]);
    }
  }
}

// Values [row][tap][channel] to [channel][row][tap], with padding.
void ChannelRows::set_row(const int8_t* values, int8_t* row) const {
  const Conv2dGeometry& g = geometry_;
  std::fill_n(row, k_, int8_t{0});
  for (int64_t c = 0; c < g.channels; ++c)
    for (int64_t y = 0; y < g.kernel_h; ++y)
      for (int64_t x = 0; x < g.kernel_w; ++x)
        row[(c * g.kernel_h + y) * taps_ + x] = values[(y * g.kernel_w + x) * g.channels + c];
}

// Panels [first, first + count), of whole rows or parts of one.
void ChannelRows::make_windows(int64_t image, int64_t first, int64_t count, uint8_t* out) const {
  const Conv2dGeometry& g = geometry_;
  const int64_t each = g.out_width / kPanel;  // of a row
  for (int64_t p = first; p < first + count;) {
    const int64_t y = p / each, x = p % each, here = std::min(each - x, first + count - p);
    kernel_.window_panels(images_.pixel(image, 0, y * g.stride_h, x * kPanel * g.stride_w), places_,
                          depth_.steps, g.stride_w, here, out);
    out += here * depth_.steps * kVectorBytes;
    p += here;
  }
}

void ChannelRows::run(int64_t image, int64_t first, int64_t count, float* y, ptrdiff_t plane,
                      bool far, Scratch& scratch) const {
  const int64_t panels = ceil_div(count, kPanel);
  float* scale;
  uint8_t* windows;
  scratch.cut(piece(scale, panels * kPanel),
              piece(windows, first_layer_ ? panels * depth_.steps * kVectorBytes : 0));
  if (first_layer_) make_windows(image, first, panels, windows);
  std::fill_n(scale, panels * kPanel, images_.scale(image));
  Weights pixels{};
  pixels.format = Format::int8;
  pixels.n = count;
  pixels.k = k_;
  pixels.packed = first_layer_ ? windows : images_.panels(image, first);
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
