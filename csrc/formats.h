// The weight formats, once. A weight is an unsigned code c of `bits` bits that means scale * (mul *
// c + add).
//
// Every format is an affine map of an unsigned code: a kernel made from its numbers sums mul * code
// * activation from add * sum(activation) on.
#pragma once

#include <cstdint>

namespace lowbit {

// X(name, bits, mul, add). mul is a power of two (the epilogue shifts). A new format is one row.
#define LOWBIT_FORMATS(X) \
  X(int8, 8, 1, -128)     \
  X(int4, 4, 1, -8)       \
  X(int2, 2, 2, -3)       \
  X(ternary, 2, 1, -1)    \
  X(binary, 1, 2, -1)

enum class Format : int {
#define X(name, bits, mul, add) name,
  LOWBIT_FORMATS(X)
#undef X
};

struct FormatTraits {
  const char* name;
  int bits, mul, add;

  constexpr int planes() const { return 8 / bits; }         // codes in a byte
  constexpr int depth() const { return 4 * planes(); }      // k in a 64-byte vector of 16 channels
  constexpr int shift() const { return mul == 2 ? 1 : 0; }  // mul as a shift
  constexpr int largest() const {                           // |mul * code + add| at most
    const int top = mul * ((1 << bits) - 1) + add;
    return top > -add ? top : -add;
  }
};

inline constexpr FormatTraits kFormats[] = {
#define X(name, bits, mul, add) {#name, bits, mul, add},
    LOWBIT_FORMATS(X)
#undef X
};
inline constexpr int kFormatCount = sizeof(kFormats) / sizeof(kFormats[0]);

// Kernels take mul * code and -add of the narrow formats as 4-bit numbers, of int8 as bytes.
#define X(name, bits, mul, add)                                                               \
  static_assert((mul == 1 || mul == 2) && (bits == 8 || bits == 4 || bits == 2 || bits == 1), \
                "format " #name);                                                             \
  static_assert(-(add) >= 1 && -(add) <= (bits == 8 ? 128 : 15) &&                            \
                    mul * ((1 << bits) - 1) <= (bits == 8 ? 255 : 15),                        \
                "format " #name);
LOWBIT_FORMATS(X)
#undef X

constexpr const FormatTraits& traits(Format f) { return kFormats[static_cast<int>(f)]; }

enum class Activation : int { int8, int16, binary };
inline constexpr const char* kActivations[] = {"int8", "int16", "binary"};
inline constexpr int kActivationCount = 3;

// What is computed from a layer's outputs before they leave the cache, in single precision: y is 0
// where 0 > y (so NaN and -0 stay), then 6 where y > 6 for relu6; hardswish is y * relu6(y + 3)
// / 6.
enum class Epilogue : int { none, relu, relu6, hardswish };
inline constexpr const char* kEpilogues[] = {"none", "relu", "relu6", "hardswish"};
inline constexpr int kEpilogueCount = 4;

// An int16 activation is two int8 rows, 256 * hi + lo.
constexpr int planes(Activation a) { return a == Activation::int16 ? 2 : 1; }

inline constexpr int kPanel = 16;         // channels in a panel
inline constexpr int kVectorBytes = 64;   // one step of a panel
inline constexpr int kLayoutVersion = 2;  // of the weights' tensors

// A chunk of K whose sum cannot leave int32: |mul * c + add| <= 128 and |a| <= 128 give 2^30.
inline constexpr int64_t kChunk = 65536;
static_assert(kChunk * 128 * 128 <= (int64_t{1} << 30), "int32 sums must be exact");

}  // namespace lowbit
