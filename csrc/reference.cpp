#include "reference.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <vector>

namespace lowbit::reference {
namespace {

struct Quantized {
  float scale;
  std::vector<int> codes;
};

// A code for n values at a scale that is given.
Quantized quantize(const float* x, int64_t n, Activation activation,
                   const StaticActivation& fixed) {
  Quantized q{fixed.scale, std::vector<int>(static_cast<size_t>(n), 0)};
  const float inverse = 1.0f / fixed.scale;
  const int largest = activation == Activation::int16 ? 32639 : 127;
  const int lowest = activation == Activation::int16 ? -largest : -128;
  for (int64_t i = 0; i < n; ++i) {
    int& code = q.codes[static_cast<size_t>(i)];
    const float v = x[i] * inverse;
    if (!std::isfinite(x[i]))
      q.scale = std::numeric_limits<float>::quiet_NaN();
    else if (activation == Activation::binary)
      code = x[i] >= 0.0f ? 1 : -1;
    else if (std::fabs(v) > 100000.0f)
      code = v > 0.0f ? largest : lowest;
    else
      code = std::clamp(static_cast<int>(std::nearbyint(v)) + fixed.zero, lowest, largest);
  }
  return q;
}

// One scale for n values: their own, unless it is given.
Quantized quantize(const float* x, int64_t n, Activation activation,
                   const StaticActivation* fixed) {
  if (fixed) return quantize(x, n, activation, *fixed);
  Quantized q{0.0f, std::vector<int>(static_cast<size_t>(n), 0)};
  float amax = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    if (!std::isfinite(x[i])) {
      q.scale = std::numeric_limits<float>::quiet_NaN();
      return q;
    }
    amax = std::max(amax, std::fabs(x[i]));
  }
  if (activation == Activation::binary) {
    float lane[16] = {};
    for (int64_t i = 0; i < n; ++i) {
      lane[i % 16] += std::fabs(x[i]);
      q.codes[static_cast<size_t>(i)] = x[i] >= 0.0f ? 1 : -1;
    }
    for (int width = 8; width > 0; width /= 2)
      for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
    if (n > 0) q.scale = lane[0] / static_cast<float>(n);
    return q;
  }
  const float scale = amax / (activation == Activation::int16 ? 32639.0f : 127.0f);
  if (scale < FLT_MIN) return q;
  q.scale = scale;
  const float inverse = 1.0f / scale;
  for (int64_t i = 0; i < n; ++i)
    q.codes[static_cast<size_t>(i)] = static_cast<int>(std::nearbyint(x[i] * inverse));
  return q;
}

float from_half(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  const float magnitude = exponent == 31 ? (fraction ? std::numeric_limits<float>::quiet_NaN()
                                                     : std::numeric_limits<float>::infinity())
                          : exponent == 0
                              ? std::ldexp(static_cast<float>(fraction), -24)
                              : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return h & 0x8000 ? -magnitude : magnitude;
}

// Value of the weight's code, as an integer. `n` counts from the first channel of `packed`.
int weight(const FormatTraits& f, const uint8_t* packed, int64_t steps, int64_t n, int64_t k) {
  const int64_t in = k % f.depth();
  const uint8_t byte =
      packed[((n / kPanel) * steps + k / f.depth()) * kVectorBytes + (n % kPanel) * 4 + in % 4];
  const int code = byte >> (in / 4 * f.bits) & ((1 << f.bits) - 1);
  return f.mul * code + f.add;
}

float epilogue(Epilogue kind, float y) {
  if (kind == Epilogue::none || std::isnan(y)) return y;
  if (kind == Epilogue::hardswish) return y * std::min(std::max(y + 3.0f, 0.0f), 6.0f) / 6.0f;
  if (y < 0.0f) return 0.0f;
  return kind == Epilogue::relu6 && y > 6.0f ? 6.0f : y;
}

// One output: channel n of the weights (`at` in their panels) times the codes a(k). K is made up of
// taps of `tap` k, of which the first `used` are weights.
template <class Codes>
float output(const Weights& w, int64_t at, int64_t n, float scale, int64_t tap, int64_t used,
             const StaticActivation* fixed, Codes a) {
  const FormatTraits& f = traits(w.format);
  const int64_t steps = (w.k + f.depth() - 1) / f.depth();
  const int64_t group = w.group_size ? w.group_size : std::max<int64_t>(w.k, 1);
  const int64_t groups = std::max<int64_t>((w.k + group - 1) / group, 1);
  float total = 0.0f;
  double weights = 0.0;  // without the channel's scale
  for (int64_t g = 0; g < groups; ++g) {
    int64_t sum = 0, activations = 0, values = 0, count = 0;
    for (int64_t k = g * group; k < std::min(w.k, (g + 1) * group); ++k) {
      sum += int64_t{weight(f, w.packed, steps, at, k)} * a(k);
      activations += a(k);
      if (k % tap < used) values += weight(f, w.packed, steps, at, k), ++count;
    }
    double part = static_cast<double>(values);
    const int64_t in_groups = (at / kPanel * groups + g) * kPanel + at % kPanel;
    if (w.group_scale) part *= double{from_half(w.group_scale[in_groups])};
    if (w.group_zero)
      part += double{from_half(w.group_zero[in_groups])} * static_cast<double>(count);
    weights += part;
    if (!w.group_scale) {
      total = static_cast<float>(sum);
      continue;
    }
    total = std::fma(from_half(w.group_scale[in_groups]), static_cast<float>(sum), total);
    if (w.group_zero)
      total = std::fma(from_half(w.group_zero[in_groups]), static_cast<float>(activations), total);
  }
  float bias = w.bias ? w.bias[n] : 0.0f;
  if (fixed && fixed->zero) {
    const float each = fixed->scale * w.scale[n];
    bias = static_cast<float>(double{bias} - double{each} * (double(fixed->zero) * weights));
  }
  return epilogue(w.epilogue, std::fma(total, scale * w.scale[n], bias));
}

}  // namespace

void linear(const float* x, int64_t m, const Weights& w, Activation activation, float* y,
            const StaticActivation* fixed) {
  for (int64_t r = 0; r < m; ++r) {
    const Quantized q = quantize(x + r * w.k, w.k, activation, fixed);
    for (int64_t n = 0; n < w.n; ++n)
      y[r * w.n + n] = output(w, n, n, q.scale, w.k, w.k, fixed,
                              [&](int64_t k) { return q.codes[static_cast<size_t>(k)]; });
  }
}

void conv2d(const float* x, const Conv2dGeometry& g, const Weights& w, Activation activation,
            float* y, const StaticActivation* fixed) {
  const int64_t in = g.channels / g.groups, out = g.out_channels / g.groups;
  const int64_t tap = tap_channels(w.format, in);
  const bool together = kPanel % out == 0 && out < kPanel;  // groups share panels
  const int64_t size = g.height * g.width * g.channels;
  std::vector<float> nhwc(static_cast<size_t>(size));
  const int64_t pixels = g.out_height * g.out_width;
  for (int64_t image = 0; image < g.batch; ++image) {
    for (int64_t i = 0; i < size; ++i) {
      const int64_t pixel = i / g.channels, c = i % g.channels;
      nhwc[static_cast<size_t>(i)] =
          x[image * size + (g.x_channels_last ? i : c * g.height * g.width + pixel)];
    }
    const Quantized q = quantize(nhwc.data(), size, activation, fixed);
    for (int64_t oy = 0; oy < g.out_height; ++oy)
      for (int64_t ox = 0; ox < g.out_width; ++ox)
        for (int64_t n = 0; n < g.out_channels; ++n) {
          const int64_t group = n / out;
          const auto code = [&](int64_t k) {
            const int64_t c = k % tap, kx = k / tap % g.kernel_w, ky = k / tap / g.kernel_w;
            const int64_t iy = oy * g.stride_h - g.pad_top + ky * g.dilation_h;
            const int64_t ix = ox * g.stride_w - g.pad_left + kx * g.dilation_w;
            if (c >= in || iy < 0 || iy >= g.height || ix < 0 || ix >= g.width)
              return fixed && c < in ? fixed->zero : 0;
            return q.codes[static_cast<size_t>((iy * g.width + ix) * g.channels + group * in + c)];
          };
          const int64_t pixel = oy * g.out_width + ox;
          const int64_t at = g.y_channels_last ? pixel * g.out_channels + n : n * pixels + pixel;
          y[image * pixels * g.out_channels + at] =
              output(w, together ? n : group * packed_panels(out) * kPanel + n % out, n, q.scale,
                     tap, in, fixed, code);
        }
  }
}

}  // namespace lowbit::reference
