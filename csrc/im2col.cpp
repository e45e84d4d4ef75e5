#include "im2col.h"

#include <algorithm>
#include <cstring>

namespace lowbit {
namespace {

bool is_pointwise(const Conv2dGeometry& g) {
  return g.kernel_h == 1 && g.kernel_w == 1 && g.stride_h == 1 && g.stride_w == 1 &&
         g.pad_top == 0 && g.pad_left == 0 && g.out_height == g.height && g.out_width == g.width &&
         g.groups == 1;
}

}  // namespace

Columns::Columns(const Kernel& kernel, const Conv2dGeometry& geometry, const Weights& weights,
                 const Depth& depth, const Images& images, int64_t block, Scratch& scratch)
    : kernel_(kernel),
      geometry_(geometry),
      depth_(depth),
      images_(images),
      k_(weights.k),
      width_(geometry.channels / geometry.groups),
      tap_(tap_channels(weights.format, width_)),
      in_place_(is_pointwise(geometry) && !images.use_bits() && images.planes() == 1 &&
                tap_ == width_ && k_ % traits(weights.format).depth() == 0) {
  const int64_t rows = block * images.planes();
  const bool bits = images.use_bits();
  pitch_ = bits ? depth.steps : round_up(std::max<int64_t>(k_, 1), 64);
  if (in_place_) pitch_ = images.pitch();
  const int64_t codes = bits || in_place_ ? 0 : rows * pitch_;
  const int64_t words = bits ? block * pitch_ : 0;
  scratch.cut(piece(codes_, codes), piece(bits_, words), piece(mask_, words),
              piece(sums_, rows * depth.chunks()), piece(scale_, block));
}

Rows Columns::fill(int64_t image, int64_t first, int64_t count, int64_t group) {
  const Conv2dGeometry& g = geometry_;
  const int planes = images_.planes();
  std::fill_n(scale_, count, images_.scale(image));
  Rows rows;
  rows.count = count;
  rows.planes = planes;
  rows.pitch = pitch_;
  rows.scale = scale_;
  rows.sums = sums_;
  rows.bits = bits_;
  rows.mask = mask_;
  if (!bits_) rows.codes = in_place_ ? images_.pixel(image, 0, 0, 0) + first * pitch_ : codes_;

  for (int64_t i = 0; i < count; ++i) {
    const int64_t top = (first + i) / g.out_width * g.stride_h - g.pad_top;
    const int64_t left = (first + i) % g.out_width * g.stride_w - g.pad_left;
    if (bits_) {
      copy_bits(bits_ + i * pitch_, mask_ + i * pitch_, image, top, left, group);
      count_bits(mask_ + i * pitch_, sums_ + i * depth_.chunks());
      continue;
    }
    for (int p = 0; p < planes; ++p) {
      const int64_t row = i * planes + p;
      if (!in_place_) copy_codes(codes_ + row * pitch_, image, p, top, left, group);
      depth_.sum(kernel_, rows.codes + row * pitch_, sums_ + row * depth_.chunks());
    }
  }
  return rows;
}

void Columns::copy_codes(int8_t* row, int64_t image, int plane, int64_t top, int64_t left,
                         int64_t group) const {
  const Conv2dGeometry& g = geometry_;
  const int8_t* end = row + pitch_;
  // Neighbouring taps that are neighbours in memory as well are copied at once.
  const bool runs = g.dilation_w == 1 && tap_ == images_.pitch();
  const int64_t x_begin = left >= 0 ? 0 : std::min(g.kernel_w, ceil_div(-left, g.dilation_w));
  const int64_t x_end = std::clamp<int64_t>(
      ceil_div(std::max<int64_t>(g.width - left, 0), g.dilation_w), x_begin, g.kernel_w);
  for (int64_t ky = 0; ky < g.kernel_h; ++ky) {
    const int64_t y = top + ky * g.dilation_h;
    const int64_t row_bytes = g.kernel_w * tap_;
    if (y < 0 || y >= g.height || x_begin == x_end) {
      std::memset(row, 0, static_cast<size_t>(row_bytes));
    } else if (runs) {
      std::memset(row, 0, static_cast<size_t>(x_begin * tap_));
      std::memcpy(row + x_begin * tap_, images_.pixel(image, plane, y, left + x_begin),
                  static_cast<size_t>((x_end - x_begin) * tap_));
      std::memset(row + x_end * tap_, 0, static_cast<size_t>((g.kernel_w - x_end) * tap_));
    } else {
      for (int64_t kx = 0; kx < g.kernel_w; ++kx) {
        int8_t* tap = row + kx * tap_;
        const bool inside = kx >= x_begin && kx < x_end;
        const int64_t width = inside ? width_ : 0;
        if (inside)
          std::memcpy(tap,
                      images_.pixel(image, plane, y, left + kx * g.dilation_w) + group * width_,
                      static_cast<size_t>(width_));
        std::memset(tap + width, 0, static_cast<size_t>(tap_ - width));
      }
    }
    row += row_bytes;
  }
  std::memset(row, 0, static_cast<size_t>(end - row));
}

void Columns::copy_bits(uint32_t* row, uint32_t* mask, int64_t image, int64_t top, int64_t left,
                        int64_t group) const {
  const Conv2dGeometry& g = geometry_;
  const int64_t words = images_.words();
  const size_t bytes = static_cast<size_t>(words) * sizeof(uint32_t);
  for (int64_t ky = 0; ky < g.kernel_h; ++ky)
    for (int64_t kx = 0; kx < g.kernel_w; ++kx, row += words, mask += words) {
      const int64_t y = top + ky * g.dilation_h, x = left + kx * g.dilation_w;
      if (images_.inside(y, x)) {
        std::memcpy(row, images_.bits(image, y, x, group), bytes);
        std::memset(mask, 0xff,
                    bytes);  // beyond the channels both bits are 0: no agreement is counted
      } else {
        std::memset(row, 0, bytes);
        std::memset(mask, 0, bytes);
      }
    }
}

// How many k of each chunk count: channels of taps inside the image.
void Columns::count_bits(const uint32_t* mask, int32_t* sums) const {
  const int64_t words = images_.words();
  for (int64_t group = 0; group < depth_.groups; ++group)
    for (int64_t i = 0; i < depth_.chunks_per_group; ++i) {
      const Depth::Chunk chunk = depth_.chunk(group, i);
      int64_t count = 0;
      for (int64_t w = chunk.step; w < chunk.step + chunk.steps; ++w)
        if (mask[w]) count += std::min<int64_t>(32, width_ - w % words * 32);
      *sums++ = static_cast<int32_t>(count);
    }
}

}  // namespace lowbit
