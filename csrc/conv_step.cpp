#include "conv_step.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "depthwise.h"
#include "grouped.h"
#include "im2col.h"

namespace lowbit {
namespace {

// What a block of rows reads stays in the second cache.
constexpr int64_t kBlockBytes = 256 * 1024;
constexpr int64_t kMinBlock = 24, kMaxBlock = 192;
constexpr int64_t kCentredPixels = 16;

class ConvStep : public Executor {
 public:
  ConvStep(const Kernel& kernel, const ConvPlan& plan)
      : kernel_(kernel),
        geometry_(plan.step.geometry),
        weights_(plan.step.weights),
        depth_(weights_.format, weights_.k, weights_.group_size),
        from_(plan.from),
        into_(plan.into),
        added_(plan.added),
        port_(plan.step.port),
        has_residual_(plan.residual),
        epilogue_(weights_.epilogue),
        table_(plan.step.table) {
    prepare_scales(plan);
    if (plan.to) {
      to_ = requantize_to(*plan.to, epilogue_);
      if (plan.step.has_table) {
        to_.inverse = plan.step.table_inverse;
        to_.first = plan.step.table_first;
        to_.low = static_cast<float>(to_.first);
        to_.high = static_cast<float>(to_.first + static_cast<int64_t>(table_.size()) - 1);
        to_.table = table_.data();
      }
    }
    if (plan.residual) {
      to_.residual_scale = plan.residual->scale;
      to_.residual_zero = plan.residual->zero;
    }
    to_.saturates = plan.to && saturates(plan);
    // A float output has its epilogue behind the residual.
    weights_.epilogue = plan.to || has_residual_ ? Epilogue::none : epilogue_;

    const Images images = view(nullptr);
    if (geometry_.depthwise()) {
      depthwise_.emplace(kernel, geometry_, weights_, depth_, Activation::int8, scratch_);
      depthwise_->make(0, 1);
    } else if (is_fine_grouped(geometry_, weights_, Activation::int8)) {
      grouped_.emplace(kernel, geometry_, weights_, images, scratch_);
    } else if (geometry_.blocks() < geometry_.groups) {
      weights_ = separate_groups(geometry_, weights_, depth_, scratch_);
    } else if (plan.to && to_.in_registers() && is_centred()) {
      weights_ = centre(weights_, geometry_.channels, scratch_, seed_);
    }
  }

  int64_t work() const override {
    return geometry_.out_height * geometry_.out_width * weights_.n * weights_.k;
  }

  void run(const Frame& frame, int thread, int team) const override {
    const Conv2dGeometry& g = geometry_;
    const Images images = view(frame.arena);
    const int64_t pixels = g.out_height * g.out_width;
    if (port_ < 0) fill_border(into_, frame.arena, thread, team);
    // Threads share pixels, or channels where these have more weights than the pixels have
    // activations.
    const bool by_channels = team > 1 && g.groups == 1 && port_ < 0 &&
                             weights_.n * traits(weights_.format).bits > pixels * 8;
    Range mine = by_channels ? Range{0, pixels} : part(pixels, thread, team),
          channels{0, weights_.n};
    if (by_channels) {
      channels = part(ceil_div(weights_.n, kernel_.nr), thread, team);
      channels = {channels.begin * kernel_.nr, std::min(weights_.n, channels.end * kernel_.nr)};
      if (channels.begin >= channels.end) return;
    }
    if (depthwise_) {
      const Range rows = part(g.out_height, thread, team);
      mine = {rows.begin * g.out_width, rows.end * g.out_width};
    }
    if (mine.begin == mine.end) return;
    if (port_ >= 0) return run_floats(frame, images, mine);
    const CodeImage codes = code_image(frame);
    if (depthwise_) {
      return depthwise(kernel_, g, weights_, depth_, *depthwise_, images, 0,
                       mine.begin / g.out_width, mine.end / g.out_width, nullptr, &codes);
    }
    run_codes(images, codes, mine, channels);
  }

 private:
  // Scales with the activations' in them, and the bias that takes their zero point back.
  void prepare_scales(const ConvPlan& plan) {
    const StaticActivation x{plan.x.scale, plan.x.zero};
    bias_.resize(static_cast<size_t>(weights_.n));
    static_bias(weights_, geometry_, x, bias_.data(), 1);
    scale_.resize(static_cast<size_t>(weights_.n));
    for (size_t n = 0; n < scale_.size(); ++n) scale_[n] = plan.x.scale * weights_.scale[n];
    weights_.scale = scale_.data();
    weights_.bias = bias_.data();
  }

  // Whether the bounds are what storing a byte does, however large the sums are.
  bool saturates(const ConvPlan& plan) const {
    constexpr double kMost = 1 << 21;
    const double sum = 128.0 * traits(weights_.format).largest() * static_cast<double>(weights_.k);
    double most = 0;
    for (size_t n = 0; n < scale_.size(); ++n)
      most = std::max(most, std::abs(sum * double{scale_[n]}) + std::abs(double{bias_[n]}));
    if (plan.residual) most += 256.0 * double{plan.residual->scale};
    return to_.low == static_cast<float>(-128 - to_.zero) &&
           to_.high == static_cast<float>(127 - to_.zero) && !weights_.group_scale &&
           most * double{to_.inverse} < kMost;
  }

  // Rows whose sums are not needed, where there are enough of them for a second copy of the
  // weights.
  bool is_centred() const {
    return kernel_.dot_centred && weights_.format == Format::int8 && geometry_.groups == 1 &&
           depth_.chunks() == 1 && !weights_.group_scale &&
           geometry_.out_height * geometry_.out_width >= kCentredPixels;
  }

  Images view(int8_t* arena) const {
    const int64_t above = from_.top - geometry_.pad_top;
    return {kernel_,
            geometry_,
            arena ? from_.pixel(arena, -geometry_.pad_top, -geometry_.pad_left) : nullptr,
            from_.rows - above,
            from_.columns,
            from_.pitch};
  }

  CodeImage code_image(const Frame& frame) const {
    CodeImage c{&to_, into_.pixel(frame.arena, 0, 0), into_.pitch, into_.row_bytes()};
    if (has_residual_) {
      c.residual = added_.pixel(frame.arena, 0, 0);
      c.residual_pixel = added_.pitch;
      c.residual_row = added_.row_bytes();
    }
    return c;
  }

  int64_t block_size() const {
    return std::clamp(kBlockBytes / std::max<int64_t>(weights_.k, 1), kMinBlock, kMaxBlock);
  }

  void run_codes(const Images& images, const CodeImage& codes, Range mine, Range channels) const {
    static thread_local Scratch rows_scratch, block_scratch;
    const Conv2dGeometry& g = geometry_;
    const int64_t n = g.out_channels / g.groups,
                  blocks = ceil_div(mine.end - mine.begin, block_size());
    int8_t** q;
    const int8_t** residual;
    float* floats;
    const int64_t most = ceil_div(mine.end - mine.begin, blocks);
    const bool by_floats = grouped_ && !codes.in_registers();
    rows_scratch.cut(piece(q, most), piece(residual, most),
                     piece(floats, by_floats ? most * g.out_channels : 0));
    for (int64_t b = 0; b < blocks; ++b) {
      const Range block = part(mine.end - mine.begin, b, blocks);
      const int64_t first = mine.begin + block.begin, count = block.end - block.begin;
      if (grouped_ && !by_floats) {
        grouped_->run(images, 0, first, count, nullptr, &codes, block_scratch);
        continue;
      }
      set_pixels(codes.q, codes.row, codes.pixel, first, count, q);
      if (codes.residual)
        set_pixels(codes.residual, codes.residual_row, codes.residual_pixel, first, count,
                   residual);
      if (by_floats) {
        grouped_->run(images, 0, first, count, floats, nullptr, block_scratch);
        kernel_.requantize(to_, count, g.out_channels, 0, floats, g.out_channels,
                           codes.residual ? residual : nullptr, q);
        continue;
      }
      Columns columns(kernel_, g, weights_, depth_, images, count, block_scratch, !seed_);
      for (int64_t group = 0; group < g.groups; ++group) {
        Rows rows = columns.fill(0, first, count, group);
        rows.seed = seed_;
        gemm(kernel_, group_weights(weights_, g, depth_, group), depth_, rows, channels.begin,
             std::min(channels.end, n),
             {&to_, q, codes.residual ? residual : nullptr, group * n, g.groups == 1});
      }
    }
  }

  // to[i] = where pixel first + i of an image is.
  template <class Byte>
  void set_pixels(Byte* image, ptrdiff_t row, ptrdiff_t pixel, int64_t first, int64_t count,
                  Byte** to) const {
    const int64_t width = geometry_.out_width;
    int64_t y = first / width, x = first % width;
    for (int64_t i = 0; i < count; ++y, x = 0) {
      Byte* at = image + y * row + x * pixel;
      for (const int64_t end = std::min(count, i + width - x); i < end; ++i, at += pixel)
        to[i] = at;
    }
  }

  void run_floats(const Frame& frame, const Images& images, Range mine) const {
    static thread_local Scratch rows_scratch, block_scratch;
    const Conv2dGeometry& g = geometry_;
    const int64_t n = g.out_channels / g.groups, unit = depthwise_ ? g.out_width : 1;
    const int64_t units = (mine.end - mine.begin) / unit;
    const int64_t blocks = ceil_div(units, std::max<int64_t>(block_size() / unit, 1));
    float* y;
    rows_scratch.cut(piece(y, ceil_div(units, blocks) * unit * g.out_channels));
    for (int64_t b = 0; b < blocks; ++b) {
      const Range block = part(units, b, blocks);
      const int64_t first = mine.begin + block.begin * unit,
                    count = (block.end - block.begin) * unit;
      if (depthwise_) {
        depthwise(kernel_, g, weights_, depth_, *depthwise_, images, 0, first / unit,
                  (first + count) / unit, y);
      } else if (grouped_) {
        grouped_->run(images, 0, first, count, y, nullptr, block_scratch);
      } else {
        Columns columns(kernel_, g, weights_, depth_, images, count, block_scratch);
        for (int64_t group = 0; group < g.groups; ++group)
          gemm(kernel_, group_weights(weights_, g, depth_, group), depth_,
               columns.fill(0, first, count, group), 0, n, y + group * n, g.out_channels);
      }
      if (has_residual_) add_residual(frame, first, count, y);
      if (has_residual_ || depthwise_ || grouped_)
        kernel_.apply(epilogue_, count, g.out_channels, y, g.out_channels);
      put_floats(kernel_, frame, port_, g.out_height * g.out_width, g.out_channels, first, count,
                 y);
    }
  }

  void add_residual(const Frame& frame, int64_t first, int64_t count, float* y) const {
    for (int64_t i = first; i < first + count; ++i) {
      const int8_t* const r =
          added_.pixel(frame.arena, i / geometry_.out_width, i % geometry_.out_width);
      for (int64_t c = 0; c < geometry_.out_channels; ++c)
        *y++ += static_cast<float>(r[c] - to_.residual_zero) * to_.residual_scale;
    }
  }

  const Kernel& kernel_;
  const Conv2dGeometry geometry_;
  Weights weights_;
  const Depth depth_;
  const CodeMap from_, into_, added_;
  const int64_t port_;
  const bool has_residual_;
  const Epilogue epilogue_;
  const std::vector<int8_t> table_;
  Requantize to_{};
  std::vector<float> scale_, bias_;
  Scratch scratch_;
  const int32_t* seed_ = nullptr;  // of centred weights
  std::optional<DepthwiseWeights> depthwise_;
  std::optional<Grouped> grouped_;
};

}  // namespace

std::unique_ptr<Executor> make_conv(const Kernel& kernel, const ConvPlan& plan) {
  return std::make_unique<ConvStep>(kernel, plan);
}

}  // namespace lowbit
