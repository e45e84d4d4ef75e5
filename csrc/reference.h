// The numerics in plain loops, written to be read: what every kernel must equal bit for bit. Slow.
#pragma once

#include "lowbit.h"

namespace lowbit::reference {

void linear(const float* x, int64_t m, const Weights& weights, Activation activation, float* y);
void conv2d(const float* x, const Conv2dGeometry& geometry, const Weights& weights,
            Activation activation, float* y);

}  // namespace lowbit::reference
