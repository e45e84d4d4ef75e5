// Receptive fields as rows: K over (kh, kw, channels of a group), each tap padded to
// tap_channels().
#pragma once

#include "images.h"

namespace lowbit {

class Columns {
 public:
  // Room for blocks of up to `block` output pixels, in `scratch`.
  Columns(const Kernel& kernel, const Conv2dGeometry& geometry, const Weights& weights,
          const Depth& depth, const Images& images, int64_t block, Scratch& scratch);

  // The rows of output pixels [first, first + count) of an image for one group. Valid until the
  // next call.
  Rows fill(int64_t image, int64_t first, int64_t count, int64_t group);

 private:
  void copy_codes(int8_t* row, int64_t image, int plane, int64_t top, int64_t left,
                  int64_t group) const;
  void copy_bits(uint32_t* row, uint32_t* mask, int64_t image, int64_t top, int64_t left,
                 int64_t group) const;
  void count_bits(const uint32_t* mask, int32_t* sums) const;

  const Kernel& kernel_;
  const Conv2dGeometry& geometry_;
  const Depth& depth_;
  const Images& images_;
  const int64_t k_, width_, tap_;  // width_: channels of a group, tap_: the same with padding
  const bool in_place_;            // the image's pixels are the rows: 1x1, stride 1, no padding
  int64_t pitch_;
  int8_t* codes_ = nullptr;
  uint32_t *bits_ = nullptr, *mask_ = nullptr;
  int32_t* sums_;
  float* scale_;
};

}  // namespace lowbit
