#include "depthwise.h"

#include <algorithm>
#include <cstring>

namespace lowbit {

DepthwiseWeights::DepthwiseWeights(const Conv2dGeometry& g, const Weights& weights,
                                   const Depth& depth, Scratch& scratch)
    : quads_(static_cast<int>(ceil_div(g.kernel_h, 4))),
      places_(g.kernel_w * quads_),
      panels_(packed_panels(g.out_channels)) {
  const FormatTraits& f = traits(weights.format);
  const int64_t bytes = depth.groups * places_ * panels_ * kVectorBytes,
                zeros = depth.groups * places_ * 4;
  scratch.cut(piece(codes_, bytes), piece(zeros_, zeros));
  std::memset(codes_, 0, static_cast<size_t>(bytes));
  std::memset(zeros_, 0, static_cast<size_t>(zeros));

  const uint32_t mask = (1u << f.bits) - 1;
  for (int64_t group = 0; group < depth.groups; ++group) {
    const Depth::Chunk chunk = depth.chunk(group, 0);
    for (int64_t k = chunk.k; k < chunk.k + chunk.size; ++k) {
      const int64_t ky = k / g.kernel_w, kx = k % g.kernel_w, in = k % f.depth();
      const int64_t place = group * places_ + kx * quads_ + ky / 4;
      const int from = static_cast<int>(in % 4 * 8 + in / 4 * f.bits),
                to = static_cast<int>(ky % 4 * 8);
      zeros_[place * 4 + ky % 4] = static_cast<int8_t>(-f.add);  // 128 as an unsigned byte
      for (int64_t panel = 0; panel < panels_; ++panel) {
        const uint8_t* src = weights.packed + (panel * depth.steps + k / f.depth()) * kVectorBytes;
        uint8_t* dst = codes_ + (place * panels_ + panel) * kVectorBytes;
        uint32_t v[kPanel], out[kPanel];
        std::memcpy(v, src, kVectorBytes);
        std::memcpy(out, dst, kVectorBytes);
        for (int c = 0; c < kPanel; ++c) out[c] |= (v[c] >> from & mask) << f.shift() << to;
        std::memcpy(dst, out, kVectorBytes);
      }
    }
  }
}

namespace {

constexpr int kTilePixels = 16;  // that share one call of the microkernel
constexpr int kMaxPlanes = 2;

class Depthwise {
 public:
  Depthwise(const Kernel& kernel, const Conv2dGeometry& geometry, const Weights& weights,
            const Depth& depth, const DepthwiseWeights& expanded, const Images& images,
            Scratch& scratch)
      : kernel_(kernel),
        geometry_(geometry),
        weights_(weights),
        depth_(depth),
        expanded_(expanded),
        images_(images),
        traits_(traits(weights.format)),
        column_(images.pitch() * 4),
        row_columns_(images.width()) {
    const int64_t tile = int64_t{kTilePixels} * kernel.nr, scales = depth.groups * kernel.nr;
    const int64_t quad = row_columns_ * column_,
                  columns = quad * expanded.quads() * images.planes();
    scratch.cut(piece(acc_, tile * kMaxPlanes), piece(sums_, tile * kMaxPlanes),
                piece(value_, tile), piece(total_, tile), piece(wide_, tile),
                piece(group_scale_, scales), piece(group_zero_, scales),
                piece(row_scale_, kTilePixels), piece(offsets_, expanded.places()),
                piece(columns_, columns), piece(zero_row_, images.width() * images.pitch()));
    for (int i = 0; i < expanded.places(); ++i)
      offsets_[i] =
          i / expanded.quads() * geometry.dilation_w * column_ + i % expanded.quads() * quad;
    std::memset(zero_row_, 0, static_cast<size_t>(images.width() * images.pitch()));
  }

  void run(int64_t image, int64_t begin, int64_t end, float* y) {
    const Conv2dGeometry& g = geometry_;
    std::fill_n(row_scale_, kTilePixels, images_.scale(image));
    for (int64_t row = begin; row < end; ++row, y += g.out_width * g.out_channels) {
      make_columns(image, row * g.stride_h);
      for (int64_t c = 0; c < g.out_channels; c += kernel_.nr) {
        const int cols = static_cast<int>(std::min<int64_t>(kernel_.nr, g.out_channels - c));
        expand_scales(c, cols);
        for (int64_t x = 0; x < g.out_width; x += kTilePixels) {
          const int pixels = static_cast<int>(std::min<int64_t>(kTilePixels, g.out_width - x));
          const float* f = channels(x, c, cols, pixels);
          kernel_.finish(pixels, cols, f, row_scale_, weights_.scale + c,
                         weights_.bias ? weights_.bias + c : nullptr, y + x * g.out_channels + c,
                         g.out_channels);
        }
      }
    }
  }

 private:
  // The columns of the image's rows from `top`, for each plane and quad.
  void make_columns(int64_t image, int64_t top) {
    const Conv2dGeometry& g = geometry_;
    int8_t* out = columns_;
    for (int plane = 0; plane < images_.planes(); ++plane)
      for (int q = 0; q < expanded_.quads(); ++q, out += row_columns_ * column_) {
        const int8_t* rows[4];
        for (int64_t j = 0; j < 4; ++j) {
          const int64_t ky = 4 * q + j;
          rows[j] =
              ky < g.kernel_h ? images_.pixel(image, plane, top + ky * g.dilation_h, 0) : zero_row_;
        }
        kernel_.interleave4(rows, row_columns_ * images_.pitch(), out);
      }
  }

  void expand_scales(int64_t c, int cols) {
    if (weights_.group_scale)
      kernel_.expand_groups(weights_.group_scale + c * depth_.groups, cols, depth_.groups,
                            group_scale_);
    if (weights_.group_zero)
      kernel_.expand_groups(weights_.group_zero + c * depth_.groups, cols, depth_.groups,
                            group_zero_);
  }

  // The sums of a tile as floats, groups combined.
  const float* channels(int64_t x, int64_t c, int cols, int pixels) {
    if (weights_.group_scale)
      std::memset(total_, 0, sizeof(float) * static_cast<size_t>(pixels * kernel_.nr));
    for (int64_t group = 0; group < depth_.groups; ++group) {
      integers(x, c, cols, pixels, group);
      to_float(pixels, acc_);
      if (!weights_.group_scale) return value_;
      kernel_.madd(pixels, group_scale_ + group * kernel_.nr, value_, total_);
      if (!weights_.group_zero) continue;
      unscale_sums(pixels);
      to_float(pixels, sums_);
      kernel_.madd(pixels, group_zero_ + group * kernel_.nr, value_, total_);
    }
    return total_;
  }

  void integers(int64_t x, int64_t c, int cols, int pixels, int64_t group) {
    const Conv2dGeometry& g = geometry_;
    const int64_t plane_bytes = row_columns_ * column_ * expanded_.quads();
    for (int plane = 0; plane < images_.planes(); ++plane) {
      const int64_t at = plane * int64_t{kTilePixels} * kernel_.nr;
      kernel_.depthwise[traits_.bits == 8 ? 0 : 1](
          pixels, columns_ + plane * plane_bytes + x * g.stride_w * column_ + c * 4,
          g.stride_w * column_, expanded_.places(), offsets_, expanded_.codes(group, c / kPanel),
          expanded_.stride(), expanded_.zeros(group), (cols + kPanel - 1) / kPanel, acc_ + at,
          weights_.group_zero ? sums_ + at : nullptr);
    }
  }

  // The microkernel's sums are of zero * activation: exact multiples.
  void unscale_sums(int pixels) {
    for (int plane = 0; plane < images_.planes(); ++plane) {
      int32_t* sums = sums_ + plane * int64_t{kTilePixels} * kernel_.nr;
      for (int64_t i = 0; i < int64_t{pixels} * kernel_.nr; ++i) sums[i] /= -traits_.add;
    }
  }

  // value_ = exact integers of both planes, rounded to float once.
  void to_float(int pixels, const int32_t* v) {
    if (images_.planes() == 1) return kernel_.to_float(pixels, v, value_);
    const int64_t size = int64_t{pixels} * kernel_.nr, lo = int64_t{kTilePixels} * kernel_.nr;
    for (int64_t i = 0; i < size; ++i) wide_[i] = 256.0 * v[i] + v[lo + i];
    kernel_.narrow(pixels, wide_, value_);
  }

  const Kernel& kernel_;
  const Conv2dGeometry& geometry_;
  const Weights& weights_;
  const Depth& depth_;
  const DepthwiseWeights& expanded_;
  const Images& images_;
  const FormatTraits& traits_;
  const int64_t column_;       // bytes
  const int64_t row_columns_;  // columns of an output row, margins included
  int32_t *acc_, *sums_;
  float *value_, *total_, *group_scale_, *group_zero_, *row_scale_;
  double* wide_;
  ptrdiff_t* offsets_;
  int8_t *columns_, *zero_row_;
};

}  // namespace

void depthwise(const Kernel& kernel, const Conv2dGeometry& geometry, const Weights& weights,
               const Depth& depth, const DepthwiseWeights& expanded, const Images& images,
               int64_t image, int64_t begin, int64_t end, float* y) {
  static thread_local Scratch scratch;
  Depthwise(kernel, geometry, weights, depth, expanded, images, scratch).run(image, begin, end, y);
}

}  // namespace lowbit
