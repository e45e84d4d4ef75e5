#include "depthwise.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"

namespace lowbit {

DepthwiseWeights::DepthwiseWeights(const Kernel& kernel, const Conv2dGeometry& g,
                                   const Weights& weights, const Depth& depth,
                                   Activation activation, Scratch& scratch)
    : kernel_(kernel),
      weights_(weights),
      quads_(static_cast<int>(ceil_div(g.kernel_h, 4))),
      outputs_(1),
      groups_(depth.groups),
      sets_((weights.group_zero ? 2 : 1) * depth.groups),
      panels_(packed_panels(g.out_channels)),
      stride_(depth.steps * kVectorBytes) {
  // What the next row of outputs needs is in the same quads; sums of groups or planes are combined
  // row by row.
  const bool shares = g.dilation_h == 1 && g.kernel_h + g.stride_h <= 4 * quads_;
  if (shares && !weights.group_scale && planes(activation) == 1) outputs_ = 2;
  const int64_t places = outputs_ * g.kernel_w * quads_;
  panel_bytes_ = places * kernel.column_bytes;
  scratch.cut(piece(codes_, sets_ * panels_ * panel_bytes_), piece(seed_, sets_ * panels_ * kPanel),
              piece(places_, sets_), piece(fields_, sets_ * outputs_ * weights.k),
              piece(ends_, sets_ * places));
  for (int64_t set = 0; set < sets_; ++set) {
    places_[set] = {static_cast<int>(places), fields_ + set * outputs_ * weights.k,
                    ends_ + set * places, static_cast<int>(places) / outputs_};
    set_places(g, traits(weights.format), depth, set);
  }
}

// [output][tap across][quad]; of the set's group alone. The sets behind the groups are ones.
void DepthwiseWeights::set_places(const Conv2dGeometry& g, const FormatTraits& f,
                                  const Depth& depth, int64_t set) {
  const Depth::Chunk chunk = depth.chunk(set % groups_, 0);
  TapField* field = const_cast<TapField*>(places_[set].fields);
  int* end = const_cast<int*>(places_[set].ends);
  for (int64_t r = 0; r < outputs_; ++r)
    for (int64_t kx = 0; kx < g.kernel_w; ++kx)
      for (int64_t q = 0; q < quads_; ++q) {
        for (int64_t j = 0; j < 4; ++j) {
          const int64_t ky = 4 * q + j - r * g.stride_h, k = ky * g.kernel_w + kx;
          if (ky < 0 || ky >= g.kernel_h || k < chunk.k || k >= chunk.k + chunk.size) continue;
          *field++ =
              set < groups_ ? tap_field(f, k, j) : TapField{0, 0, 0, 0, 1, static_cast<int>(j)};
        }
        *end++ = static_cast<int>(field - places_[set].fields);
      }
}

void DepthwiseWeights::make(int thread, int team) const {
  const Range mine = part(panels_, thread, team);
  for (int64_t set = 0; set < sets_; ++set)
    kernel_.spread(weights_.packed + mine.begin * stride_, stride_,
                   static_cast<int>(mine.end - mine.begin), places_[set],
                   codes_ + (set * panels_ + mine.begin) * panel_bytes_, panel_bytes_,
                   seed_ + (set * panels_ + mine.begin) * kPanel);
}

namespace {

constexpr int kTilePixels = 16;  // of sums that are not outputs
constexpr int kMaxPlanes = 2;

class Depthwise {
 public:
  Depthwise(const Kernel& kernel, const Conv2dGeometry& geometry, const Weights& weights,
            const Depth& depth, const DepthwiseWeights& expanded, const Images& images,
            const CodeImage* codes, Scratch& scratch)
      : kernel_(kernel),
        geometry_(geometry),
        weights_(weights),
        depth_(depth),
        expanded_(expanded),
        images_(images),
        whole_(geometry.out_channels / kPanel * kPanel),
        in_tile_(!weights.group_scale && images.planes() == 1),
        codes_(codes),
        in_registers_(codes && in_tile_ && codes->in_registers()) {
    const int64_t tile = in_tile_ ? 0 : int64_t{kTilePixels} * kernel.nr;
    const int64_t channels = round_up(geometry.out_channels, kPanel);
    const int64_t floats = codes && !in_registers_ ? expanded.outputs() * geometry.out_width : 0;
    scratch.cut(piece(acc_, tile * kMaxPlanes), piece(value_, tile), piece(total_, tile),
                piece(wide_, tile), piece(factor_, kernel.nr), piece(row_scale_, kTilePixels),
                piece(rows_, expanded.quads() * 4),
                piece(columns_, images.width() * expanded.quads() * kernel.column_bytes),
                piece(scale_, channels), piece(bias_, channels),
                piece(last_, expanded.outputs() * geometry.out_width * kPanel),
                piece(floats_, floats * geometry.out_channels), piece(q_, floats),
                piece(residual_, floats));
    std::fill_n(scale_, channels, 0.0f);
    std::fill_n(bias_, channels, 0.0f);
    if (weights.bias) std::copy_n(weights.bias, geometry.out_channels, bias_);

    tile_.rows = rows_;
    tile_.width = images.width();
    tile_.pitch = images.pitch();
    tile_.quads = expanded.quads();
    tile_.taps = static_cast<int>(geometry.kernel_w);
    tile_.dilation = geometry.dilation_w;
    tile_.pixels = geometry.out_width;
    tile_.stride = geometry.stride_w;
    tile_.columns = columns_;
    tile_.w_stride = expanded.panel_bytes();
    if (in_registers_) tile_.requantize = codes->to;
  }

  void run(int64_t image, int64_t begin, int64_t end, float* y) {
    const float scale = images_.scale(image);
    for (int64_t c = 0; c < geometry_.out_channels; ++c) scale_[c] = scale * weights_.scale[c];
    std::fill_n(row_scale_, kTilePixels, scale);
    const int64_t row = geometry_.out_width * geometry_.out_channels;
    for (int64_t at = begin; at < end;) {
      const int count = static_cast<int>(std::min<int64_t>(expanded_.outputs(), end - at));
      float* const out = codes_ ? floats_ : y + (at - begin) * row;
      if (in_registers_)
        run_codes(at, count);
      else if (in_tile_)
        run_tile(image, at, count, out);
      else
        run_in_parts(image, at, out);
      if (codes_ && !in_registers_) requantize(at, count);
      at += count;
    }
  }

 private:
  // The rows of the padded image that a row of outputs reads; some that are there where the kernel
  // has none.
  void set_rows(int64_t image, int plane, int64_t row, int64_t x) {
    const int64_t top = row * geometry_.stride_h, last = images_.height() - 1;
    for (int64_t i = 0; i < expanded_.quads() * 4; ++i)
      rows_[i] = images_.pixel(image, plane, std::min(top + i * geometry_.dilation_h, last), x);
  }

  void run_codes(int64_t row, int count) {
    set_rows(0, 0, row, 0);
    set_panels(0, static_cast<int>(packed_panels(geometry_.out_channels)), 0);
    tile_.outputs = count;
    tile_.q = codes_->q + row * codes_->row;
    tile_.y_pitch = codes_->pixel;
    tile_.y_row = codes_->row;
    kernel_.depthwise(tile_);
  }

  // Rows of outputs, from floats_.
  void requantize(int64_t row, int count) {
    const int64_t width = geometry_.out_width, channels = geometry_.out_channels;
    for (int64_t i = 0; i < count * width; ++i) {
      const int64_t y = row + i / width, x = i % width;
      q_[i] = codes_->q + y * codes_->row + x * codes_->pixel;
      if (codes_->residual)
        residual_[i] = codes_->residual + y * codes_->residual_row + x * codes_->residual_pixel;
    }
    kernel_.requantize(*codes_->to, count * width, channels, 0, floats_, channels,
                       codes_->residual ? residual_ : nullptr, q_);
  }

  void run_tile(int64_t image, int64_t row, int count, float* y) {
    const int64_t channels = geometry_.out_channels, width = geometry_.out_width;
    set_rows(image, 0, row, 0);
    tile_.outputs = count;
    set_panels(0, static_cast<int>(whole_ / kPanel), 0);
    tile_.y = y;
    tile_.y_pitch = channels;
    tile_.y_row = width * channels;
    kernel_.depthwise(tile_);
    if (whole_ == channels) return;
    set_panels(whole_, 1, 0);
    tile_.y = last_;
    tile_.y_pitch = kPanel;
    tile_.y_row = width * kPanel;
    kernel_.depthwise(tile_);
    for (int64_t i = 0; i < count * width; ++i)
      std::copy_n(last_ + i * kPanel, channels - whole_, y + i * channels + whole_);
  }

  // The panels from channel `c` on; their pixels, relative to the rows'.
  void set_panels(int64_t c, int panels, int64_t group, bool ones = false) {
    tile_.first = c;
    tile_.panels = panels;
    tile_.w = expanded_.codes(group, c / kPanel, ones);
    tile_.seed = expanded_.seed(group, c / kPanel, ones);
    tile_.scale = scale_ + c;
    tile_.bias = bias_ + c;
  }

  void run_in_parts(int64_t image, int64_t row, float* y) {
    const Conv2dGeometry& g = geometry_;
    tile_.outputs = 1;
    for (int64_t c = 0; c < g.out_channels; c += kernel_.nr) {
      const int cols = static_cast<int>(std::min<int64_t>(kernel_.nr, g.out_channels - c));
      for (int64_t x = 0; x < g.out_width; x += kTilePixels) {
        const int pixels = static_cast<int>(std::min<int64_t>(kTilePixels, g.out_width - x));
        tile_.pixels = pixels;
        tile_.width = (pixels - 1) * g.stride_w + (g.kernel_w - 1) * g.dilation_w + 1;
        const float* f = channels(image, row, x, c, cols);
        kernel_.finish(pixels, cols, f, row_scale_, weights_.scale + c,
                       weights_.bias ? weights_.bias + c : nullptr, y + x * g.out_channels + c,
                       g.out_channels);
      }
    }
  }

  // Of a group, for the channels from c on.
  const float* factors(const uint16_t* from, int64_t c, int cols, int64_t group) {
    const ptrdiff_t stride = depth_.groups * kPanel;
    kernel_.widen_scales(from + c / kPanel * stride + group * kPanel, stride,
                         (cols + kPanel - 1) / kPanel, factor_);
    return factor_;
  }

  // The sums of a tile as floats, groups combined.
  const float* channels(int64_t image, int64_t row, int64_t x, int64_t c, int cols) {
    const int pixels = static_cast<int>(tile_.pixels);
    if (weights_.group_scale)
      std::memset(total_, 0, sizeof(float) * static_cast<size_t>(pixels * kernel_.nr));
    for (int64_t group = 0; group < depth_.groups; ++group) {
      sum(image, row, x, c, cols, group, false);
      if (!weights_.group_scale) return value_;
      kernel_.madd(pixels, factors(weights_.group_scale, c, cols, group), value_, total_);
      if (!weights_.group_zero) continue;
      sum(image, row, x, c, cols, group, true);
      kernel_.madd(pixels, factors(weights_.group_zero, c, cols, group), value_, total_);
    }
    return total_;
  }

  // value_ = exact integers of both planes, rounded to float once.
  void sum(int64_t image, int64_t row, int64_t x, int64_t c, int cols, int64_t group, bool ones) {
    const int64_t plane_size = int64_t{kTilePixels} * kernel_.nr;
    const int pixels = static_cast<int>(tile_.pixels);
    for (int plane = 0; plane < images_.planes(); ++plane) {
      set_rows(image, plane, row, x * geometry_.stride_w);
      set_panels(c, (cols + kPanel - 1) / kPanel, group, ones);
      tile_.acc = acc_ + plane * plane_size;
      kernel_.depthwise(tile_);
    }
    if (images_.planes() == 1) return kernel_.to_float(pixels, acc_, value_);
    for (int64_t i = 0; i < int64_t{pixels} * kernel_.nr; ++i)
      wide_[i] = 256.0 * acc_[i] + acc_[plane_size + i];
    kernel_.narrow(pixels, wide_, value_);
  }

  const Kernel& kernel_;
  const Conv2dGeometry& geometry_;
  const Weights& weights_;
  const Depth& depth_;
  const DepthwiseWeights& expanded_;
  const Images& images_;
  const int64_t whole_;  // channels of whole panels
  const bool in_tile_;   // the microkernel ends with outputs
  const CodeImage* const codes_;
  const bool in_registers_;
  DepthwiseTile tile_{};
  int32_t* acc_;
  float *value_, *total_, *factor_, *row_scale_, *scale_, *bias_, *last_;
  double* wide_;
  const int8_t** rows_;
  uint8_t* columns_;
  float* floats_;
  int8_t** q_;
  const int8_t** residual_;
};

}  // namespace

void depthwise(const Kernel& kernel, const Conv2dGeometry& geometry, const Weights& weights,
               const Depth& depth, const DepthwiseWeights& expanded, const Images& images,
               int64_t image, int64_t begin, int64_t end, float* y, const CodeImage* codes) {
  static thread_local Scratch scratch;
  Depthwise(kernel, geometry, weights, depth, expanded, images, codes, scratch)
      .run(image, begin, end, y);
}

}  // namespace lowbit
