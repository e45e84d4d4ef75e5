// Depthwise convolutions of channels first, to channels first: channel by channel, so that neither
// codes nor outputs are transposed.
#pragma once

#include "kernel.h"
#include "lowbit.h"

namespace lowbit {

bool is_plane_depthwise(const Kernel& kernel, const Conv2dGeometry& geometry,
                        const Weights& weights, Activation activation,
                        const StaticActivation* fixed);

// All images of `geometry`, activations int8 and dynamic, epilogue included.
void plane_depthwise(const Kernel& kernel, const Conv2dGeometry& geometry, const Weights& weights,
                     const float* x, float* y, int threads);

}  // namespace lowbit
