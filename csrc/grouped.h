// Grouped convolution of few channels a group, whose panels hold several groups.
#pragma once

#include "images.h"

namespace lowbit {

// Whether the microkernel takes it: what a panel's groups read of a pixel is 16 bytes, and sums are
// of int32, without groups of K.
bool is_fine_grouped(const Conv2dGeometry& geometry, const Weights& weights, Activation activation);

// Weights and scales as GroupedTile wants them. Made anew at each call (they are small), in
// `scratch`, which must outlive it.
class Grouped {
 public:
  Grouped(const Kernel& kernel, const Conv2dGeometry& geometry, const Weights& weights,
          const Images& images, Scratch& scratch);

  // Output pixels [first, first + count) of an image, all channels, to y [count][out_channels] or
  // to `codes` (in registers, without a residual). One thread at a time, each with a `scratch` of
  // its own.
  void run(const Images& images, int64_t image, int64_t first, int64_t count, float* y,
           const CodeImage* codes, Scratch& scratch) const;

 private:
  const Kernel& kernel_;
  const Conv2dGeometry& geometry_;
  const Weights& weights_;
  GroupedTile tile_{};
};

// The weights of groups that share panels, in panels of their own, cut from `scratch`.
Weights separate_groups(const Conv2dGeometry& geometry, const Weights& weights, const Depth& depth,
                        Scratch& scratch);

// Those of one group, of groups in panels of their own.
Weights group_weights(const Weights& all, const Conv2dGeometry& geometry, const Depth& depth,
                      int64_t group);

}  // namespace lowbit
