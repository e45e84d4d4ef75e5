// Codes to the packed layout and back. One layout for every ISA: the file is the memory.
//
// packed is [ceil(n/16)][steps][64]: channel c of a panel owns bytes 4c..4c+3 of a step, and bit
// field p of byte j is the code of k = step * depth + 4p + j. Padding (channels >= n, k beyond the
// end) is zero.
#include <cstring>

#include "lowbit.h"

namespace lowbit {
namespace {

// Calls visit(byte index, shift, n * k_total + k) for every code of the matrix.
template <class Visit>
void for_each_code(int64_t n, int64_t k, const FormatTraits& f, Visit visit) {
  const int64_t depth = f.depth(), steps = (k + depth - 1) / depth;
  for (int64_t c = 0; c < n; ++c) {
    const int64_t channel = (c / kPanel) * steps * kVectorBytes + (c % kPanel) * 4;
    for (int64_t i = 0; i < k; ++i) {
      const int64_t in = i % depth;
      visit(channel + i / depth * kVectorBytes + in % 4, static_cast<int>(in / 4) * f.bits,
            c * k + i);
    }
  }
}

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
  for_each_code(n, k, traits(format), [&](int64_t byte, int shift, int64_t i) {
    packed[byte] = static_cast<uint8_t>(packed[byte] | codes[i] << shift);
  });
}

void unpack(const uint8_t* packed, int64_t n, int64_t k, Format format, uint8_t* codes) {
  const int mask = (1 << traits(format).bits) - 1;
  for_each_code(n, k, traits(format), [&](int64_t byte, int shift, int64_t i) {
    codes[i] = static_cast<uint8_t>(packed[byte] >> shift & mask);
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
