#include "step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace lowbit {

void fill_border(const CodeMap& m, int8_t* arena, int thread, int team) {
  if (m.rows == m.height && m.columns == m.width) return;
  const Range mine = part(m.rows, thread, team);
  const auto fill = [&](int64_t y, int64_t x, int64_t pixels) {
    std::memset(m.pixel(arena, y, x), m.zero, static_cast<size_t>(pixels * m.pitch));
  };
  for (int64_t row = mine.begin; row < mine.end; ++row) {
    const int64_t y = row - m.top;
    if (y < 0 || y >= m.height) {
      fill(y, -m.left, m.columns);
      continue;
    }
    fill(y, -m.left, m.left);
    fill(y, m.width, m.columns - m.left - m.width);
  }
}

Requantize requantize_to(const CodeValue& value, Epilogue epilogue) {
  Requantize to{};
  to.inverse = 1.0f / value.scale;
  to.zero = value.zero;
  to.low = static_cast<float>(-128 - value.zero);
  to.high = static_cast<float>(127 - value.zero);
  if (epilogue == Epilogue::relu || epilogue == Epilogue::relu6) to.low = std::max(to.low, 0.0f);
  if (epilogue == Epilogue::relu6) to.high = std::min(to.high, std::nearbyint(6.0f * to.inverse));
  to.hardswish = epilogue == Epilogue::hardswish;
  return to;
}

void put_floats(const Kernel& kernel, const Frame& frame, int64_t port, int64_t pixels,
                int64_t channels, int64_t first, int64_t count, float* y) {
  if (frame.not_finite->load(std::memory_order_relaxed))
    std::fill_n(y, count * channels, std::numeric_limits<float>::quiet_NaN());
  float* const to = frame.outputs[port].data + frame.image * pixels * channels;
  if (!frame.outputs[port].channels_last && pixels > 1)
    return kernel.transpose(count, channels, y, channels, to + first, pixels);
  std::copy_n(y, count * channels, to + first * channels);
}

}  // namespace lowbit
