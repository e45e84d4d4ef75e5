// The packed layout, byte by byte.
#include <doctest/doctest.h>

#include <vector>

#include "operands.h"

using namespace lowbit;
using namespace lowbit::test;

namespace {

// Where DESIGN's formula puts the code of channel c and depth i: byte, and bit in it.
struct Position {
  size_t byte;
  int bit;
};

Position position(const FormatTraits& f, int64_t steps, int64_t c, int64_t i) {
  const int64_t step = i / f.depth(), p = i % f.depth() / 4, j = i % 4;
  return {static_cast<size_t>((c / 16 * steps + step) * 64 + 4 * (c % 16) + j),
          static_cast<int>(p) * f.bits};
}

}  // namespace

TEST_CASE("pack puts every code where the layout says, and zeros elsewhere") {
  Lcg draw(1);
  for (int format_index = 0; format_index < kFormatCount; ++format_index) {
    const Format format = static_cast<Format>(format_index);
    const FormatTraits& f = traits(format);
    for (int64_t n : {1, 15, 16, 17, 40}) {
      for (int64_t k : {1, 3, 4, 5, 31, 32, 33, 100}) {
        CAPTURE(f.name);
        CAPTURE(n);
        CAPTURE(k);
        const std::vector<uint8_t> codes = make_codes(draw, format, n * k, Codes::kUniform);
        const int64_t steps = packed_steps(format, k);
        REQUIRE(steps == (k + f.depth() - 1) / f.depth());
        REQUIRE(packed_panels(n) == (n + 15) / 16);
        std::vector<uint8_t> expected(static_cast<size_t>(packed_panels(n) * steps * 64));
        for (int64_t c = 0; c < n; ++c) {
          for (int64_t i = 0; i < k; ++i) {
            const Position at = position(f, steps, c, i);
            expected[at.byte] = static_cast<uint8_t>(
                expected[at.byte] | codes[static_cast<size_t>(c * k + i)] << at.bit);
          }
        }
        for (Edge edge : {Edge::kBegin, Edge::kEnd}) {
          const GuardedBuffer<uint8_t> in(codes, edge);
          GuardedBuffer<uint8_t> packed(expected.size(), edge), out(codes.size(), edge);
          pack(in.data(), n, k, format, packed.data());
          CHECK(std::memcmp(packed.data(), expected.data(), expected.size()) == 0);
          unpack(packed.data(), n, k, format, out.data());
          CHECK(std::memcmp(out.data(), codes.data(), codes.size()) == 0);
          CHECK((packed.intact() && out.intact()));
        }
      }
    }
  }
}

TEST_CASE("taps take whole steps, unless they have fewer channels than a step") {
  for (int format_index = 0; format_index < kFormatCount; ++format_index) {
    const Format format = static_cast<Format>(format_index);
    const int64_t depth = traits(format).depth();
    CHECK(tap_channels(format, 1) == 1);
    CHECK(tap_channels(format, depth - 1) == depth - 1);
    CHECK(tap_channels(format, depth) == depth);
    CHECK(tap_channels(format, depth + 1) == 2 * depth);
    CHECK(tap_channels(format, 3 * depth) == 3 * depth);

    Conv2dGeometry g{};
    g.kernel_h = 3;
    g.kernel_w = 5;
    g.channels = depth + 1;
    g.out_channels = 8;
    g.groups = 1;
    CHECK(conv2d_depth(format, g) == 15 * 2 * depth);
    g.channels = g.out_channels = g.groups = 2 * depth;  // depthwise: one channel a tap
    CHECK(conv2d_depth(format, g) == 15);
    g.channels = 6;
    g.groups = 2;  // merged: 3 channels a tap
    g.out_channels = 8;
    CHECK(conv2d_depth(format, g) == 45);
  }
}
