// Convolutions of channels first, to channels first: their weights are the rows of a GEMM, and
// pixels its panels, so that neither codes nor outputs are transposed. 1x1 convolutions, and first
// layers, where K is (channel, row, taps of it by four).
#pragma once

#include "gemm.h"
#include "images.h"
#include "kernel.h"
#include "lowbit.h"
#include "scratch.h"

namespace lowbit {

class ChannelRows {
 public:
  static bool fits(const Kernel& kernel, const Conv2dGeometry& geometry, const Weights& weights,
                   const Depth& depth, Activation activation);

  // What `images` are to be.
  static Images::Layout layout(const Conv2dGeometry& geometry) {
    return geometry.kernel_w == 1 ? Images::Layout::panels : Images::Layout::channels;
  }

  ChannelRows(const Kernel& kernel, const Conv2dGeometry& geometry, const Weights& weights,
              const Images& images, Scratch& scratch);

  // This thread's part of the rows. A barrier must follow.
  void make(int thread, int team) const;

  // `count` pixels from panel `first` on, to y [channel][plane]; `far`: see Rows.
  void run(int64_t image, int64_t first, int64_t count, float* y, ptrdiff_t plane, bool far,
           Scratch& scratch) const;

 private:
  void set_row(const int8_t* values, int8_t* row) const;
  void make_windows(int64_t image, int64_t first, int64_t count, uint8_t* out) const;

  const Kernel& kernel_;
  const Conv2dGeometry& geometry_;
  const Weights& weights_;
  const Images& images_;
  const bool first_layer_;
  const int64_t taps_;  // of a row of the kernel, with padding
  const int64_t k_;
  const Depth depth_;
  const int64_t pitch_;
  int8_t* rows_;       // [channel][pitch]: values
  int32_t* sums_;      // [channel]
  float* bias_;        // [channel][16]
  ptrdiff_t* places_;  // [step], of a first layer: from a receptive field to its bytes
};

}  // namespace lowbit
