// Images of codes: what a convolution reads instead of the float images. They are larger than
// these by the convolution's padding, so that every tap of every output is in memory.
#pragma once

#include <atomic>

#include "activations.h"
#include "gemm.h"
#include "kernel.h"
#include "lowbit.h"
#include "scratch.h"

namespace lowbit {

// Codes are [image][plane][row][column][pitch] bytes; as bits (1 where x < 0) a pixel is [group]
// [words] dwords. What pads an image means 0; what pads a pixel has code 0.
class Images {
 public:
  // `fixed`: see fixed_scale(). `tap`: bytes that one tap reads of a pixel (ignored for bits).
  // `want_sums`: of each pixel.
  Images(const Kernel& kernel, const Conv2dGeometry& geometry, Activation activation,
         const UnitScale& fixed, bool use_bits, int64_t tap, bool want_sums, Scratch& scratch);

  // Of NCHW (int8): scales alone; codes plus 128 as 8-bit weights, panels of 16 pixels (no
  // padding); codes as they lie, pixel(image, channel, y, x).
  enum class Layout { pixels, none, panels, channels };
  Images(const Kernel& kernel, const Conv2dGeometry& geometry, const UnitScale& fixed,
         Layout layout, Scratch& scratch);

  // A view of one image of codes: what pads it is in memory, and `codes` is the first of `rows`
  // rows of `row_pixels` pixels that the convolution can read. Scale 1, no sums; what is behind the
  // channels of a pixel is any code.
  Images(const Kernel& kernel, const Conv2dGeometry& geometry, const int8_t* codes, int64_t rows,
         int64_t row_pixels, int64_t pitch);

  // Called by every thread of a team; ends with a barrier.
  void quantize(const float* x, int thread, int team);

  // The pixel at (y, x) of the padded image; kBehind bytes more than the image has can be read.
  static constexpr int64_t kBehind = 80;
  const int8_t* pixel(int64_t image, int plane, int64_t y, int64_t x) const {
    return codes_ + (image * planes_ + plane) * plane_bytes_ + at(y, x) * pitch_;
  }
  // The panels from the index-th on, `panel_bytes` apart; pixels behind the last one are any code.
  const uint8_t* panels(int64_t image, int64_t index) const {
    return reinterpret_cast<const uint8_t*>(codes_) + image * plane_bytes_ + index * panel_bytes_;
  }
  // The same of a mask of bits: set inside the image. One for all images.
  const int8_t* mask(int64_t y, int64_t x) const { return mask_ + at(y, x) * pitch_; }
  // [group]: the sum of a pixel's codes; as bits, how many there are.
  const int32_t* sums(int64_t image, int plane, int64_t y, int64_t x) const {
    return sums_ + ((image * planes_ + plane) * height_ * width_ + at(y, x)) * geometry_.groups;
  }

  bool use_bits() const { return use_bits_; }
  bool pads_with_zeros() const { return !view_ && fixed_.zero == 0; }
  bool padded() const { return height_ > geometry_.height || width_ > geometry_.width; }
  int planes() const { return planes_; }
  int64_t pitch() const { return pitch_; }    // bytes from a pixel to the next one
  int64_t height() const { return height_; }  // with padding, as the width
  int64_t width() const { return width_; }
  int64_t row_pixels() const { return row_pixels_; }  // from a row to the next
  bool view() const { return view_; }
  int64_t group_bytes() const { return group_bytes_; }  // from a pixel's group to the next one
  float scale(int64_t image) const {
    return fixed_.fixed ? scale_of(fixed_, seen_[image]) : scale_[image];
  }

  UnitScale unit(int64_t image) const;  // that its codes are made with

 private:
  int64_t at(int64_t y, int64_t x) const { return y * row_pixels_ + x; }
  int8_t* codes(int64_t image, int plane, int64_t y, int64_t x) {
    return const_cast<int8_t*>(pixel(image, plane, y, x));
  }
  int32_t* sums_of(int64_t image, int plane, int64_t y, int64_t x) {
    return const_cast<int32_t*>(sums(image, plane, y, x));
  }
  void see(int64_t image, uint32_t largest);
  void scale_image(const float* x, int64_t image);
  void mask_row(int64_t y);
  void quantize_binary(const float* x, int64_t image, int thread, int team);
  template <class Call>
  void each_run(const float* x, int64_t begin, int64_t end, Call call) const;
  void encode_rows(const float* x, int64_t image, int64_t begin, int64_t end, float* lanes);
  void encode_padding(int64_t image, int64_t y, int64_t begin, int64_t end);
  bool sums_with_bits() const;
  void encode_run(const float* x, int64_t image, int64_t y, int64_t first, int64_t count,
                  float* lanes);
  void encode_planes(const float* x, int64_t image, int64_t begin, int64_t end);
  void encode_panels(const float* x, int64_t image, int64_t begin, int64_t end);
  void encode_channels(const float* x, int64_t image, int64_t begin, int64_t end);
  void sum_row(int64_t image, int64_t y);

  const Kernel& kernel_;
  const Conv2dGeometry& geometry_;
  const Activation activation_;
  const UnitScale fixed_;
  const Layout layout_ = Layout::pixels;
  const bool use_bits_, view_;
  const int planes_;
  const int64_t height_, width_, row_pixels_;  // with padding
  const int64_t elements_;
  int64_t group_bytes_, pitch_, plane_bytes_;
  int64_t panel_bytes_ = 0;  // of panels, of which there are `height_`
  int8_t *codes_, *mask_ = nullptr;
  int32_t* sums_ = nullptr;
  std::atomic<uint32_t>* seen_ = nullptr;  // the largest |x| of an image, as its bits
  float *scale_, *inverse_ = nullptr;
  float one_ = 1.0f;
};

}  // namespace lowbit
