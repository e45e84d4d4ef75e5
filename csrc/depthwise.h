// Depthwise convolution: every channel has its own taps.
//
// Four rows of the image are interleaved to *columns* (16 channels x 4 rows are one 64-byte
// vector), once for an output row; a column then meets the weights of each tap of the kernel's
// width by one dot product of four rows.
#pragma once

#include "images.h"

namespace lowbit {

// The weights for that: for each group of K, tap across and quad of rows (a *place*), the codes as
// bytes, times the format's mul, and its zero point -add where a row counts. Made anew at each call
// (they are small), in `scratch`, which must outlive it.
class DepthwiseWeights {
 public:
  DepthwiseWeights(const Conv2dGeometry& geometry, const Weights& weights, const Depth& depth,
                   Scratch& scratch);

  int quads() const { return quads_; }
  int places() const { return static_cast<int>(places_); }
  ptrdiff_t stride() const { return panels_ * kVectorBytes; }  // from a place to the next
  const uint8_t* codes(int64_t group, int64_t panel) const {
    return codes_ + (group * places_ * panels_ + panel) * kVectorBytes;
  }
  const int8_t* zeros(int64_t group) const { return zeros_ + group * places_ * 4; }

 private:
  int quads_;
  int64_t places_, panels_;
  uint8_t* codes_;
  int8_t* zeros_;
};

// Output rows [begin, end) of an image, all channels, to y [rows][out_width][out_channels].
void depthwise(const Kernel& kernel, const Conv2dGeometry& geometry, const Weights& weights,
               const Depth& depth, const DepthwiseWeights& expanded, const Images& images,
               int64_t image, int64_t begin, int64_t end, float* y);

}  // namespace lowbit
