#include "pool_steps.h"

#include <algorithm>
#include <cstring>

namespace lowbit {
namespace {

// Rows or columns of a window: first, first + step, .. below `end`; `padded` of them count where
// padding does.
struct Span {
  int64_t first, end, step, padded;

  int64_t count() const { return end <= first ? 0 : (end - first + step - 1) / step; }
};

// Those of output `i` that are inside the image.
Span span(int64_t i, int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t start = i * stride - pad, end = start + (kernel - 1) * dilation + 1;
  // Padding behind the image is as wide as that before it: torch counts no further.
  const int64_t padded = std::min(end, size + pad) - start;
  const int64_t skipped = start < 0 ? (-start + dilation - 1) / dilation : 0;
  return {start + skipped * dilation, std::min(end, size), dilation, padded};
}

class Pool : public Executor {
 public:
  Pool(const Kernel& kernel, const StepPlan& plan)
      : kernel_(kernel),
        op_(plan.step.op),
        geometry_(plan.step.geometry),
        include_pad_(plan.step.include_pad),
        x_(plan.from[0]),
        from_(plan.from_maps[0]),
        to_(plan.to_map),
        how_(requantize_to(plan.to, Epilogue::none)) {}

  int64_t work() const override { return from_.height * from_.width * from_.channels * 8; }

  void run(const Frame& frame, int thread, int team) const override {
    fill_border(to_, frame.arena, thread, team);
    const Range mine = part(to_.height * to_.width, thread, team);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t y = i / to_.width, x = i % to_.width;
      int8_t* const q = to_.pixel(frame.arena, y, x);
      const Span rows = op_ == StepOp::adaptive_avg_pool
                            ? adaptive(y, from_.height, to_.height)
                            : span(y, from_.height, geometry_.kernel_h, geometry_.stride_h,
                                   geometry_.pad_top, geometry_.dilation_h);
      const Span columns = op_ == StepOp::adaptive_avg_pool
                               ? adaptive(x, from_.width, to_.width)
                               : span(x, from_.width, geometry_.kernel_w, geometry_.stride_w,
                                      geometry_.pad_left, geometry_.dilation_w);
      if (op_ == StepOp::max_pool)
        largest(frame, rows, columns, q);
      else
        mean(frame, rows, columns, q);
    }
  }

 private:
  static Span adaptive(int64_t i, int64_t size, int64_t outputs) {
    const int64_t first = i * size / outputs, end = ceil_div((i + 1) * size, outputs);
    return {first, end, 1, end - first};
  }

  template <class Call>
  void each(const Frame& frame, const Span& rows, const Span& columns, Call call) const {
    for (int64_t y = rows.first; y < rows.end; y += rows.step)
      for (int64_t x = columns.first; x < columns.end; x += columns.step)
        call(from_.pixel(frame.arena, y, x));
  }

  void largest(const Frame& frame, const Span& rows, const Span& columns, int8_t* q) const {
    std::memset(q, -128, static_cast<size_t>(to_.channels));
    each(frame, rows, columns,
         [&](const int8_t* pixel) { kernel_.max_codes(to_.channels, pixel, q); });
  }

  void mean(const Frame& frame, const Span& rows, const Span& columns, int8_t* q) const {
    static thread_local Scratch scratch;
    const int64_t channels = to_.channels, count = rows.count() * columns.count();
    int32_t* sums;
    float* floats;
    scratch.cut(piece(sums, channels), piece(floats, channels));
    std::fill_n(sums, channels, static_cast<int32_t>(-x_.zero * count));
    each(frame, rows, columns,
         [&](const int8_t* pixel) { kernel_.total_codes(channels, pixel, sums); });
    const bool all = include_pad_ && op_ == StepOp::avg_pool;
    const auto divisor = static_cast<float>(all ? rows.padded * columns.padded : count);
    for (int64_t c = 0; c < channels; ++c)
      floats[c] = static_cast<float>(sums[c]) * x_.scale / divisor;
    kernel_.requantize(how_, 1, channels, 0, floats, channels, nullptr, &q);
  }

  const Kernel& kernel_;
  const StepOp op_;
  const Conv2dGeometry geometry_;
  const bool include_pad_;
  const CodeValue x_;
  const CodeMap from_, to_;
  const Requantize how_;
};

}  // namespace

std::unique_ptr<Executor> make_pool(const Kernel& kernel, const StepPlan& plan) {
  return std::make_unique<Pool>(kernel, plan);
}

}  // namespace lowbit
