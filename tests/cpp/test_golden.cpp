// The outputs' bits of tests/golden.txt, on this platform. tests/golden.py says what the lines mean
// and wrote them; the operands are drawn here as there.
#include <doctest/doctest.h>

#include <cstdio>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "operands.h"

using namespace lowbit;
using namespace lowbit::test;

namespace {

struct Case {
  std::string op;
  Format format;
  Activation activation;
  int64_t group_size;
  bool zeros;
  std::vector<int64_t> dims;
  std::string digest;
};

Case parse(const std::string& line) {
  std::istringstream in(line);
  std::string op, format, activation, field;
  Case c{};
  in >> c.op >> format >> activation >> c.group_size >> c.zeros;
  int f = 0, a = 0;
  while (f < kFormatCount && format != kFormats[f].name) ++f;
  while (a < kActivationCount && activation != kActivations[a]) ++a;
  std::vector<std::string> fields;
  while (in >> field) fields.push_back(field);
  if (f == kFormatCount || a == kActivationCount || fields.size() < 4)
    throw std::runtime_error("golden.txt: " + line);
  c.format = static_cast<Format>(f);
  c.activation = static_cast<Activation>(a);
  c.digest = fields.back();
  fields.pop_back();
  for (const std::string& s : fields) c.dims.push_back(std::stoll(s));
  return c;
}

std::string fnv1a(const std::vector<float>& y) {
  uint64_t h = 0xCBF29CE484222325u;
  for (float value : y) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    for (int byte = 0; byte < 4; ++byte) h = (h ^ (bits >> (8 * byte) & 0xff)) * 0x100000001B3u;
  }
  char text[17];
  std::snprintf(text, sizeof(text), "%016llx", static_cast<unsigned long long>(h));
  return text;
}

template <class T, class Make>
std::vector<T> draw_all(int64_t count, Make make) {
  std::vector<T> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(static_cast<T>(make()));
  return values;
}

Conv2dGeometry geometry(const std::vector<int64_t>& d) {
  Conv2dGeometry g{};
  g.batch = d[0], g.height = d[1], g.width = d[2], g.channels = d[3], g.out_channels = d[4];
  g.kernel_h = g.kernel_w = d[5];
  g.stride_h = g.stride_w = d[6];
  g.pad_top = g.pad_left = d[7];
  g.dilation_h = g.dilation_w = d[8];
  g.groups = d[9];
  const int64_t extent = g.dilation_h * (g.kernel_h - 1) + 1;
  g.out_height = (g.height + 2 * g.pad_top - extent) / g.stride_h + 1;
  g.out_width = (g.width + 2 * g.pad_left - extent) / g.stride_w + 1;
  return g;
}

// [n, used] to [n, width] per row of taps: the padding of tap_channels.
std::vector<uint8_t> pad_taps(const std::vector<uint8_t>& codes, int64_t used, int64_t width) {
  std::vector<uint8_t> out;
  for (size_t i = 0; i < codes.size(); i += static_cast<size_t>(used)) {
    out.insert(out.end(), codes.begin() + static_cast<ptrdiff_t>(i),
               codes.begin() + static_cast<ptrdiff_t>(i) + used);
    out.resize(out.size() + static_cast<size_t>(width - used));
  }
  return out;
}

// [n, groups] to panels of 16 channels: [panels, groups, 16]; each block has panels of its own.
std::vector<uint16_t> in_panels(const std::vector<uint16_t>& values, int64_t n, int64_t groups,
                                int64_t blocks) {
  const int64_t rows = n / blocks, panels = packed_panels(rows);
  std::vector<uint16_t> out(static_cast<size_t>(blocks * panels * groups * kPanel));
  for (int64_t c = 0; c < n; ++c)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = c / rows * panels * kPanel + c % rows;  // the channel, padding counted
      out[static_cast<size_t>((at / kPanel * groups + g) * kPanel + at % kPanel)] =
          values[static_cast<size_t>(c * groups + g)];
    }
  return out;
}

std::string run(const Case& c, int threads) {
  Lcg draw(1);
  const bool is_linear = c.op == "linear";
  const Conv2dGeometry g = is_linear ? Conv2dGeometry{} : geometry(c.dims);
  const int64_t n = is_linear ? c.dims[1] : g.out_channels;
  const int64_t taps = is_linear ? 1 : g.kernel_h * g.kernel_w;
  const int64_t used = is_linear ? c.dims[2] : g.channels / g.groups;
  const int64_t k = is_linear ? used : conv2d_depth(c.format, g);
  const int64_t x_size = is_linear ? c.dims[0] * k : g.batch * g.height * g.width * g.channels;
  const int64_t code_count = int64_t{1} << traits(c.format).bits;

  const auto x =
      draw_all<float>(x_size, [&] { return static_cast<float>(draw.below(4001) - 2000) / 256.0f; });
  const auto drawn = draw_all<uint8_t>(n * taps * used, [&] { return draw.below(code_count); });
  const std::vector<uint8_t> codes = pad_taps(drawn, used, k / taps);
  const auto scale =
      draw_all<float>(n, [&] { return static_cast<float>(draw.below(255) + 1) / 4096.0f; });
  const int64_t groups = c.group_size ? (k + c.group_size - 1) / c.group_size : 0;
  const int64_t blocks = is_linear ? 1 : g.blocks();
  const auto group_scale = in_panels(
      draw_all<uint16_t>(n * groups, [&] { return draw.below(2048) + 0x3400; }), n, groups, blocks);
  const int64_t zeros = c.zeros ? groups : 0;
  const auto group_zero = in_panels(
      draw_all<uint16_t>(n * zeros, [&] { return draw.below(2048) + 0xBC00; }), n, zeros, blocks);
  const auto bias =
      draw_all<float>(n, [&] { return static_cast<float>(draw.below(513) - 256) / 128.0f; });

  const int64_t rows = n / blocks;
  const int64_t bytes = packed_panels(rows) * packed_steps(c.format, k) * kVectorBytes;
  std::vector<uint8_t> packed(static_cast<size_t>(blocks * bytes));
  for (int64_t i = 0; i < blocks; ++i)
    pack(codes.data() + i * rows * k, rows, k, c.format, packed.data() + i * bytes);
  const Weights weights{c.format,
                        n,
                        k,
                        c.group_size,
                        packed.data(),
                        scale.data(),
                        group_scale.empty() ? nullptr : group_scale.data(),
                        group_zero.empty() ? nullptr : group_zero.data(),
                        bias.data()};
  std::vector<float> y(
      static_cast<size_t>(is_linear ? c.dims[0] * n : g.batch * g.out_height * g.out_width * n));
  if (is_linear)
    linear(x.data(), c.dims[0], weights, c.activation, y.data(), threads);
  else
    conv2d(x.data(), g, weights, c.activation, y.data(), threads);
  return fnv1a(y);
}

}  // namespace

TEST_CASE("golden outputs") {
  std::ifstream file(LOWBIT_GOLDEN_TXT);
  int cases = 0;
  for (std::string line; std::getline(file, line); ++cases) {
    const Case c = parse(line);
    for (int threads : {1, 3}) {
      CAPTURE(line);
      CAPTURE(threads);
      CHECK(run(c, threads) == c.digest);
    }
  }
  CHECK(cases >= 100);
}
