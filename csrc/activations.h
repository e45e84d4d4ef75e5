// Float units to signed codes. A unit has one scale: a row of Linear, an image of Conv2d.
#pragma once

#include "formats.h"
#include "kernel.h"
#include "lowbit.h"

namespace lowbit {

struct UnitScale {
  float scale;         // 0 for a unit that counts as zero, NaN for one with a NaN or an infinity
  float inverse;       // 1 / scale, or 0 where all codes are 0
  int zero = 0;        // the code that means 0
  bool fixed = false;  // whatever the values are: their codes are saturated
};

inline constexpr uint32_t kInfinityBits = 0x7f800000u;  // those of a NaN are more

// The scale of every unit: `fixed`, if it is not null.
UnitScale fixed_scale(const StaticActivation* fixed);

// A unit's scale; where it is fixed, `seen` is what `encode` returned for all of it.
float scale_of(const UnitScale& unit, uint32_t seen);

// The largest |x| of a part of a unit, as its bits, for unit_scale: of all parts the largest.
// Binary units have no use for it.
uint32_t unit_amax(const Kernel& kernel, Activation activation, const float* x, int64_t n);

// amax: unit_amax of the whole unit, x [n].
UnitScale unit_scale(const Kernel& kernel, Activation activation, uint32_t amax, const float* x,
                     int64_t n);

// Of a binary unit, of whose |x| `lanes` are the sums (Kernel::add_abs); the lanes are added up.
inline constexpr int kSumLanes = 16;
UnitScale unit_scale(const Kernel& kernel, float (&lanes)[kSumLanes], const float* x, int64_t n);

// Codes of a part of a unit; `lo` is written for int16 alone (q is then hi). Returns its largest
// |x| where the scale is fixed, as its bits, else 0: that was looked at before.
uint32_t encode(const Kernel& kernel, Activation activation, const UnitScale& unit, const float* x,
                int64_t n, int8_t* q, int8_t* lo);

// The same as bits, 1 where x < 0. `lanes`: null, or what |x| are added to, see
// Kernel::binarize_bits.
uint32_t encode_bits(const Kernel& kernel, const UnitScale& unit, const float* x, int64_t n,
                     uint32_t* bits, float* lanes = nullptr);

}  // namespace lowbit
