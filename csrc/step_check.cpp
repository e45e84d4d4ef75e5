// What a program asks of its steps, so that none reads or writes beside its values.
#include <cfloat>
#include <cmath>
#include <stdexcept>
#include <string>

#include "program.h"

namespace lowbit {
namespace {

constexpr int64_t kMostSize = int64_t{1} << 20;
constexpr int64_t kMostBytes = int64_t{1} << 31;
constexpr int64_t kMostPorts = 4096;
// A mean's sum is exact in int32.
constexpr int64_t kMostWindow = int64_t{1} << 22;
constexpr int64_t kMostTable = int64_t{1} << 16, kFarthest = int64_t{1} << 21;

class Check {
 public:
  Check(const std::vector<CodeValue>& values, const std::vector<Step>& steps)
      : values_(values), steps_(steps), made_(values.size(), false) {}

  void run() {
    for (size_t i = 0; i < values_.size(); ++i) check_value(i);
    for (index_ = 0; index_ < steps_.size(); ++index_) check_step(steps_[index_]);
    for (const auto* ports : {&inputs_, &outputs_})
      for (size_t i = 0; i < ports->size(); ++i)
        if (!(*ports)[i].channels)
          throw std::invalid_argument("program: no step has " +
                                      std::string(ports == &inputs_ ? "input " : "output ") +
                                      std::to_string(i));
    if (outputs_.empty()) throw std::invalid_argument("program: there is no output");
  }

 private:
  void require(bool condition, const std::string& what) const {
    if (!condition)
      throw std::invalid_argument("step " + std::to_string(index_) + " (" +
                                  kStepOps[static_cast<int>(steps_[index_].op)] + "): " + what);
  }

  void check_value(size_t i) const {
    const CodeValue& v = values_[i];
    const auto size = [](int64_t n) { return n >= 1 && n <= kMostSize; };
    const std::string name = "value " + std::to_string(i) + ": ";
    if (!size(v.channels) || !size(v.height) || !size(v.width) ||
        v.height * v.width > kMostBytes / v.channels)
      throw std::invalid_argument(name + "sizes must be at least 1, and not absurdly large");
    if (!(v.scale >= FLT_MIN && 1.0f / v.scale >= FLT_MIN && 1.0f / v.scale <= FLT_MAX &&
          v.scale <= FLT_MAX / 256))
      throw std::invalid_argument(name +
                                  "the scale must be a positive normal number, as must its "
                                  "inverse and 256 times it");
    if (v.zero < -128 || v.zero > 127)
      throw std::invalid_argument(name + "the zero point must be one of -128..127");
  }

  const CodeValue& value(int v) const {
    require(v >= 0 && static_cast<size_t>(v) < values_.size(),
            "there is no value " + std::to_string(v));
    return values_[static_cast<size_t>(v)];
  }
  const CodeValue& read(int v) const {
    const CodeValue& out = value(v);
    require(made_[static_cast<size_t>(v)],
            "value " + std::to_string(v) + " is read before it is made");
    return out;
  }

  // The one image of a port: its sizes must be the same wherever it is named.
  void use_port(std::vector<CodeValue>& ports, int64_t port, const CodeValue& image, bool once) {
    require(port >= 0 && port < kMostPorts,
            "input and output numbers are 0.." + std::to_string(kMostPorts - 1));
    if (static_cast<size_t>(port) >= ports.size())
      ports.resize(static_cast<size_t>(port) + 1, CodeValue{0, 0, 0, 1, 0});
    CodeValue& known = ports[static_cast<size_t>(port)];
    if (known.channels) {
      require(!once, "output " + std::to_string(port) + " is written twice");
      require(same_size(known, image),
              "input " + std::to_string(port) + " has another size elsewhere");
    }
    known = image;
  }

  static bool same_size(const CodeValue& a, const CodeValue& b) {
    return a.channels == b.channels && a.height == b.height && a.width == b.width;
  }
  static bool same_codes(const CodeValue& a, const CodeValue& b) {
    return a.scale == b.scale && a.zero == b.zero;
  }

  void check_step(const Step& s) {
    const bool conv = s.op == StepOp::conv;
    const size_t wanted = s.op == StepOp::quantize                     ? 0
                          : s.op == StepOp::add || s.op == StepOp::mul ? 2
                                                                       : 1;
    if (s.op == StepOp::concat)
      require(!s.from.empty(), "nothing to join");
    else
      require(s.from.size() == wanted, "it reads " + std::to_string(wanted) + " values");
    for (int v : s.from) read(v);
    const bool floats = s.op == StepOp::dequantize || (conv && s.to < 0);
    require(floats == (s.to < 0), floats ? "its output is float" : "it needs a value 'to'");
    if (!floats) {
      value(s.to);
      require(!made_[static_cast<size_t>(s.to)],
              "value " + std::to_string(s.to) + " is made twice");
    }
    require(floats || s.op == StepOp::quantize || s.port < 0,
            "it has a value 'to' and an output as well");
    require(s.residual < 0 || conv, "only conv adds a residual");
    check_op(s);
    if (s.op == StepOp::quantize)
      use_port(inputs_, s.port, values_[static_cast<size_t>(s.to)], false);
    if (s.op == StepOp::dequantize) use_port(outputs_, s.port, value(s.from[0]), true);
    if (!floats) made_[static_cast<size_t>(s.to)] = true;
  }

  void check_op(const Step& s) {
    const CodeValue* const x = s.from.empty() ? nullptr : &read(s.from[0]);
    const CodeValue* const to = s.to < 0 ? nullptr : &value(s.to);
    switch (s.op) {
      case StepOp::quantize:
      case StepOp::dequantize:
        return;
      case StepOp::conv:
        return check_conv(s, *x, to);
      case StepOp::add:
        return require(same_size(*x, read(s.from[1])) && same_size(*x, *to),
                       "sizes of a, b and to must be the same");
      case StepOp::mul: {
        const CodeValue& b = read(s.from[1]);
        require(same_size(*x, *to) && (same_size(*x, b) || (b.channels == x->channels &&
                                                            b.height == 1 && b.width == 1)),
                "a and to must have the same size, b that or 1 x 1 pixel");
        return require(x->scale * b.scale <= FLT_MAX / 65536 && x->scale * b.scale >= FLT_MIN,
                       "the product of the scales must be a normal number");
      }
      case StepOp::concat: {
        int64_t channels = 0;
        for (int v : s.from) {
          require(value(v).height == to->height && value(v).width == to->width,
                  "heights and widths must be the same");
          channels += value(v).channels;
        }
        return require(channels == to->channels, "'to' must have the channels of all");
      }
      case StepOp::lut:
        require(s.table.size() == 256, "the table must have 256 codes");
        return require(same_size(*x, *to), "sizes must be the same");
      case StepOp::max_pool:
      case StepOp::avg_pool:
        return check_pool(s, *x, *to);
      case StepOp::adaptive_avg_pool:
        require(x->channels == to->channels, "the channels must be the same");
        return require(x->height * x->width <= kMostWindow,
                       "the image is too large to be averaged");
      case StepOp::pad:
        require(x->channels == to->channels && same_codes(*x, *to),
                "channels, scale and zero point must be the same");
        require(s.code >= -128 && s.code <= 127, "the code must be one of -128..127");
        return require(s.top >= 0 && s.left >= 0 && s.top <= to->height - x->height &&
                           s.left <= to->width - x->width,
                       "the image does not fit");
      case StepOp::view:
        return require(same_codes(*x, *to) && x->channels * x->height * x->width ==
                                                  to->channels * to->height * to->width,
                       "scale, zero point and the number of codes must be the same");
      case StepOp::resize:
        require(x->channels == to->channels && same_codes(*x, *to),
                "channels, scale and zero point must be the same");
        return require(divides(x->height, to->height) && divides(x->width, to->width),
                       "one size must divide the other");
    }
  }

  static bool divides(int64_t a, int64_t b) { return a % b == 0 || b % a == 0; }

  // Whether a window fits: sizes are what torch asks for, where padding is not more than half of
  // it.
  void check_window(const Conv2dGeometry& g) const {
    for (int64_t v : {g.kernel_h, g.kernel_w, g.stride_h, g.stride_w, g.dilation_h, g.dilation_w})
      require(v >= 1 && v <= kMostSize,
              "kernel, stride and dilation must be positive, and not absurdly large");
    for (int64_t v : {g.pad_top, g.pad_left})
      require(v >= 0 && v <= kMostSize, "padding must not be negative, nor absurdly large");
  }

  void check_conv(const Step& s, const CodeValue& x, const CodeValue* to) {
    const Conv2dGeometry& g = s.geometry;
    const Weights& w = s.weights;
    check_window(g);
    require(s.activation == Activation::int8, "activations must be int8");
    require(g.batch == 1 && g.channels == x.channels && g.height == x.height && g.width == x.width,
            "the geometry must be that of x");
    for (int64_t v : {g.out_channels, g.out_height, g.out_width})
      require(v >= 1 && v <= kMostSize, "sizes of the output must be positive");
    const CodeValue out{g.out_channels, g.out_height, g.out_width, 1.0f, 0};
    require(!to || same_size(out, *to), "the geometry must be that of 'to'");
    require(g.groups >= 1 && g.channels % g.groups == 0 && g.out_channels % g.groups == 0,
            "groups must divide the channels");
    check_reach(g.out_height, g.stride_h, g.kernel_h, g.dilation_h, g.pad_top, g.height);
    check_reach(g.out_width, g.stride_w, g.kernel_w, g.dilation_w, g.pad_left, g.width);
    require(g.kernel_h * g.kernel_w <= kChunk && g.kernel_h * g.kernel_w * g.channels <= kMostBytes,
            "the kernel is too large");
    require((g.height + g.pad_top + g.kernel_h * g.dilation_h) *
                    (g.width + g.pad_left + g.kernel_w * g.dilation_w) <=
                kMostBytes / g.channels,
            "the padded image is too large");
    require(w.n == g.out_channels && w.k == conv2d_depth(w.format, g) && w.packed && w.scale,
            "the weight is not that of the geometry");
    require(w.group_size >= 0 && w.group_size % 32 == 0 &&
                (w.group_size != 0) == (w.group_scale != nullptr) &&
                (!w.group_zero || w.group_scale),
            "group_size must be 0, or a multiple of 32 with scales of groups");
    if (s.residual >= 0) {
      require(same_size(read(s.residual), out), "the residual must have the size of the output");
    }
    if (s.has_table) {
      const auto size = static_cast<int64_t>(s.table.size());
      require(to, "a table needs a value 'to'");
      require(size >= 1 && size <= kMostTable, "a table has 1..65536 codes");
      require(s.table_first >= -kFarthest && s.table_first + size <= kFarthest,
              "the table's first index is too far from 0");
      require(std::isfinite(s.table_inverse), "the table's factor must be finite");
    }
    if (!to) use_port(outputs_, s.port, out, true);
  }

  // Below and to the right, padding is less than the kernel.
  void check_reach(int64_t out, int64_t stride, int64_t kernel, int64_t dilation, int64_t pad,
                   int64_t size) const {
    const int64_t reach = (kernel - 1) * dilation, last = (out - 1) * stride;
    require(last + reach + 1 - pad - size <= std::max(reach, pad),
            "the output reaches too far beyond the image");
  }

  void check_pool(const Step& s, const CodeValue& x, const CodeValue& to) const {
    const Conv2dGeometry& g = s.geometry;
    check_window(g);
    require(x.channels == to.channels, "the channels must be the same");
    require(s.op == StepOp::avg_pool || same_codes(x, to), "scale and zero point must be the same");
    require(g.kernel_h * g.kernel_w <= kMostWindow, "the window is too large");
    // Each window has a pixel of the image.
    const auto fits = [](int64_t out, int64_t stride, int64_t kernel, int64_t dilation, int64_t pad,
                         int64_t size) {
      return pad <= (kernel - 1) * dilation && (out - 1) * stride - pad < size &&
             (dilation == 1 || pad < dilation || size >= dilation);
    };
    require(fits(to.height, g.stride_h, g.kernel_h, g.dilation_h, g.pad_top, x.height) &&
                fits(to.width, g.stride_w, g.kernel_w, g.dilation_w, g.pad_left, x.width),
            "a window lies outside the image");
  }

  const std::vector<CodeValue>& values_;
  const std::vector<Step>& steps_;
  size_t index_ = 0;
  std::vector<bool> made_;
  std::vector<CodeValue> inputs_, outputs_;  // of the program; without channels: not seen yet
};

}  // namespace

void check_program(const std::vector<CodeValue>& values, const std::vector<Step>& steps) {
  Check(values, steps).run();
}

}  // namespace lowbit
