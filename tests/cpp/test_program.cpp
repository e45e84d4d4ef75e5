// A program equals its layers run one by one by the naive reference, with floats between them.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "operands.h"
#include "program.h"
#include "reference.h"

using namespace lowbit;
using namespace lowbit::test;

namespace {

using Floats = std::vector<float>;

// What a value's codes mean, of floats.
Floats through_codes(const Floats& x, const CodeValue& v) {
  Floats y(x.size());
  const float inverse = 1.0f / v.scale;
  for (size_t i = 0; i < x.size(); ++i) {
    const float code = std::nearbyint(x[i] * inverse) + static_cast<float>(v.zero);
    y[i] = (std::clamp(code, -128.0f, 127.0f) - static_cast<float>(v.zero)) * v.scale;
  }
  return y;
}

CodeValue value_of(Lcg& draw, int64_t channels, int64_t height, int64_t width, float largest) {
  const auto zero = static_cast<int>(draw.below(256)) - 128;
  return {channels, height, width, std::max(largest, 1e-20f) / 100.0f, zero};
}

float largest_of(const Floats& x) {
  float m = 0;
  for (float v : x) m = std::max(m, std::fabs(v));
  return m;
}

// A program as it grows, and what its values mean by the reference.
struct Network {
  explicit Network(uint32_t seed) : draw(seed) {}

  int add_value(const CodeValue& v, const Floats& floats) {
    values.push_back(v);
    means.push_back(through_codes(floats, v));
    return static_cast<int>(values.size()) - 1;
  }

  int input(int64_t channels, int64_t height, int64_t width) {
    x.resize(static_cast<size_t>(channels * height * width));
    for (float& v : x) v = make_value(draw, Activation::int8, Values::kUniform);
    Step step;
    step.op = StepOp::quantize;
    step.port = 0;
    step.to = add_value(value_of(draw, channels, height, width, 3.0f), x);
    steps.push_back(step);
    return step.to;
  }

  int conv(int from, int64_t out_channels, int64_t kernel, int64_t stride, int64_t groups,
           Format format, Epilogue epilogue, int residual = -1) {
    const CodeValue v = values[static_cast<size_t>(from)];
    Conv2dGeometry g{};
    g.batch = 1;
    g.height = v.height, g.width = v.width, g.channels = v.channels;
    g.out_channels = out_channels;
    g.kernel_h = g.kernel_w = kernel;
    g.stride_h = g.stride_w = stride;
    g.pad_top = g.pad_left = kernel / 2;
    g.dilation_h = g.dilation_w = 1;
    g.groups = groups;
    g.out_height = (v.height + 2 * g.pad_top - kernel) / stride + 1;
    g.out_width = (v.width + 2 * g.pad_left - kernel) / stride + 1;
    const int64_t k = conv2d_depth(format, g), per_tap = k / (kernel * kernel);
    std::vector<uint8_t> codes = make_codes(draw, format, out_channels * k, draw.pick(kAllCodes));
    for (size_t i = 0; i < codes.size(); ++i)
      if (static_cast<int64_t>(i) % per_tap >= v.channels / groups) codes[i] = 0;
    weights.push_back(std::make_unique<GuardedWeights>(draw, format, out_channels, k, codes,
                                                       draw.pick(kAllGroups), draw.one_in(2),
                                                       Edge::kEnd, g.blocks()));
    const Floats& in = means[static_cast<size_t>(from)];
    Floats y(static_cast<size_t>(g.out_height * g.out_width * out_channels));
    const StaticActivation fixed{v.scale, v.zero};
    reference::conv2d(in.data(), g, weights.back()->get(), Activation::int8, y.data(), &fixed);
    for (size_t i = 0; i < y.size() && residual >= 0; ++i)
      y[i] += means[static_cast<size_t>(residual)][i];
    for (float& v1 : y) v1 = activate(epilogue, v1);

    Step step;
    step.op = StepOp::conv;
    step.from = {from};
    step.geometry = g;
    step.weights = weights.back()->get();
    step.weights.epilogue = epilogue;
    step.residual = residual;
    step.to = add_value(value_of(draw, out_channels, g.out_height, g.out_width, largest_of(y)), y);
    steps.push_back(step);
    return step.to;
  }

  static float activate(Epilogue epilogue, float v) {
    const auto relu6 = [](float t) { return std::min(std::max(t, 0.0f), 6.0f); };
    if (epilogue == Epilogue::relu) return std::max(v, 0.0f);
    if (epilogue == Epilogue::relu6) return relu6(v);
    if (epilogue == Epilogue::hardswish) return v * relu6(v + 3.0f) / 6.0f;
    return v;
  }

  int global_mean(int from) {
    const CodeValue v = values[static_cast<size_t>(from)];
    Floats y(static_cast<size_t>(v.channels));
    for (int64_t c = 0; c < v.channels; ++c) {
      int64_t sum = 0;
      for (int64_t i = 0; i < v.height * v.width; ++i)
        sum += std::llround(
            means[static_cast<size_t>(from)][static_cast<size_t>(i * v.channels + c)] / v.scale);
      y[static_cast<size_t>(c)] =
          static_cast<float>(sum) * v.scale / static_cast<float>(v.height * v.width);
    }
    Step step;
    step.op = StepOp::adaptive_avg_pool;
    step.from = {from};
    step.to = add_value(value_of(draw, v.channels, 1, 1, largest_of(y)), y);
    steps.push_back(step);
    return step.to;
  }

  void check(int from, const std::string& what) {
    Step step;
    step.op = StepOp::dequantize;
    step.from = {from};
    step.port = 0;
    steps.push_back(step);
    const Floats& expected = means[static_cast<size_t>(from)];
    const GuardedBuffer<float> in(x, Edge::kEnd);
    const Program program(values, steps);
    for (int threads : {1, 2, 3}) {
      GuardedBuffer<float> out(expected.size(), Edge::kEnd);
      const FloatImages input{const_cast<float*>(in.data()), true}, output{out.data(), true};
      program.run(&input, &output, 1, threads);
      const std::string problem = difference(out.data(), expected.data(), expected.size());
      CHECK_MESSAGE(problem.empty(), what << ", threads " << threads << ": " << problem);
      CHECK_MESSAGE(out.intact(), what << ", threads " << threads << ": wrote outside of y");
    }
    steps.pop_back();
  }

  Lcg draw;
  std::vector<CodeValue> values;
  std::vector<Step> steps;
  std::vector<Floats> means;
  std::vector<std::unique_ptr<GuardedWeights>> weights;
  Floats x;
};

}  // namespace

TEST_CASE("chains of convolutions") {
  for (int f = 0; f < kFormatCount; ++f)
    for (uint32_t seed = 0; seed < 6; ++seed) {
      const auto format = static_cast<Format>(f);
      Network net(100 + seed);
      Lcg draw(200 + seed);
      int v = net.input(1 + draw.below(20), 3 + draw.below(9), 3 + draw.below(9));
      v = net.conv(v, 4 * (1 + draw.below(12)), 3, 1, 1, format, draw.pick(kAllEpilogues));
      const int64_t c = net.values[static_cast<size_t>(v)].channels;
      const int before = v;
      v = net.conv(v, c, 3, 1, c, format, draw.pick(kAllEpilogues));
      v = net.conv(v, c, 1, 1, 1, format, draw.pick(kAllEpilogues), before);
      v = net.conv(v, c, 3, 2, c / 4, format, draw.pick(kAllEpilogues));
      v = net.conv(v, 3 * c, 5, 1, 2, format, draw.pick(kAllEpilogues));
      net.check(v, std::string(traits(format).name) + ", seed " + std::to_string(seed));
      net.check(net.global_mean(v), "mean, seed " + std::to_string(seed));
    }
}

TEST_CASE("steps that threads share") {
  Network net(7);
  int v = net.input(32, 24, 24);
  v = net.conv(v, 64, 3, 1, 1, Format::int8, Epilogue::relu6);
  v = net.conv(v, 64, 5, 1, 64, Format::int8, Epilogue::none);
  v = net.conv(v, 64, 3, 1, 16, Format::int4, Epilogue::relu, v);
  v = net.conv(v, 200, 3, 9, 1, Format::int8, Epilogue::relu);
  net.check(v, "shared");
}

TEST_CASE("a step that does not fit its values is refused") {
  Network net(8);
  const int v = net.input(8, 4, 4);
  net.conv(v, 8, 3, 1, 1, Format::int8, Epilogue::none);
  Step out;
  out.op = StepOp::dequantize;
  out.from = {1};
  out.port = 0;
  net.steps.push_back(out);
  CHECK_NOTHROW(Program(net.values, net.steps));
  for (const int64_t size : {int64_t{0}, int64_t{3}, int64_t{1} << 40}) {
    auto values = net.values;
    values[1].height = size;
    CHECK_THROWS_AS(Program(values, net.steps), std::invalid_argument);
    auto steps = net.steps;
    steps[1].geometry.out_width = size;
    CHECK_THROWS_AS(Program(net.values, steps), std::invalid_argument);
    steps = net.steps;
    steps[1].geometry.kernel_h = size == 3 ? 7 : size;
    CHECK_THROWS_AS(Program(net.values, steps), std::invalid_argument);
  }
}
