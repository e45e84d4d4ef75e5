// lowbit::conv2d equals the naive reference, bit for bit, and touches nothing but its operands.
#include <doctest/doctest.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <vector>

#include "dispatch.h"
#include "operands.h"
#include "reference.h"

using namespace lowbit;
using namespace lowbit::test;

namespace {

int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad_begin,
                    int64_t pad_end, int64_t dilation) {
  return (size + pad_begin + pad_end - dilation * (kernel - 1) - 1) / stride + 1;
}

std::string describe(Format format, Activation activation, const Conv2dGeometry& g, Groups groups) {
  std::ostringstream s;
  s << name(format, activation) << "images " << g.batch << "x" << g.height << "x" << g.width << "x"
    << g.channels << " -> " << g.out_height << "x" << g.out_width << "x" << g.out_channels
    << ", kernel " << g.kernel_h << "x" << g.kernel_w << ", stride " << g.stride_h << "x"
    << g.stride_w << ", pad " << g.pad_top << "x" << g.pad_left << ", dilation " << g.dilation_h
    << "x" << g.dilation_w << (g.x_channels_last ? "" : ", x NCHW")
    << (g.y_channels_last ? "" : ", y NCHW") << ", groups " << g.groups << ", group_size "
    << groups.size << (groups.zeros ? " with zeros" : "");
  return s.str();
}

// Codes [out_channels, K], those of the padding inside taps 0, as the file has them.
std::vector<uint8_t> conv_codes(Lcg& draw, Format format, const Conv2dGeometry& g, Codes kind) {
  const int64_t k = conv2d_depth(format, g), taps = g.kernel_h * g.kernel_w;
  const int64_t per_tap = k / taps, used = g.channels / g.groups;
  std::vector<uint8_t> codes = make_codes(draw, format, g.out_channels * k, kind);
  for (size_t i = 0; i < codes.size(); ++i)
    if (static_cast<int64_t>(i) % per_tap >= used) codes[i] = 0;
  return codes;
}

void check(Lcg& draw, Format format, Activation activation, Conv2dGeometry g) {
  g.x_channels_last = draw.one_in(2);
  g.y_channels_last = draw.one_in(2);
  const Groups groups = draw.pick(kAllGroups);
  const Edge edge = draw.one_in(2) ? Edge::kBegin : Edge::kEnd;
  const std::vector<uint8_t> codes = conv_codes(draw, format, g, draw.pick(kAllCodes));
  GuardedWeights weights(draw, format, g.out_channels, conv2d_depth(format, g), codes, groups,
                         draw.one_in(2), edge, g.blocks());
  weights.set(draw.pick(kAllEpilogues));
  const std::optional<StaticActivation> fixed = make_fixed(draw, activation);
  const StaticActivation* const given = fixed ? &*fixed : nullptr;
  const std::string what = describe(format, activation, g, groups) + ", " +
                           name(weights.get().epilogue) + ", " + name(fixed);
  const std::vector<float> x =
      make_rows(draw, activation, g.batch, g.height * g.width * g.channels);
  const size_t count = static_cast<size_t>(g.batch * g.out_height * g.out_width * g.out_channels);
  std::vector<float> expected(count);
  reference::conv2d(x.data(), g, weights.get(), activation, expected.data(), given);
  const GuardedBuffer<float> in(x, edge);
  Weights own = weights.get();
  GuardedBuffer<float> bias(fixed ? static_cast<size_t>(own.n) : 0, edge);
  for (int threads : {1, 2, static_cast<int>(3 + draw.below(3))}) {
    GuardedBuffer<float> out(count, edge);
    if (fixed) {
      static_bias(weights.get(), g, *fixed, bias.data(), threads);
      own.bias = bias.data();
    }
    conv2d(in.data(), g, own, activation, out.data(), threads, given);
    const std::string problem = difference(out.data(), expected.data(), count);
    CHECK_MESSAGE(problem.empty(), what << ", threads " << threads << ": " << problem);
    CHECK_MESSAGE(out.intact(), what << ", threads " << threads << ": wrote outside of y");
  }
}

// Spatial geometry at random; kernels that overlap the image in part, or lie in the padding alone.
Conv2dGeometry random_geometry(Lcg& draw, int64_t channels, int64_t out_channels, int64_t groups) {
  constexpr int64_t kKernels[][2] = {{1, 1}, {1, 1}, {2, 2}, {3, 3},
                                     {3, 3}, {5, 5}, {1, 7}, {4, 1}};
  for (;;) {
    Conv2dGeometry g{};
    g.batch = 1 + draw.below(3);
    g.height = 1 + draw.below(9);
    g.width = 1 + draw.below(draw.one_in(4) ? 40 : 9);
    g.channels = channels;
    g.out_channels = out_channels;
    const auto& kernel = draw.pick(kKernels);
    g.kernel_h = kernel[0];
    g.kernel_w = kernel[1];
    g.stride_h = 1 + draw.below(3);
    g.stride_w = 1 + draw.below(3);
    g.pad_top = draw.below(4);
    g.pad_left = draw.below(4);
    g.dilation_h = 1 + draw.below(2);
    g.dilation_w = 1 + draw.below(2);
    g.groups = groups;
    // Padding below and to the right differs from that above and to the left.
    g.out_height =
        output_size(g.height, g.kernel_h, g.stride_h, g.pad_top, draw.below(4), g.dilation_h);
    g.out_width =
        output_size(g.width, g.kernel_w, g.stride_w, g.pad_left, draw.below(4), g.dilation_w);
    if (g.out_height >= 1 && g.out_width >= 1) return g;
  }
}

constexpr int64_t kChannels[] = {1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 40, 64, 70};

}  // namespace

TEST_CASE("dense convolutions") {
  for_each_pair([](Format format, Activation activation) {
    Lcg draw(21);
    for (int64_t channels : kChannels)
      for (int i = 0; i < 3; ++i)
        check(draw, format, activation, random_geometry(draw, channels, 1 + draw.below(80), 1));
  });
}

TEST_CASE("1x1 convolutions") {
  for_each_pair([](Format format, Activation activation) {
    Lcg draw(22);
    for (int64_t channels : kChannels) {
      Conv2dGeometry g{};
      g.batch = 2;
      // Channels first, many pixels are the panels of a GEMM.
      const int64_t least = draw.one_in(2) ? 13 : 1;
      g.height = g.out_height = least + draw.below(8);
      g.width = g.out_width = least + draw.below(8);
      g.channels = channels;
      g.out_channels = 1 + draw.below(70);
      g.kernel_h = g.kernel_w = g.stride_h = g.stride_w = g.dilation_h = g.dilation_w = 1;
      g.groups = 1;
      check(draw, format, activation, g);
    }
  });
}

TEST_CASE("grouped convolutions") {
  for_each_pair([](Format format, Activation activation) {
    Lcg draw(23);
    for (int64_t groups : {2, 3, 4}) {
      for (int64_t per_group : {1, 2, 5, 16, 33}) {
        const int64_t out_per_group = 1 + draw.below(20) + (per_group == 1 ? 1 : 0);
        check(draw, format, activation,
              random_geometry(draw, groups * per_group, groups * out_per_group, groups));
      }
    }
  });
}

TEST_CASE("depthwise convolutions") {
  for_each_pair([](Format format, Activation activation) {
    Lcg draw(24);
    for (int64_t channels : {2, 15, 16, 17, 31, 32, 33, 48, 64, 65, 80, 130})
      for (int i = 0; i < 2; ++i)
        check(draw, format, activation, random_geometry(draw, channels, channels, channels));
  });
}

TEST_CASE("depthwise convolutions of many taps") {
  // More taps than a group has, and more than a step holds.
  for_each_pair([](Format format, Activation activation) {
    Lcg draw(25);
    Conv2dGeometry g{};
    g.batch = 1;
    g.height = g.width = g.out_height = g.out_width = 5;
    g.channels = g.out_channels = g.groups = 20;
    g.kernel_h = 7;
    g.kernel_w = 11;
    g.pad_top = 3;
    g.pad_left = 5;
    g.stride_h = g.stride_w = g.dilation_h = g.dilation_w = 1;
    for (int i = 0; i < 4; ++i) check(draw, format, activation, g);
  });
}

TEST_CASE("depthwise kernels of thousands of taps") {
  for (const Activation activation : {Activation::int8, Activation::int16}) {
    Lcg draw(27);
    Conv2dGeometry g{};
    g.batch = 1;
    g.height = g.width = 62;
    g.out_height = g.out_width = 3;
    g.channels = g.out_channels = g.groups = 3;
    g.kernel_h = g.kernel_w = 60;
    g.stride_h = g.stride_w = g.dilation_h = g.dilation_w = 1;
    check(draw, Format::int8, activation, g);
  }
}

TEST_CASE("images large enough for several threads") {
  // A thread is woken for about a million multiply-accumulates.
  constexpr struct {
    int64_t batch, size, channels, out_channels, groups, stride;
  } kSizes[] = {{1, 15, 36, 67, 1, 1},     {3, 19, 40, 33, 1, 2}, {2, 13, 66, 64, 2, 1},
                {1, 24, 40, 70, 1, 1},     {3, 35, 36, 66, 1, 2}, {1, 17, 70, 76, 2, 1},
                {1, 45, 150, 150, 150, 1}, {5, 1, 700, 300, 1, 1}};
  for (const auto& pair : kThreadedPairs) {
    Lcg draw(26);
    for (const auto& size : kSizes) {
      Conv2dGeometry g{};
      g.batch = size.batch;
      g.height = g.width = size.size;
      g.channels = size.channels;
      g.out_channels = size.out_channels;
      g.groups = size.groups;
      g.kernel_h = g.kernel_w = size.size == 1 ? 1 : 3;
      g.pad_top = g.pad_left = g.kernel_h / 2;
      g.stride_h = g.stride_w = size.stride;
      g.dilation_h = g.dilation_w = 1;
      g.out_height = g.out_width = (size.size - 1) / size.stride + 1;
      check(draw, pair.format, pair.activation, g);
    }
  }
}

TEST_CASE("no images") {
  Lcg draw(27);
  Conv2dGeometry g = random_geometry(draw, 5, 6, 1);
  g.batch = 0;
  for_each_pair([&](Format format, Activation activation) { check(draw, format, activation, g); });
}

TEST_CASE("depthwise convolutions of -128 by -128") {
  // The largest sum: in a microkernel of held weights (3x3, 5x5), and of any (7x7); int8 weights
  // of code 0 are -128.
  const Kernel& k = kernel();
  for (const int taps : {3, 5, 7})
    for (const int outputs : {1, 2}) {
      const int quads = (taps + 3) / 4, width = taps + 40, pixels = 41;
      const int places = outputs * taps * quads;
      std::vector<TapField> fields;
      std::vector<int> ends;
      for (int r = 0; r < outputs; ++r)
        for (int x = 0; x < taps; ++x)
          for (int q = 0; q < quads; ++q) {
            for (int j = 0; j < 4; ++j) {
              const int y = 4 * q + j - r, i = y * taps + x;
              if (y < 0 || y >= taps) continue;
              fields.push_back({i / 4 * kVectorBytes, i % 4 * 8, 8, 0, -128, j});
            }
            ends.push_back(static_cast<int>(fields.size()));
          }
      const AlignedBytes packed((taps * taps + 3) / 4 * kVectorBytes);
      AlignedBytes weights(places * k.column_bytes);
      AlignedBytes columns(width * quads * k.column_bytes);
      std::vector<int32_t> seed(kPanel), sums(static_cast<size_t>(pixels * k.nr));
      k.spread(packed.data(), 0, 1, {places, fields.data(), ends.data(), places / outputs},
               reinterpret_cast<int8_t*>(weights.data()), 0, seed.data());
      const std::vector<int8_t> row(static_cast<size_t>(width * kPanel), -128);
      const std::vector<const int8_t*> rows(static_cast<size_t>(4 * quads), row.data());
      const std::vector<float> ones(kPanel, 1.0f), zeros(kPanel);
      std::vector<float> y(static_cast<size_t>(outputs * pixels * kPanel));
      DepthwiseTile t{};
      t.rows = rows.data();
      t.width = width;
      t.pitch = kPanel;
      t.quads = quads;
      t.taps = taps;
      t.dilation = t.stride = 1;
      t.pixels = pixels;
      t.outputs = outputs;
      t.panels = 1;
      t.w = reinterpret_cast<const int8_t*>(weights.data());
      t.seed = seed.data();
      t.columns = columns.data();
      t.scale = ones.data();
      t.bias = zeros.data();
      t.y = y.data();
      t.y_pitch = kPanel;
      t.y_row = pixels * kPanel;
      k.depthwise(t);
      const int expected = taps * taps * 128 * 128;
      for (const float value : y) REQUIRE(value == static_cast<float>(expected));
      if (outputs == 2) continue;
      t.acc = sums.data();
      k.depthwise(t);
      for (int i = 0; i < pixels; ++i)
        for (int c = 0; c < kPanel; ++c)
          REQUIRE(sums[static_cast<size_t>(i * k.nr + c)] == expected);
    }
}
