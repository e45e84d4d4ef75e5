#include "activations.h"

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

UnitScale unit_scale(const Kernel& kernel, Activation activation, uint32_t amax, const float* x,
                     int64_t n) {
  if (amax >= kInfinityBits) return {std::numeric_limits<float>::quiet_NaN(), 0.0f};
  if (activation == Activation::binary)
    return {n == 0 ? 0.0f : kernel.abs_sum(x, n) / static_cast<float>(n), 1.0f};
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
