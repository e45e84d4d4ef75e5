#include "im2col.h"

#include <algorithm>
#include <cstring>

namespace lowbit {
namespace {

// Whether the pixels of the image, one after the other, are the rows.
bool is_pointwise(const Conv2dGeometry& g, const Images& images) {
  return g.kernel_h == 1 && g.kernel_w == 1 && g.stride_h == 1 && g.stride_w == 1 &&
         g.pad_top == 0 && g.pad_left == 0 && g.out_height == g.height && g.out_width == g.width &&
         images.row_pixels() == g.width;
}

}  // namespace

bool Columns::wants_sums(const Conv2dGeometry& g, const Weights& weights, const Depth& depth) {
  // Merged taps have few channels: their rows are summed faster than their pixels.
  const int64_t width = g.channels / g.groups;
  return !g.depthwise() && depth.chunks() == 1 && width >= traits(weights.format).depth();
}

bool Columns::by_lines(const Kernel& kernel, const Conv2dGeometry& g, const Weights& weights,
                       const Depth& depth, const Images& images) {
  // Tiles end with a row of outputs: where too much of the last ones is empty, copying is faster.
  constexpr int64_t kEmpty = 8;
  const int64_t width = g.out_width, whole = round_up(width, kernel.mr);
  const int64_t channels = g.out_channels / g.groups;
  return kernel.segments && channels > kernel.tall_nr && channels % kernel.tall_nr == 0 &&
         !images.use_bits() && images.planes() == 1 && !weights.group_scale &&
         wants_sums(g, weights, depth) && !is_pointwise(g, images) &&
         (whole - width) * kEmpty <= width;
}

Columns::Columns(const Kernel& kernel, const Conv2dGeometry& g, const Weights& weights,
                 const Depth& depth, const Images& images, int64_t block, Scratch& scratch,
                 bool want_sums, bool lines)
    : kernel_(kernel),
      geometry_(g),
      depth_(depth),
      images_(images),
      k_(weights.k),
      bytes_(images.use_bits() ? depth.steps * 4 : weights.k),
      width_(g.channels / g.groups),
      tap_(tap_channels(weights.format, width_)),
      summed_(g.kernel_h * g.kernel_w == 1 && depth.chunks() == 1 ? width_ : k_),
      pixel_sums_(!images.view() && wants_sums(g, weights, depth)),
      wants_sums_(want_sums),
      clears_padding_(want_sums && !pixel_sums_ && !images.use_bits() &&
                      (g.groups > 1 || images.view()) && tap_ > width_ && summed_ == k_),
      lines_(lines),
      in_place_(is_pointwise(g, images) && images.planes() == 1 && !clears_padding_) {
  const bool bits = images.use_bits();
  const int64_t taps = g.kernel_h * g.kernel_w, tap = bytes_ / std::max<int64_t>(taps, 1);
  // Neighbouring taps that are neighbours in memory as well are copied at once.
  const bool runs = g.dilation_w == 1 && tap == images.pitch();
  segment_count_ = runs ? g.kernel_h : taps;
  segment_bytes_ = runs ? g.kernel_w * tap : tap;
  // What is written behind a row must not reach another plane's, which was written before. A pitch
  // of a power of two would put all rows into the same cache sets.
  const int64_t behind = images.planes() == 2 ? kVectorBytes - 1 : 0;
  pitch_ = round_up(std::max<int64_t>(bytes_ + behind, 1), kVectorBytes);
  if (pitch_ % 1024 == 0) pitch_ += kVectorBytes;
  if (in_place_) pitch_ = images.pitch();
  const int64_t rows = block * images.planes();
  const int64_t size = in_place_ || lines_ ? 0 : rows * pitch_ + kVectorBytes;
  const bool leaves_out = want_sums && images.pads_with_zeros() && images.height() > g.height &&
                          depth.chunks() == 1 && depth.steps % g.kernel_h == 0 &&
                          k_ == depth.steps * traits(weights.format).depth();
  inside_steps_ = leaves_out ? depth.steps / g.kernel_h : 0;
  scratch.cut(piece(segments_, taps), piece(codes_, size),
              piece(mask_, bits && images.padded() ? size : 0), piece(sums_, rows * depth.chunks()),
              piece(scale_, block), piece(inside_, leaves_out ? block : 0));
  for (int64_t t = 0; t < taps; ++t) {
    const int64_t ky = runs ? t : t / g.kernel_w, kx = runs ? 0 : t % g.kernel_w;
    segments_[t] = (ky * g.dilation_h * images.row_pixels() + kx * g.dilation_w) * images.pitch();
  }
}

Rows Columns::fill(int64_t image, int64_t first, int64_t count, int64_t group) {
  const Conv2dGeometry& g = geometry_;
  const int planes = images_.planes();
  const bool bits = images_.use_bits();
  std::fill_n(scale_, count, images_.scale(image));
  if (pixel_sums_) std::memset(sums_, 0, static_cast<size_t>(count * planes) * sizeof(*sums_));
  for (int64_t i = 0; i < count;) {
    const int64_t y = (first + i) / g.out_width, x = (first + i) % g.out_width;
    const Run run{i, std::min(count - i, g.out_width - x), y * g.stride_h, x * g.stride_w};
    if (!in_place_ && !lines_) {
      for (int p = 0; p < planes; ++p)
        gather(run, images_.pixel(image, p, run.y, run.x), group, codes_ + p * pitch_, planes);
      if (mask_) gather(run, images_.mask(run.y, run.x), group, mask_, 1);
    }
    if (pixel_sums_) add_sums(run, image, group);
    if (inside_steps_) std::fill_n(inside_ + i, run.count, steps_inside(run.y));
    i += run.count;
  }

  const int8_t* const codes =
      in_place_ ? images_.pixel(image, 0, 0, 0) + first * pitch_ + group * images_.group_bytes()
                : codes_;
  Rows rows;
  rows.count = count;
  rows.planes = planes;
  rows.scale = scale_;
  rows.sums = sums_;
  rows.pitch = bits ? pitch_ / 4 : pitch_;
  if (bits) {
    rows.bits = reinterpret_cast<const uint32_t*>(codes);
    rows.mask = reinterpret_cast<const uint32_t*>(mask_);
  } else {
    rows.codes = codes;
  }
  if (lines_) {
    rows.codes = images_.pixel(image, 0, first / g.out_width * g.stride_h, 0) +
                 group * images_.group_bytes();
    rows.pitch = g.stride_w * images_.pitch();
    rows.line = g.out_width;
    rows.line_pitch = g.stride_h * images_.row_pixels() * images_.pitch();
    rows.segments = segments_;
    rows.segment_steps = depth_.steps / segment_count_;
  }
  rows.steps = inside_;
  if (clears_padding_) clear_padding(count * planes);
  if (!pixel_sums_ && wants_sums_) sum_rows(rows);
  return rows;
}

// The steps of those rows of the kernel that lie inside the image, of a receptive field that begins
// in row y of the padded one; all steps where none does.
Range Columns::steps_inside(int64_t y) const {
  const Conv2dGeometry& g = geometry_;
  const int64_t above = g.pad_top - y, end = above + g.height;
  const int64_t from = above > 0 ? ceil_div(above, g.dilation_h) : 0;
  const int64_t to = end > 0 ? std::min(ceil_div(end, g.dilation_h), g.kernel_h) : 0;
  if (from >= to) return {0, depth_.steps};
  return {from * inside_steps_, to * inside_steps_};
}

// Rows `every` apart.
void Columns::gather(const Run& run, const int8_t* from, int64_t group, int8_t* to, int every) {
  kernel_.gather(from + group * images_.group_bytes(), geometry_.stride_w * images_.pitch(),
                 run.count, segments_, segment_count_, segment_bytes_,
                 to + run.row * every * pitch_, every * pitch_);
}

// A row's sum is that of its taps' pixels.
void Columns::add_sums(const Run& run, int64_t image, int64_t group) {
  const Conv2dGeometry& g = geometry_;
  const int64_t stride = g.stride_w * g.groups;
  const int planes = images_.planes();
  for (int p = 0; p < planes; ++p) {
    int32_t* const to = sums_ + run.row * planes + p;
    for (int64_t ky = 0; ky < g.kernel_h; ++ky)
      for (int64_t kx = 0; kx < g.kernel_w; ++kx) {
        const int32_t* const from =
            images_.sums(image, p, run.y + ky * g.dilation_h, run.x + kx * g.dilation_w) + group;
        if (planes == 1 && stride == 1)
          for (int64_t i = 0; i < run.count; ++i) to[i] += from[i];
        else
          for (int64_t i = 0; i < run.count; ++i) to[i * planes] += from[i * stride];
      }
  }
}

void Columns::sum_rows(const Rows& rows) {
  const int64_t count = rows.count * rows.planes;
  if (rows.bits) {
    for (int64_t i = 0; i < count; ++i)
      count_bits(rows.mask ? rows.mask + i * rows.pitch : nullptr, sums_ + i * depth_.chunks());
  } else if (depth_.chunks() == 1) {
    kernel_.sum_rows(rows.codes, rows.pitch, count, summed_, sums_);
  } else {
    for (int64_t i = 0; i < count; ++i)
      depth_.sum(kernel_, rows.codes + i * rows.pitch, sums_ + i * depth_.chunks());
  }
}

// How many k of each chunk count: channels of taps inside the image.
void Columns::count_bits(const uint32_t* mask, int32_t* sums) const {
  const int64_t words = ceil_div(width_, 32);
  for (int64_t group = 0; group < depth_.groups; ++group)
    for (int64_t i = 0; i < depth_.chunks_per_group; ++i) {
      const Depth::Chunk chunk = depth_.chunk(group, i);
      int64_t count = 0;
      for (int64_t w = chunk.step; w < chunk.step + chunk.steps; ++w)
        if (!mask || mask[w]) count += std::min<int64_t>(32, width_ - w % words * 32);
      *sums++ = static_cast<int32_t>(count);
    }
}

// What pads a tap is zero where a part of a row is summed: here the next group's channels.
void Columns::clear_padding(int64_t rows) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t at = 0; at < k_; at += tap_)
      std::memset(codes_ + r * pitch_ + at + width_, 0, static_cast<size_t>(tap_ - width_));
}

}  // namespace lowbit
