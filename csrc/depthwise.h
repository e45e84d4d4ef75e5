// Depthwise convolution: every channel has its own taps, so a step multiplies 16 channels by 4 taps
// each.
#pragma once

#include "images.h"

namespace lowbit {

// Output pixels [first, first + count) of an image, all channels, to y [pixels of all
// images][out_channels].
void depthwise(const Kernel& kernel, const Conv2dGeometry& geometry, const Weights& weights,
               const Depth& depth, const Images& images, int64_t image, int64_t first,
               int64_t count, float* y);

}  // namespace lowbit
