// Operands of a layer for the tests, and the comparison of outputs.
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "guard_page.h"
#include "lowbit.h"

namespace lowbit::test {

// Numerical Recipes' 32-bit generator; the same one as in tests/golden.py.
class Lcg {
 public:
  explicit Lcg(uint32_t seed) : state_(seed) {}

  int64_t below(int64_t bound) {
    state_ = state_ * 1664525u + 1013904223u;
    return static_cast<int64_t>(state_ >> 16) % bound;
  }
  bool one_in(int64_t n) { return below(n) == 0; }
  template <class T, size_t N>
  const T& pick(const T (&values)[N]) {
    return values[below(N)];
  }

 private:
  uint32_t state_;
};

// Zeros on a boundary of 64 bytes.
class AlignedBytes {
 public:
  explicit AlignedBytes(int64_t count) : lines_(static_cast<size_t>(count / 64 + 1)) {}
  uint8_t* data() { return lines_.data()->bytes; }
  const uint8_t* data() const { return lines_.data()->bytes; }

 private:
  struct alignas(64) Line {
    uint8_t bytes[64];
  };
  std::vector<Line> lines_;
};

enum class Codes { kUniform, kLowest, kHighest, kExtreme };
inline constexpr Codes kAllCodes[] = {Codes::kUniform, Codes::kUniform, Codes::kLowest,
                                      Codes::kHighest, Codes::kExtreme};

// What x looks like; each stresses one step of quantizing it.
enum class Values {
  kUniform,    // ordinary
  kExtreme,    // +amax or -amax: the largest codes
  kSameSign,   // +amax: the largest sums
  kTies,       // half-way between two codes
  kWide,       // many orders of magnitude: the order of float sums shows
  kSubnormal,  // scale below the smallest normal number: a zero row
  kHuge,       // close to the largest float
  kNotFinite,  // some NaN and infinities
  kSomeZeros,  // zeros of both signs
};
inline constexpr Values kAllValues[] = {
    Values::kUniform, Values::kUniform,   Values::kExtreme, Values::kSameSign,  Values::kTies,
    Values::kWide,    Values::kSubnormal, Values::kHuge,    Values::kNotFinite, Values::kSomeZeros};

inline std::vector<uint8_t> make_codes(Lcg& draw, Format format, int64_t count, Codes kind) {
  const int64_t max = (int64_t{1} << traits(format).bits) - 1;
  std::vector<uint8_t> codes(static_cast<size_t>(count));
  for (uint8_t& code : codes) {
    switch (kind) {
      case Codes::kUniform:
        code = static_cast<uint8_t>(draw.below(max + 1));
        break;
      case Codes::kLowest:
        code = 0;
        break;
      case Codes::kHighest:
        code = static_cast<uint8_t>(max);
        break;
      case Codes::kExtreme:
        code = static_cast<uint8_t>(draw.one_in(2) ? max : 0);
        break;
    }
  }
  return codes;
}

inline float make_value(Lcg& draw, Activation activation, Values kind) {
  const float q = activation == Activation::int16 ? 32639.0f : 127.0f;
  const float sign = draw.one_in(2) ? -1.0f : 1.0f;
  const float uniform = static_cast<float>(draw.below(65536)) / 65536.0f;
  switch (kind) {
    case Values::kUniform:
      return sign * uniform * 3.0f;
    case Values::kExtreme:
      return sign * 1.7f;
    case Values::kSameSign:
      return 1.7f;
    // With amax = Q the scale is 1, and the codes are x rounded: x.5 is a tie.
    case Values::kTies:
      return draw.one_in(4)
                 ? sign * q
                 : sign * (static_cast<float>(draw.below(static_cast<int64_t>(q))) + 0.5f);
    case Values::kWide:
      return sign * (1.0f + uniform) / static_cast<float>(int64_t{1} << draw.below(40));
    case Values::kSubnormal:
      return sign * uniform * 1e-38f;
    case Values::kHuge:
      return sign * (0.5f + uniform / 2) * 3.4e38f;
    case Values::kNotFinite:
      if (draw.one_in(12)) return draw.one_in(2) ? sign * __builtin_inff() : __builtin_nanf("");
      return sign * uniform;
    case Values::kSomeZeros:
      return draw.one_in(2) ? sign * 0.0f : sign * uniform;
  }
  return 0.0f;
}

// `rows` rows of `length`, each of a kind of its own, some of them zero.
inline std::vector<float> make_rows(Lcg& draw, Activation activation, int64_t rows,
                                    int64_t length) {
  std::vector<float> x(static_cast<size_t>(rows * length));
  for (int64_t r = 0; r < rows; ++r) {
    const Values kind = draw.pick(kAllValues);
    const bool zero = draw.one_in(12);
    for (int64_t i = 0; i < length; ++i)
      x[static_cast<size_t>(r * length + i)] = zero ? 0.0f : make_value(draw, activation, kind);
  }
  return x;
}

// Static parameters, none of them half the time. With a scale of 1, `Values::kTies` are ties.
inline std::optional<StaticActivation> make_fixed(Lcg& draw, Activation activation) {
  constexpr float kScales[] = {0.0234f, 0.0234f, 1.0f, 0.00003f, 0x1p-126f, 0x1p126f, 3e30f};
  constexpr int kZeros[] = {0, -128, 127, -1, 3};
  const bool fixed = draw.one_in(2);
  const StaticActivation drawn{draw.pick(kScales),
                               activation == Activation::int8 ? draw.pick(kZeros) : 0};
  return fixed ? std::optional(drawn) : std::nullopt;
}

inline constexpr Epilogue kAllEpilogues[] = {Epilogue::none, Epilogue::relu, Epilogue::relu6,
                                             Epilogue::hardswish};

struct Groups {
  int64_t size = 0;  // 0: none
  bool zeros = false;
};
inline constexpr Groups kAllGroups[] = {{0, false}, {0, false},  {32, false}, {32, true},
                                        {64, true}, {96, false}, {128, true}};

// The weights of a layer, each tensor against a guard page.
class GuardedWeights {
 public:
  // `codes` has n / conv_groups rows for each conv group; they are packed one group by one.
  GuardedWeights(Lcg& draw, Format format, int64_t n, int64_t k, const std::vector<uint8_t>& codes,
                 Groups groups, bool bias, Edge edge, int64_t conv_groups = 1)
      : packed_(static_cast<size_t>(conv_groups * group_bytes(format, n / conv_groups, k)), edge),
        scale_(floats(draw, n), edge),
        group_scale_(halves(draw, groups.size ? group_values(n, k, groups, conv_groups) : 0), edge),
        group_zero_(halves(draw, groups.zeros ? group_values(n, k, groups, conv_groups) : 0), edge),
        bias_(floats(draw, bias ? n : 0), edge),
        weights_{format,
                 n,
                 k,
                 groups.size,
                 packed_.data(),
                 scale_.data(),
                 group_scale_.data_or_null(),
                 group_zero_.data_or_null(),
                 bias_.data_or_null(),
                 Epilogue::none} {
    const int64_t rows = n / conv_groups;
    for (int64_t g = 0; g < conv_groups; ++g)
      pack(codes.data() + g * rows * k, rows, k, format,
           packed_.data() + g * group_bytes(format, rows, k));
  }

  const Weights& get() const { return weights_; }
  void set(Epilogue epilogue) { weights_.epilogue = epilogue; }

 private:
  // In panels; what pads these may be anything.
  static int64_t group_values(int64_t n, int64_t k, Groups groups, int64_t conv_groups) {
    const int64_t panels = conv_groups * packed_panels(n / conv_groups);
    return panels * ((k + groups.size - 1) / groups.size) * kPanel;
  }

  static int64_t group_bytes(Format format, int64_t rows, int64_t k) {
    return packed_panels(rows) * packed_steps(format, k) * kVectorBytes;
  }

  static std::vector<float> floats(Lcg& draw, int64_t count) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float& v : values) v = make_value(draw, Activation::int8, Values::kWide);
    return values;
  }

  static std::vector<uint16_t> halves(Lcg& draw, int64_t count) {
    std::vector<uint16_t> values(static_cast<size_t>(count));
    for (uint16_t& v : values)  // either sign, subnormal to 4
      v = static_cast<uint16_t>(draw.below(0x4400) | draw.below(2) << 15);
    return values;
  }

  GuardedBuffer<uint8_t> packed_;
  GuardedBuffer<float> scale_;
  GuardedBuffer<uint16_t> group_scale_, group_zero_;
  GuardedBuffer<float> bias_;
  Weights weights_;
};

// Empty where y equals expected bit for bit (any NaN equals any NaN), else the first difference.
inline std::string difference(const float* y, const float* expected, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (y[i] != y[i] && expected[i] != expected[i]) continue;
    if (std::memcmp(&y[i], &expected[i], sizeof(float)) == 0) continue;
    std::ostringstream s;
    s.precision(9);
    s << "y[" << i << "] of " << count << " is " << y[i] << ", not " << expected[i];
    return s.str();
  }
  return {};
}

inline std::string name(Format format, Activation activation) {
  return std::string(traits(format).name) + " weights, " +
         kActivations[static_cast<int>(activation)] + " activations, ";
}

inline std::string name(const std::optional<StaticActivation>& fixed) {
  if (!fixed) return "dynamic";
  std::ostringstream s;
  s << "static " << fixed->scale << ", zero " << fixed->zero;
  return s.str();
}

inline std::string name(Epilogue epilogue) {
  return std::string("epilogue ") + kEpilogues[static_cast<int>(epilogue)];
}

// Calls test(format, activation) for every pair.
template <class Test>
void for_each_pair(Test test) {
  for (int f = 0; f < kFormatCount; ++f)
    for (int a = 0; a < kActivationCount; ++a)
      test(static_cast<Format>(f), static_cast<Activation>(a));
}

// For sizes that several threads share: threads know nothing of formats, but of these kinds.
inline constexpr struct {
  Format format;
  Activation activation;
} kThreadedPairs[] = {{Format::int8, Activation::int8},
                      {Format::int4, Activation::int16},
                      {Format::ternary, Activation::binary},
                      {Format::binary, Activation::binary}};

}  // namespace lowbit::test
