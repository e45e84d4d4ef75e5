#include "code_steps.h"

#include <algorithm>
#include <cstring>

#include "activations.h"

namespace lowbit {
namespace {

// Floats on their way to codes stay in the first cache.
constexpr int64_t kRun = 1024;
constexpr int64_t kRowsAhead = 3;

// What all of them have in common: rows of `to` are shared.
class CodeStep : public Executor {
 public:
  CodeStep(const Kernel& kernel, const StepPlan& plan)
      : kernel_(kernel), plan_(plan), step_(plan.step), to_(plan.to_map) {}

  // A byte moved counts as eight multiply-accumulates.
  int64_t work() const override { return to_.height * to_.width * to_.channels * 8; }

  void run(const Frame& frame, int thread, int team) const override {
    fill_border(to_, frame.arena, thread, team);
    const Range rows = part(to_.height, thread, team);
    for (int64_t y = rows.begin; y < rows.end; ++y) row(frame, y);
  }

 protected:
  virtual void row(const Frame& frame, int64_t y) const = 0;

  const CodeMap& from(size_t i = 0) const { return plan_.from_maps[i]; }
  const CodeValue& value(size_t i = 0) const { return plan_.from[i]; }

  // make(x, channel, count, floats) computes what pixel x of row y has from a channel on.
  template <class Make>
  void put_row(const Frame& frame, const Requantize& how, int64_t y, Make make) const {
    float floats[kRun];
    for (int64_t x = 0; x < to_.width; ++x) {
      int8_t* const q = to_.pixel(frame.arena, y, x);
      for (int64_t c = 0; c < to_.channels; c += kRun) {
        const int64_t count = std::min(kRun, to_.channels - c);
        make(x, c, count, floats);
        kernel_.requantize(how, 1, count, c, floats, count, nullptr, &q);
      }
    }
  }

  const Kernel& kernel_;
  const StepPlan plan_;
  const Step step_;
  const CodeMap to_;
};

class Quantize : public CodeStep {
 public:
  Quantize(const Kernel& kernel, const StepPlan& plan)
      : CodeStep(kernel, plan), inverse_(1.0f / plan.to.scale) {}

 protected:
  void row(const Frame& frame, int64_t y) const override {
    const FloatImages& input = frame.inputs[step_.port];
    const int64_t pixels = to_.height * to_.width;
    const float* const x = input.data + frame.image * pixels * to_.channels;
    uint32_t largest = 0;
    if (input.channels_last || pixels == 1 || to_.channels == 1)
      largest = dense_row(frame, x + y * to_.width * to_.channels, y);
    else
      largest = planes_row(frame, x + y * to_.width, pixels, y);
    if (largest >= kInfinityBits) frame.not_finite->store(true, std::memory_order_relaxed);
  }

 private:
  uint32_t codes(const float* x, int64_t n, int8_t* q) const {
    return kernel_.saturate8(x, n, inverse_, to_.zero, q);
  }

  uint32_t dense_row(const Frame& frame, const float* x, int64_t y) const {
    int8_t* q = to_.pixel(frame.arena, y, 0);
    // Inputs come from far away: some rows ahead they are fetched.
    const int64_t floats = to_.width * to_.channels;
    if (y + kRowsAhead < to_.height)
      for (int64_t i = 0; i < floats; i += kVectorBytes / 4)
        __builtin_prefetch(x + kRowsAhead * floats + i);
    if (to_.pitch == to_.channels) return codes(x, to_.width * to_.channels, q);
    uint32_t largest = 0;
    for (int64_t i = 0; i < to_.width; ++i, q += to_.pitch, x += to_.channels)
      largest = std::max(largest, codes(x, to_.channels, q));
    return largest;
  }

  uint32_t planes_row(const Frame& frame, const float* x, int64_t plane, int64_t y) const {
    constexpr int64_t kPixels = 64, kChannels = 64;
    const PlaneCodes how{inverse_, to_.zero, true};
    int8_t* to[kPixels];
    uint32_t largest = 0;
    for (int64_t at = 0; at < to_.width; at += kPixels) {
      const int64_t count = std::min(kPixels, to_.width - at);
      for (int64_t i = 0; i < count; ++i) to[i] = to_.pixel(frame.arena, y, at + i);
      // What is written behind the channels is written again, by those before: from the last ones
      // on.
      for (int64_t c = (to_.channels - 1) / kChannels * kChannels; c >= 0; c -= kChannels) {
        const int channels = static_cast<int>(std::min(kChannels, to_.channels - c));
        largest = std::max(
            largest, kernel_.encode_planes(how, x + c * plane + at, plane, static_cast<int>(count),
                                           channels, channels, to, c));
      }
    }
    return largest;
  }

  const float inverse_;
};

class Dequantize : public CodeStep {
 public:
  Dequantize(const Kernel& kernel, const StepPlan& plan) : CodeStep(kernel, plan) {}

  int64_t work() const override { return from().height * from().width * from().channels * 8; }

  void run(const Frame& frame, int thread, int team) const override {
    const Range rows = part(from().height, thread, team);
    for (int64_t y = rows.begin; y < rows.end; ++y) row(frame, y);
  }

 protected:
  void row(const Frame& frame, int64_t y) const override {
    static thread_local Scratch scratch;
    const int64_t channels = from().channels, width = from().width;
    float* floats;
    scratch.cut(piece(floats, width * channels));
    for (int64_t x = 0; x < width; ++x)
      kernel_.dequantize(channels, from().pixel(frame.arena, y, x), value().zero, value().scale,
                         floats + x * channels);
    put_floats(kernel_, frame, step_.port, from().height * width, channels, y * width, width,
               floats);
  }
};

class Add : public CodeStep {
 public:
  Add(const Kernel& kernel, const StepPlan& plan)
      : CodeStep(kernel, plan), how_(requantize_to(plan.to, plan.step.weights.epilogue)) {}

 protected:
  void row(const Frame& frame, int64_t y) const override {
    put_row(frame, how_, y, [&](int64_t x, int64_t c, int64_t count, float* floats) {
      kernel_.add_codes(count, from(0).pixel(frame.arena, y, x) + c, value(0).zero, value(0).scale,
                        from(1).pixel(frame.arena, y, x) + c, value(1).zero, value(1).scale,
                        floats);
    });
  }

 private:
  const Requantize how_;
};

class Mul : public CodeStep {
 public:
  Mul(const Kernel& kernel, const StepPlan& plan)
      : CodeStep(kernel, plan), how_(requantize_to(plan.to, Epilogue::none)) {}

 protected:
  void row(const Frame& frame, int64_t y) const override {
    const bool one = from(1).height == 1 && from(1).width == 1;
    put_row(frame, how_, y, [&](int64_t x, int64_t c, int64_t count, float* floats) {
      const int8_t* const b = from(1).pixel(frame.arena, one ? 0 : y, one ? 0 : x) + c;
      kernel_.multiply_codes(count, from(0).pixel(frame.arena, y, x) + c, value(0).zero, b,
                             value(1).zero, value(0).scale * value(1).scale, floats);
    });
  }

 private:
  const Requantize how_;
};

class Concat : public CodeStep {
 public:
  Concat(const Kernel& kernel, const StepPlan& plan) : CodeStep(kernel, plan) {
    for (const CodeValue& v : plan.from)
      tables_.push_back(v.scale == plan.to.scale && v.zero == plan.to.zero
                            ? std::vector<int8_t>{}
                            : conversion_table(kernel, v, plan.to));
  }

 protected:
  void row(const Frame& frame, int64_t y) const override {
    int64_t c = 0;
    for (size_t i = 0; i < tables_.size(); ++i) {
      const int64_t channels = from(i).channels;
      for (int64_t x = 0; x < to_.width; ++x) {
        const int8_t* const a = from(i).pixel(frame.arena, y, x);
        int8_t* const q = to_.pixel(frame.arena, y, x) + c;
        if (tables_[i].empty())
          std::copy_n(a, channels, q);
        else
          kernel_.lookup(channels, a, tables_[i].data(), q);
      }
      c += channels;
    }
  }

 private:
  std::vector<std::vector<int8_t>> tables_;
};

class Lut : public CodeStep {
 public:
  Lut(const Kernel& kernel, const StepPlan& plan) : CodeStep(kernel, plan) {}

 protected:
  void row(const Frame& frame, int64_t y) const override {
    const bool rows = from().pitch == to_.pitch;
    const int64_t n = rows ? to_.width * to_.pitch : to_.channels;
    for (int64_t x = 0; x < (rows ? 1 : to_.width); ++x)
      kernel_.lookup(n, from().pixel(frame.arena, y, x), step_.table.data(),
                     to_.pixel(frame.arena, y, x));
  }
};

class Pad : public CodeStep {
 public:
  Pad(const Kernel& kernel, const StepPlan& plan) : CodeStep(kernel, plan) {}

 protected:
  void row(const Frame& frame, int64_t y) const override {
    const int64_t in = y - step_.top;
    for (int64_t x = 0; x < to_.width; ++x) {
      int8_t* const q = to_.pixel(frame.arena, y, x);
      const int64_t at = x - step_.left;
      if (in >= 0 && in < from().height && at >= 0 && at < from().width)
        std::copy_n(from().pixel(frame.arena, in, at), to_.channels, q);
      else
        std::memset(q, step_.code, static_cast<size_t>(to_.channels));
    }
  }
};

class Resize : public CodeStep {
 public:
  Resize(const Kernel& kernel, const StepPlan& plan) : CodeStep(kernel, plan) {}

 protected:
  void row(const Frame& frame, int64_t y) const override {
    const int64_t in = y * from().height / to_.height;
    for (int64_t x = 0; x < to_.width; ++x)
      std::copy_n(from().pixel(frame.arena, in, x * from().width / to_.width), to_.channels,
                  to_.pixel(frame.arena, y, x));
  }
};

// Dense NHWC codes under other sizes.
class View : public CodeStep {
 public:
  View(const Kernel& kernel, const StepPlan& plan) : CodeStep(kernel, plan) {}

 protected:
  void row(const Frame& frame, int64_t y) const override {
    const CodeMap& m = from();
    int64_t at = y * to_.width * to_.channels;
    for (int64_t x = 0; x < to_.width; ++x) {
      int8_t* const q = to_.pixel(frame.arena, y, x);
      for (int64_t c = 0; c < to_.channels;) {
        const int64_t pixel = at / m.channels, channel = at % m.channels;
        const int64_t n = std::min(to_.channels - c, m.channels - channel);
        std::copy_n(m.pixel(frame.arena, pixel / m.width, pixel % m.width) + channel, n, q + c);
        c += n, at += n;
      }
    }
  }
};

}  // namespace

std::vector<int8_t> conversion_table(const Kernel& kernel, const CodeValue& from,
                                     const CodeValue& to) {
  std::vector<int8_t> table(256);
  for (int i = 0; i < 256; ++i) table[static_cast<size_t>(i)] = static_cast<int8_t>(i);
  float floats[256];
  kernel.dequantize(256, table.data(), from.zero, from.scale, floats);
  kernel.saturate8(floats, 256, 1.0f / to.scale, to.zero, table.data());
  return table;
}

std::unique_ptr<Executor> make_code_step(const Kernel& kernel, const StepPlan& plan) {
  switch (plan.step.op) {
    case StepOp::quantize:
      return std::make_unique<Quantize>(kernel, plan);
    case StepOp::dequantize:
      return std::make_unique<Dequantize>(kernel, plan);
    case StepOp::add:
      return std::make_unique<Add>(kernel, plan);
    case StepOp::mul:
      return std::make_unique<Mul>(kernel, plan);
    case StepOp::concat:
      return std::make_unique<Concat>(kernel, plan);
    case StepOp::lut:
      return std::make_unique<Lut>(kernel, plan);
    case StepOp::pad:
      return std::make_unique<Pad>(kernel, plan);
    case StepOp::resize:
      return std::make_unique<Resize>(kernel, plan);
    default:
      return std::make_unique<View>(kernel, plan);
  }
}

}  // namespace lowbit
