#include "grouped.h"

#include <algorithm>
#include <cstring>

namespace lowbit {
namespace {

constexpr int kReadBytes = 16;
constexpr uint8_t kNone = 0x80;  // in a control: a zero

}  // namespace

bool is_fine_grouped(const Conv2dGeometry& g, const Weights& weights, Activation activation) {
  const int64_t in = g.channels / g.groups, out = g.out_channels / g.groups;
  return g.groups > 1 && !g.depthwise() && g.blocks() == 1 && (in < 4 || in % 4 == 0) &&
         kPanel / out * in <= kReadBytes && !weights.group_scale && planes(activation) == 1;
}

Grouped::Grouped(const Kernel& kernel, const Conv2dGeometry& g, const Weights& weights,
                 const Images& images, Scratch& scratch)
    : kernel_(kernel), geometry_(g), weights_(weights) {
  const int64_t taps = g.kernel_h * g.kernel_w, in = g.channels / g.groups,
                out = g.out_channels / g.groups;
  const int64_t steps = ceil_div(in, 4), panels = packed_panels(g.out_channels);
  const FormatTraits& f = traits(weights.format);
  const int64_t k = weights.k;
  TapField* fields;
  int* ends;
  ptrdiff_t* offsets;
  uint8_t* control;
  int8_t* w;
  int32_t* seed;
  const int64_t w_stride = taps * steps * kernel.column_bytes;
  scratch.cut(piece(offsets, taps), piece(control, steps * kVectorBytes),
              piece(w, panels * w_stride), piece(seed, panels * kPanel), piece(fields, taps * in),
              piece(ends, taps * steps));

  const int64_t tap_k = k / taps;
  TapField* field = fields;
  for (int64_t t = 0; t < taps; ++t) {
    offsets[t] =
        (t / g.kernel_w * g.dilation_h * images.row_pixels() + t % g.kernel_w * g.dilation_w) *
        images.pitch();
    for (int64_t c = 0; c < in; ++c) {
      *field++ = tap_field(f, t * tap_k + c, c % 4);
      ends[t * steps + c / 4] = static_cast<int>(field - fields);
    }
  }
  const int places = static_cast<int>(taps * steps);
  kernel.spread(weights.packed, packed_steps(weights.format, k) * kVectorBytes,
                static_cast<int>(panels), {places, fields, ends, places}, w, w_stride, seed);
  for (int64_t s = 0; s < steps; ++s)
    for (int64_t n = 0; n < kPanel; ++n)
      for (int64_t j = 0; j < 4; ++j) {
        const int64_t c = s * 4 + j;
        control[s * kVectorBytes + n * 4 + j] =
            c < in ? static_cast<uint8_t>(n / out * in + c) : kNone;
      }

  tile_.stride = g.stride_w * images.pitch();
  tile_.taps = offsets;
  tile_.tap_count = static_cast<int>(taps);
  tile_.steps = static_cast<int>(steps);
  tile_.panel_bytes = kPanel / out * in;
  tile_.control = control;
  tile_.w = w;
  tile_.w_stride = w_stride;
  tile_.seed = seed;
}

void Grouped::run(const Images& images, int64_t image, int64_t first, int64_t count, float* y,
                  const CodeImage* codes, Scratch& scratch) const {
  const Conv2dGeometry& g = geometry_;
  const int64_t n = g.out_channels, padded = round_up(n, kPanel), whole = n / kPanel * kPanel;
  float *scale, *bias, *last;
  scratch.cut(piece(scale, padded), piece(bias, padded), piece(last, g.out_width * kPanel));
  std::fill_n(scale, padded, 0.0f);
  std::fill_n(bias, padded, 0.0f);
  for (int64_t c = 0; c < n; ++c) scale[c] = images.scale(image) * weights_.scale[c];
  if (weights_.bias) std::copy_n(weights_.bias, n, bias);

  GroupedTile tile = tile_;
  for (int64_t i = 0; i < count;) {
    const int64_t row = (first + i) / g.out_width, x = (first + i) % g.out_width;
    tile.pixels = std::min(count - i, g.out_width - x);
    tile.from = images.pixel(image, 0, row * g.stride_h, x * g.stride_w);
    tile.panels = static_cast<int>(whole / kPanel);
    tile.scale = scale;
    tile.bias = bias;
    tile.y = y + i * n;
    tile.y_pitch = n;
    if (codes) {
      tile.panels = static_cast<int>(padded / kPanel);
      tile.requantize = codes->to;
      tile.q = codes->q + row * codes->row + x * codes->pixel;
      tile.y_pitch = codes->pixel;
    }
    kernel_.grouped(tile);
    if (whole < n && !codes) {  // the last panel, by way of a place of its own
      const int64_t panel = whole / kPanel;
      GroupedTile rest = tile;
      rest.from += panel * tile.panel_bytes;
      rest.w += panel * tile.w_stride;
      rest.seed += whole;
      rest.scale += whole;
      rest.bias += whole;
      rest.panels = 1;
      rest.y = last;
      rest.y_pitch = kPanel;
      kernel_.grouped(rest);
      for (int64_t p = 0; p < tile.pixels; ++p)
        std::copy_n(last + p * kPanel, n - whole, y + (i + p) * n + whole);
    }
    i += tile.pixels;
  }
}

Weights separate_groups(const Conv2dGeometry& g, const Weights& weights, const Depth& depth,
                        Scratch& scratch) {
  const int64_t out = g.out_channels / g.groups, values = depth.groups * kPanel;
  uint8_t* packed;
  uint16_t *scale, *zero;
  scratch.cut(piece(packed, g.groups * depth.steps * kVectorBytes),
              piece(scale, weights.group_scale ? g.groups * values : 0),
              piece(zero, weights.group_zero ? g.groups * values : 0));
  std::memset(packed, 0, static_cast<size_t>(g.groups * depth.steps * kVectorBytes));
  for (int64_t n = 0; n < g.out_channels; ++n)
    for (int64_t s = 0; s < depth.steps; ++s)
      std::memcpy(packed + (n / out * depth.steps + s) * kVectorBytes + n % out * 4,
                  weights.packed + (n / kPanel * depth.steps + s) * kVectorBytes + n % kPanel * 4,
                  4);
  const auto separate = [&](const uint16_t* from, uint16_t* to) {
    std::fill_n(to, g.groups * values, uint16_t{0});
    for (int64_t n = 0; n < g.out_channels; ++n)
      for (int64_t i = 0; i < values; i += kPanel)
        to[n / out * values + i + n % out] = from[n / kPanel * values + i + n % kPanel];
    return to;
  };
  Weights own = weights;
  own.packed = packed;
  if (weights.group_scale) own.group_scale = separate(weights.group_scale, scale);
  if (weights.group_zero) own.group_zero = separate(weights.group_zero, zero);
  return own;
}

Weights group_weights(const Weights& all, const Conv2dGeometry& g, const Depth& depth,
                      int64_t group) {
  Weights w = all;
  w.n = g.out_channels / g.groups;
  w.packed += group * packed_panels(w.n) * depth.steps * kVectorBytes;
  w.scale += group * w.n;
  if (w.bias) w.bias += group * w.n;
  const int64_t group_values = packed_panels(w.n) * depth.groups * kPanel;
  if (w.group_scale) w.group_scale += group * group_values;
  if (w.group_zero) w.group_zero += group * group_values;
  return w;
}

}  // namespace lowbit
