// Depthwise convolution: every channel has its own taps.
#pragma once

#include "images.h"

namespace lowbit {

// The weights as DepthwiseTile wants them, for each group of K. Made anew at each call (they are
// small), in `scratch`, which must outlive it; each thread of a team makes a part.
class DepthwiseWeights {
 public:
  DepthwiseWeights(const Kernel& kernel, const Conv2dGeometry& geometry, const Weights& weights,
                   const Depth& depth, Activation activation, Scratch& scratch);

  // Called by every thread of a team; a barrier must follow.
  void make(int thread, int team) const;

  int quads() const { return quads_; }
  int outputs() const { return outputs_; }  // rows of outputs that share columns
  int64_t panel_bytes() const { return panel_bytes_; }
  // From `panel` on; `ones`: as if every weight were 1.
  const int8_t* codes(int64_t group, int64_t panel, bool ones = false) const {
    return codes_ + ((ones * groups_ + group) * panels_ + panel) * panel_bytes_;
  }
  const int32_t* seed(int64_t group, int64_t panel, bool ones = false) const {
    return seed_ + ((ones * groups_ + group) * panels_ + panel) * kPanel;
  }

 private:
  void set_places(const Conv2dGeometry& g, const FormatTraits& f, const Depth& depth, int64_t set);

  const Kernel& kernel_;
  const Weights& weights_;
  int quads_, outputs_;
  int64_t groups_, sets_, panels_, panel_bytes_, stride_;
  Places* places_;  // [sets]
  TapField* fields_;
  int* ends_;
  int8_t* codes_;
  int32_t* seed_;
};

// Output rows [begin, end) of an image, all channels, to y [rows][out_width][out_channels] or to
// `codes`.
void depthwise(const Kernel& kernel, const Conv2dGeometry& geometry, const Weights& weights,
               const Depth& depth, const DepthwiseWeights& expanded, const Images& images,
               int64_t image, int64_t begin, int64_t end, float* y,
               const CodeImage* codes = nullptr);

}  // namespace lowbit
