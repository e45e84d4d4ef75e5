// The numerics in plain loops, written to be read: what every kernel must equal bit for bit. Slow.
#pragma once

#include "lowbit.h"

namespace lowbit::reference {

// `fixed`: as in lowbit.h, but the bias is the layer's own.
void linear(const float* x, int64_t m, const Weights& weights, Activation activation, float* y,
            const StaticActivation* fixed = nullptr);
void conv2d(const float* x, const Conv2dGeometry& geometry, const Weights& weights,
            Activation activation, float* y, const StaticActivation* fixed = nullptr);

}  // namespace lowbit::reference
