// Codes to the packed layout and back. One layout for every ISA: the file is the memory.
//
// packed is [ceil(n/16)][steps][64]: channel c of a panel owns bytes 4c..4c+3 of a step, and bit
// field p of byte j is the code of k = step * depth + 4p + j. Padding (channels >= n, k beyond the
// end) is zero.
#include <algorithm>
#include <cstring>

#include "lowbit.h"

namespace lowbit {
namespace {

// Calls visit(address of the channel's four bytes of a step, index of its first code, how many) for
// every channel and step. Byte order is little endian, as the kernels read it.
template <class Byte, class Visit>
void for_each_step(Byte* packed, int64_t n, int64_t k, int64_t depth, Visit visit) {
  const int64_t steps = (k + depth - 1) / depth;
  for (int64_t c = 0; c < n; ++c) {
    Byte* channel = packed + (c / kPanel) * steps * kVectorBytes + (c % kPanel) * 4;
    for (int64_t s = 0; s < steps; ++s, channel += kVectorBytes)
      visit(channel, c * k + s * depth, std::min(depth, k - s * depth));
  }
}

constexpr int64_t kMostDepth = 32;

}  // namespace

int64_t packed_panels(int64_t n) { return (n + kPanel - 1) / kPanel; }

int64_t packed_steps(Format format, int64_t k) {
  const int64_t depth = traits(format).depth();
  return (k + depth - 1) / depth;
}

void pack(const uint8_t* codes, int64_t n, int64_t k, Format format, uint8_t* packed) {
  if (n * k == 0) return;
  std::memset(packed, 0,
              static_cast<size_t>(packed_panels(n) * packed_steps(format, k) * kVectorBytes));
  const FormatTraits& f = traits(format);
  // Four codes at once: a code shifted to its bit field stays within its byte.
  for_each_step(packed, n, k, f.depth(), [&](uint8_t* four, int64_t first, int64_t count) {
    uint8_t last[kMostDepth] = {};
    const uint8_t* from = codes + first;
    if (count < f.depth())
      from = static_cast<uint8_t*>(std::memcpy(last, from, static_cast<size_t>(count)));
    uint32_t word = 0;
    for (int p = 0; p < f.planes(); ++p) {
      uint32_t field;
      std::memcpy(&field, from + 4 * p, 4);
      word |= field << (p * f.bits);
    }
    std::memcpy(four, &word, 4);
  });
}

void unpack(const uint8_t* packed, int64_t n, int64_t k, Format format, uint8_t* codes) {
  const FormatTraits& f = traits(format);
  const uint32_t mask = ((1u << f.bits) - 1) * 0x01010101u;
  for_each_step(packed, n, k, f.depth(), [&](const uint8_t* four, int64_t first, int64_t count) {
    uint32_t word, fields[kMostDepth / 4];
    std::memcpy(&word, four, 4);
    for (int p = 0; p < f.planes(); ++p) fields[p] = word >> (p * f.bits) & mask;
    std::memcpy(codes + first, fields, static_cast<size_t>(count));
  });
}

bool padding_is_zero(const uint8_t* packed, int64_t n, int64_t k, Format format) {
  const FormatTraits& f = traits(format);
  const int64_t steps = packed_steps(format, k), in = k % f.depth();
  for (int64_t c = 0; c < packed_panels(n) * kPanel; ++c) {
    const uint8_t* channel = packed + (c / kPanel) * steps * kVectorBytes + (c % kPanel) * 4;
    // Of channels that exist only the end of the last step is padding.
    for (int64_t s = c < n ? (in ? steps - 1 : steps) : 0; s < steps; ++s)
      for (int64_t i = c < n ? in : 0; i < f.depth(); ++i)
        if (channel[s * kVectorBytes + i % 4] >> (i / 4 * f.bits) & ((1 << f.bits) - 1))
          return false;
  }
  return true;
}

}  // namespace lowbit
