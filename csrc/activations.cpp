#include "activations.h"

#include <algorithm>
#include <cfloat>
#include <cstring>
#include <limits>

namespace lowbit {
namespace {

// The largest codes: 127, and 127 * 256 + 127, the largest whose two bytes are signed and never
// -128 in the high one.
constexpr float kMax8 = 127.0f, kMax16 = 32639.0f;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

}  // namespace

UnitScale fixed_scale(const StaticActivation* fixed) {
  if (!fixed) return {0.0f, 0.0f};
  return {fixed->scale, 1.0f / fixed->scale, fixed->zero, true};
}

float scale_of(const UnitScale& unit, uint32_t seen) {
  return unit.fixed && seen >= kInfinityBits ? kNaN : unit.scale;
}

uint32_t unit_amax(const Kernel& kernel, Activation activation, const float* x, int64_t n) {
  return activation == Activation::binary ? 0 : kernel.amax_bits(x, n);
}

UnitScale unit_scale(const Kernel& kernel, Activation activation, uint32_t amax, const float* x,
                     int64_t n) {
  constexpr UnitScale kNotFinite{kNaN, 0.0f};
  if (activation == Activation::binary) {
    float lanes[kSumLanes] = {};
    kernel.add_abs(x, n, 0, lanes);
    return unit_scale(kernel, lanes, x, n);
  }
  if (amax >= kInfinityBits) return kNotFinite;
  float largest;
  std::memcpy(&largest, &amax, sizeof(largest));
  const float scale = largest / (activation == Activation::int16 ? kMax16 : kMax8);
  // Below the normal range 1 / scale could overflow, and flush-to-zero would change the codes.
  if (!(scale >= FLT_MIN)) return {0.0f, 0.0f};
  return {scale, 1.0f / scale};
}

UnitScale unit_scale(const Kernel& kernel, float (&lanes)[kSumLanes], const float* x, int64_t n) {
  for (int width = kSumLanes / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  const float sum = lanes[0];
  // A finite sum has finite terms; another one may have overflowed.
  if (!(sum <= FLT_MAX) && kernel.amax_bits(x, n) >= kInfinityBits) return {kNaN, 0.0f};
  return {sum / static_cast<float>(std::max<int64_t>(n, 1)), 1.0f};
}

uint32_t encode(const Kernel& kernel, Activation activation, const UnitScale& unit, const float* x,
                int64_t n, int8_t* q, int8_t* lo) {
  const bool two = activation == Activation::int16;
  if (unit.fixed && activation != Activation::binary)
    return two ? kernel.saturate16(x, n, unit.inverse, q, lo)
               : kernel.saturate8(x, n, unit.inverse, unit.zero, q);
  if (unit.inverse == 0.0f) {
    std::memset(q, 0, static_cast<size_t>(n));
    if (two) std::memset(lo, 0, static_cast<size_t>(n));
  } else if (activation == Activation::binary) {
    kernel.binarize(x, n, q);
  } else if (two) {
    kernel.quantize16(x, n, unit.inverse, q, lo);
  } else {
    kernel.quantize8(x, n, unit.inverse, q);
  }
  return unit.fixed ? kernel.amax_bits(x, n) : 0;
}

uint32_t encode_bits(const Kernel& kernel, const UnitScale& unit, const float* x, int64_t n,
                     uint32_t* bits, float* lanes) {
  kernel.binarize_bits(x, n, bits, lanes);
  return unit.fixed ? kernel.amax_bits(x, n) : 0;
}

}  // namespace lowbit
