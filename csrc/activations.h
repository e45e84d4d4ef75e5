// Float units to signed codes. A unit has one scale: a row of Linear, an image of Conv2d.
#pragma once

#include "formats.h"
#include "kernel.h"

namespace lowbit {

struct UnitScale {
  float scale;    // 0 for a unit that counts as zero, NaN for one with a NaN or an infinity
  float inverse;  // 1 / scale, or 0 where all codes are 0
};

// The largest |x| of a part of a unit, as its bits, for unit_scale: of all parts the largest.
// Binary units have no use for it.
uint32_t unit_amax(const Kernel& kernel, Activation activation, const float* x, int64_t n);

// amax: unit_amax of the whole unit, x [n].
UnitScale unit_scale(const Kernel& kernel, Activation activation, uint32_t amax, const float* x,
                     int64_t n);

// Codes of a part of a unit; `lo` is written for int16 alone (q is then hi).
void encode(const Kernel& kernel, Activation activation, const UnitScale& unit, const float* x,
            int64_t n, int8_t* q, int8_t* lo);

}  // namespace lowbit
