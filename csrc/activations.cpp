#include "activations.h"

#include <algorithm>
#include <cfloat>
#include <cstring>
#include <limits>

namespace lowbit {
namespace {

constexpr uint32_t kInfinityBits = 0x7f800000u;

// The largest codes: 127, and 127 * 256 + 127, the largest whose two bytes are signed and never
// -128 in the high one.
constexpr float kMax8 = 127.0f, kMax16 = 32639.0f;

}  // namespace

uint32_t unit_amax(const Kernel& kernel, Activation activation, const float* x, int64_t n) {
  return activation == Activation::binary ? 0 : kernel.amax_bits(x, n);
}

UnitScale unit_scale(const Kernel& kernel, Activation activation, uint32_t amax, const float* x,
                     int64_t n) {
  constexpr UnitScale kNotFinite{std::numeric_limits<float>::quiet_NaN(), 0.0f};
  if (activation == Activation::binary) {
    // A finite sum has finite terms; another one may have overflowed.
    const float sum = n == 0 ? 0.0f : kernel.abs_sum(x, n);
    if (!(sum <= FLT_MAX) && kernel.amax_bits(x, n) >= kInfinityBits) return kNotFinite;
    return {sum / static_cast<float>(std::max<int64_t>(n, 1)), 1.0f};
  }
  if (amax >= kInfinityBits) return kNotFinite;
  float largest;
  std::memcpy(&largest, &amax, sizeof(largest));
  const float scale = largest / (activation == Activation::int16 ? kMax16 : kMax8);
  // Below the normal range 1 / scale could overflow, and flush-to-zero would change the codes.
  if (!(scale >= FLT_MIN)) return {0.0f, 0.0f};
  return {scale, 1.0f / scale};
}

void encode(const Kernel& kernel, Activation activation, const UnitScale& unit, const float* x,
            int64_t n, int8_t* q, int8_t* lo) {
  const bool two = activation == Activation::int16;
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
}

}  // namespace lowbit
