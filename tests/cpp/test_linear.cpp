// lowbit::linear equals the naive reference, bit for bit, and touches nothing but its operands.
#include <doctest/doctest.h>

#include <sstream>
#include <string>
#include <vector>

#include "dispatch.h"
#include "operands.h"
#include "reference.h"

using namespace lowbit;
using namespace lowbit::test;

namespace {

void check(const std::string& what, const std::vector<float>& x, int64_t m, const Weights& weights,
           Activation activation, Edge edge, std::initializer_list<int> thread_counts,
           const std::optional<StaticActivation>& fixed = std::nullopt) {
  const size_t count = static_cast<size_t>(m * weights.n);
  std::vector<float> expected(count);
  const StaticActivation* const given = fixed ? &*fixed : nullptr;
  reference::linear(x.data(), m, weights, activation, expected.data(), given);
  const GuardedBuffer<float> in(x, edge);
  Weights own = weights;
  GuardedBuffer<float> bias(fixed ? static_cast<size_t>(weights.n) : 0, edge);
  for (int threads : thread_counts) {
    GuardedBuffer<float> out(count, edge);
    if (fixed) {
      static_bias(weights, *fixed, bias.data(), threads);
      own.bias = bias.data();
    }
    linear(in.data(), m, own, activation, out.data(), threads, given);
    const std::string problem = difference(out.data(), expected.data(), count);
    CHECK_MESSAGE(problem.empty(), what << ", threads " << threads << ": " << problem);
    CHECK_MESSAGE(out.intact(), what << ", threads " << threads << ": wrote outside of y");
  }
}

std::string describe(Format format, Activation activation, int64_t m, int64_t n, int64_t k,
                     Groups groups, bool bias) {
  std::ostringstream s;
  s << name(format, activation) << "m " << m << ", n " << n << ", k " << k << ", group_size "
    << groups.size << (groups.zeros ? " with zeros" : "") << (bias ? ", bias" : "");
  return s.str();
}

// One random case of the given sizes.
void check_random(Lcg& draw, Format format, Activation activation, int64_t m, int64_t n,
                  int64_t k) {
  const Groups groups = draw.pick(kAllGroups);
  const bool bias = draw.one_in(2);
  const Edge edge = draw.one_in(2) ? Edge::kBegin : Edge::kEnd;
  const std::vector<uint8_t> codes = make_codes(draw, format, n * k, draw.pick(kAllCodes));
  GuardedWeights weights(draw, format, n, k, codes, groups, bias, edge);
  weights.set(draw.pick(kAllEpilogues));
  const std::vector<float> x = make_rows(draw, activation, m, k);
  const std::optional<StaticActivation> fixed = make_fixed(draw, activation);
  check(describe(format, activation, m, n, k, groups, bias) + ", " + name(weights.get().epilogue) +
            ", " + name(fixed),
        x, m, weights.get(), activation, edge, {1, 2, static_cast<int>(3 + draw.below(3))}, fixed);
}

}  // namespace

TEST_CASE("any number of rows") {
  // 1 to a little more than two tall tiles, whatever the tile of the ISA; channels that leave one
  // panel over, and three.
  for_each_pair([](Format format, Activation activation) {
    Lcg draw(11);
    for (int64_t m = 1; m <= 31; ++m)
      check_random(draw, format, activation, m, draw.one_in(2) ? 65 : 100, 71);
  });
}

TEST_CASE("many rows") {
  // AVX2's tiles have 48.
  for_each_pair([](Format format, Activation activation) {
    Lcg draw(20);
    for (int64_t m : {47, 48, 49, 95, 97, 150}) check_random(draw, format, activation, m, 83, 71);
  });
}

TEST_CASE("any number of channels") {
  for_each_pair([](Format format, Activation activation) {
    Lcg draw(12);
    for (int64_t n = 1; n <= 70; n += n < 5 || n % 16 > 13 || n % 16 < 2 ? 1 : 3)
      check_random(draw, format, activation, 1 + draw.below(7), n, 64);
  });
}

TEST_CASE("any depth") {
  for_each_pair([](Format format, Activation activation) {
    Lcg draw(13);
    for (int64_t k = 1; k <= 140; ++k)
      check_random(draw, format, activation, 1 + draw.below(3), 18, k);
  });
}

TEST_CASE("random sizes") {
  for_each_pair([](Format format, Activation activation) {
    Lcg draw(14);
    for (int i = 0; i < 40; ++i)
      check_random(draw, format, activation, 1 + draw.below(20), 1 + draw.below(200),
                   1 + draw.below(400));
  });
}

TEST_CASE("sizes large enough for several threads") {
  // A thread is woken for about a million multiply-accumulates.
  constexpr int64_t kSizes[][3] = {{1, 1500, 2600}, {7, 700, 800}, {90, 130, 300}, {300, 20, 500}};
  for (const auto& pair : kThreadedPairs) {
    Lcg draw(19);
    for (const auto& [m, n, k] : kSizes) check_random(draw, pair.format, pair.activation, m, n, k);
  }
}

TEST_CASE("no rows, no depth") {
  for_each_pair([](Format format, Activation activation) {
    Lcg draw(15);
    check_random(draw, format, activation, 0, 20, 40);
    check_random(draw, format, activation, 3, 20, 0);
  });
}

TEST_CASE("sums that leave int32 are exact") {
  // 140,000 products of the largest codes; the sum of int16 ones needs 38 bits.
  constexpr int64_t kDepth = 140000;
  for_each_pair([](Format format, Activation activation) {
    for (Codes kind : {Codes::kLowest, Codes::kHighest}) {
      for (const Groups groups : {Groups{0, false}, Groups{kDepth / 32 * 32, true}}) {
        Lcg draw(16);
        const std::vector<uint8_t> codes = make_codes(draw, format, 3 * kDepth, kind);
        const GuardedWeights weights(draw, format, 3, kDepth, codes, groups, true, Edge::kEnd);
        std::vector<float> x(static_cast<size_t>(2 * kDepth));
        for (int64_t i = 0; i < kDepth; ++i) {
          x[static_cast<size_t>(i)] = make_value(draw, activation, Values::kSameSign);
          x[static_cast<size_t>(kDepth + i)] = make_value(draw, activation, Values::kUniform);
        }
        check(describe(format, activation, 2, 3, kDepth, groups, true), x, 2, weights.get(),
              activation, Edge::kEnd, {2});
      }
    }
  });
}

TEST_CASE("int16 sums at the edge of int32") {
  // Up to this depth 256 * hi + lo is combined in int32, beyond it in float64.
  for (const FormatTraits& f : kFormats) {
    const int64_t edge = INT32_MAX / (32896 * int64_t{f.largest()});
    const auto format = static_cast<Format>(&f - kFormats);
    for (int64_t k = edge - 1; k <= edge + 2; ++k)
      for (Codes kind : {Codes::kLowest, Codes::kHighest}) {
        Lcg draw(20);
        const std::vector<uint8_t> codes = make_codes(draw, format, 17 * k, kind);
        const GuardedWeights weights(draw, format, 17, k, codes, {0, false}, true, Edge::kEnd);
        std::vector<float> x(static_cast<size_t>(2 * k), 3.0f);
        for (int64_t i = 0; i < k; ++i) x[static_cast<size_t>(i)] = -3.0f;
        check(describe(format, Activation::int16, 2, 17, k, {0, false}, true), x, 2, weights.get(),
              Activation::int16, Edge::kEnd, {1});
      }
  }
}

TEST_CASE("sums of the largest products, as deep as a narrow sum is and deeper") {
  // Partial sums of 16 bits (8, 42 or 128 products deep) and counts of 8: every product is the
  // largest or the smallest one, in each of the patterns. The low byte of 32384 is -128.
  for_each_pair([](Format format, Activation activation) {
    const float q = activation == Activation::int16 ? 32384.0f : 127.0f;
    constexpr int64_t kDepths[] = {28, 32, 36, 168, 516, 2600};
    Lcg draw(21);
    for (int64_t k : kDepths)
      for (Codes kind : {Codes::kHighest, Codes::kLowest, Codes::kExtreme})
        for (int64_t m : {1, 3, 4, 6, 13}) {
          constexpr int64_t kChannels = 34;
          const std::vector<uint8_t> codes = make_codes(draw, format, kChannels * k, kind);
          const GuardedWeights weights(draw, format, kChannels, k, codes, {}, false, Edge::kEnd);
          std::vector<float> x(static_cast<size_t>(m * k));
          for (int64_t r = 0; r < m; ++r)
            for (int64_t i = 0; i < k; ++i) {
              const bool negative[] = {false, true, i % 2 == 0, i % 4 < 2, draw.one_in(2)};
              x[static_cast<size_t>(r * k + i)] = negative[r % 5] ? -q : q;
            }
          // The scale of such a row is 1 where its largest value is the largest code.
          if (activation == Activation::int16)
            for (int64_t r = 0; r < m; ++r) x[static_cast<size_t>(r * k)] = 32639.0f;
          check(describe(format, activation, m, kChannels, k, {}, false), x, m, weights.get(),
                activation, Edge::kEnd, {1});
        }
  });
}

TEST_CASE("products of the lowest codes of static activations") {
  // -128 times -128 (a weight's lowest code), which dynamic activations never have.
  for (const FormatTraits& f : kFormats) {
    const auto format = static_cast<Format>(&f - kFormats);
    Lcg draw(22);
    for (int64_t k : {8, 32, 36, 168, 516, 2600})
      for (int64_t m : {1, 2, 3, 5, 13})
        for (Codes kind : {Codes::kLowest, Codes::kHighest}) {
          constexpr int64_t kChannels = 34;
          const std::vector<uint8_t> codes = make_codes(draw, format, kChannels * k, kind);
          const GuardedWeights weights(draw, format, kChannels, k, codes, {}, true, Edge::kEnd);
          std::vector<float> x(static_cast<size_t>(m * k), -1e30f);
          for (int64_t i = 0; i < k; ++i) x[static_cast<size_t>(i)] = i % 2 ? 1e30f : -1e30f;
          for (int zero : {0, -128, 127})
            check(describe(format, Activation::int8, m, kChannels, k, {}, true), x, m,
                  weights.get(), Activation::int8, Edge::kEnd, {1}, StaticActivation{0.5f, zero});
        }
  }
}

TEST_CASE("every float16 as a group scale and as a group zero") {
  // One channel for each of the 65,536 patterns; k = 32 is one group.
  constexpr int64_t kPatterns = 65536, kDepth = 32;
  Lcg draw(17);
  const std::vector<uint8_t> codes =
      make_codes(draw, Format::int4, kPatterns * kDepth, Codes::kUniform);
  std::vector<uint8_t> packed(
      static_cast<size_t>(packed_panels(kPatterns) * packed_steps(Format::int4, kDepth) * 64));
  pack(codes.data(), kPatterns, kDepth, Format::int4, packed.data());
  const std::vector<float> scale(kPatterns, 0.25f);
  std::vector<uint16_t> pattern(kPatterns), one(kPatterns, 0x3C00);
  for (size_t i = 0; i < pattern.size(); ++i) pattern[i] = static_cast<uint16_t>(i);
  std::vector<float> x;
  for (int64_t i = 0; i < kDepth; ++i)
    x.push_back(make_value(draw, Activation::int8, Values::kUniform));
  const Weights as_scale{Format::int4, kPatterns,      kDepth,  32,      packed.data(),
                         scale.data(), pattern.data(), nullptr, nullptr, Epilogue::none};
  const Weights as_zero{Format::int4, kPatterns,  kDepth,         32,      packed.data(),
                        scale.data(), one.data(), pattern.data(), nullptr, Epilogue::none};
  check("float16 scales", x, 1, as_scale, Activation::int8, Edge::kEnd, {1, 2});
  check("float16 zeros", x, 1, as_zero, Activation::int8, Edge::kEnd, {1, 2});
}

TEST_CASE("rows do not see each other") {
  // A row alone gives the bits that it gives among others.
  for_each_pair([](Format format, Activation activation) {
    Lcg draw(18);
    constexpr int64_t kRows = 9, kChannels = 35, kDepth = 77;
    const std::vector<uint8_t> codes =
        make_codes(draw, format, kChannels * kDepth, Codes::kUniform);
    const GuardedWeights weights(draw, format, kChannels, kDepth, codes, {32, true}, true,
                                 Edge::kEnd);
    const std::vector<float> x = make_rows(draw, activation, kRows, kDepth);
    std::vector<float> all(kRows * kChannels), alone(kChannels);
    linear(x.data(), kRows, weights.get(), activation, all.data(), 2);
    for (int64_t r = 0; r < kRows; ++r) {
      linear(x.data() + r * kDepth, 1, weights.get(), activation, alone.data(), 1);
      const std::string problem = difference(alone.data(), all.data() + r * kChannels, kChannels);
      CHECK_MESSAGE(problem.empty(), name(format, activation) << "row " << r << ": " << problem);
    }
  });
}

TEST_CASE("activations of -128") {
  // No dynamic code is -128, but static ones are, low bytes, and what stands beside padding.
  const Kernel& k = kernel();
  for (int f = 0; f < kFormatCount; ++f) {
    const FormatTraits& format = kFormats[f];
    constexpr int64_t kSteps = 24;
    const int64_t depth = kSteps * format.depth();
    for (const bool least : {true, false}) {
      Lcg draw(31);
      AlignedBytes w(kSteps * kVectorBytes), room(k.room(depth));
      for (int64_t i = 0; i < kSteps * kVectorBytes; ++i)
        w.data()[i] = least ? 0 : static_cast<uint8_t>(draw.below(256));
      for (int rows = 1; rows <= 20; ++rows) {
        std::vector<int8_t> a(static_cast<size_t>(rows * depth), -128);
        if (!least)
          for (int8_t& x : a) x = static_cast<int8_t>(draw.one_in(2) ? -128 : 127);
        const std::vector<int32_t> offset(static_cast<size_t>(rows), 5);
        std::vector<int32_t> sums(static_cast<size_t>(rows * k.nr));
        for (int first = 0; first < rows; first += k.mr) {
          Tile t{};
          t.rows = rows - first < k.mr ? rows - first : k.mr;
          t.panels = 1;
          t.codes = a.data() + first * depth;
          t.pitch = depth;
          t.w = t.ahead = w.data();
          t.panel_stride = kSteps * kVectorBytes;
          t.room = room.data();
          t.steps = t.group_steps = kSteps;
          t.groups = t.offset_pitch = 1;
          t.offset = offset.data();
          t.sums = sums.data() + first * k.nr;
          t.planes = 1;
          k.dot[f](t);
        }
        bool same = true;
        for (int r = 0; r < rows; ++r)
          for (int c = 0; c < kPanel; ++c) {
            int32_t expected = 5;
            for (int64_t i = 0; i < depth; ++i) {
              const int64_t step = i / format.depth(), field = i % format.depth() / 4;
              const int byte = w.data()[step * kVectorBytes + 4 * c + i % 4];
              const int code = byte >> (field * format.bits) & ((1 << format.bits) - 1);
              expected += format.mul * code * a[static_cast<size_t>(r * depth + i)];
            }
            same = same && sums[static_cast<size_t>(r * k.nr + c)] == expected;
          }
        CHECK_MESSAGE(same, format.name << ", rows " << rows << ", least " << least);
      }
    }
  }
}
