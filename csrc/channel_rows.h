// 1x1 convolutions of channels first, to channels first: their weights are the rows of a GEMM, and
// pixels its panels, so that neither codes nor outputs are transposed.
#pragma once

#include "gemm.h"
#include "images.h"
#include "kernel.h"
#include "lowbit.h"
#include "scratch.h"

namespace lowbit {

class ChannelRows {
 public:
  static bool fits(const Conv2dGeometry& geometry, const Weights& weights, const Depth& depth,
                   Activation activation);

  ChannelRows(const Kernel& kernel, const Conv2dGeometry& geometry, const Weights& weights,
              const Images& images, Scratch& scratch);

  // This thread's part of the rows. A barrier must follow.
  void make(int thread, int team) const;

  // `count` pixels from panel `first` on, to y [channel][plane]; `far`: see Rows.
  void run(int64_t image, int64_t first, int64_t count, float* y, ptrdiff_t plane, bool far,
           Scratch& scratch) const;

 private:
  const Kernel& kernel_;
  const Weights& weights_;
  const Images& images_;
  const int64_t k_;
  const Depth depth_;
  const int64_t pitch_;
  int8_t* rows_;   // [channel][pitch]: values
  int32_t* sums_;  // [channel]
  float* bias_;    // [channel][16]
};

}  // namespace lowbit
