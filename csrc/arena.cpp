#include "arena.h"

#include <algorithm>
#include <numeric>

namespace lowbit {
namespace {

// What kernels may read behind the end.
constexpr int64_t kBehind = 2 * kVectorBytes;

struct Life {
  int64_t first = -1, last = -1;  // steps
};

std::vector<Life> lives(size_t values, const std::vector<Step>& steps) {
  std::vector<Life> life(values);
  for (size_t s = 0; s < steps.size(); ++s) {
    const auto at = static_cast<int64_t>(s);
    const auto used = [&](int v) { life[static_cast<size_t>(v)].last = at; };
    for (int v : steps[s].from) used(v);
    if (steps[s].residual >= 0) used(steps[s].residual);
    if (steps[s].to < 0) continue;
    life[static_cast<size_t>(steps[s].to)].first = at;
    used(steps[s].to);
  }
  return life;
}

// The border that the convolutions want which read a value; their padding and what is missing below
// and to the right.
void add_border(const std::vector<Step>& steps, std::vector<CodeMap>& maps) {
  std::vector<int64_t> below(maps.size(), 0), right(maps.size(), 0);
  for (const Step& step : steps) {
    if (step.op != StepOp::conv) continue;
    const auto v = static_cast<size_t>(step.from[0]);
    const Conv2dGeometry& g = step.geometry;
    maps[v].top = std::max(maps[v].top, g.pad_top);
    maps[v].left = std::max(maps[v].left, g.pad_left);
    const auto rest = [](int64_t out, int64_t stride, int64_t kernel, int64_t dilation, int64_t pad,
                         int64_t size) {
      return (out - 1) * stride + (kernel - 1) * dilation + 1 - pad - size;
    };
    below[v] = std::max(
        below[v], rest(g.out_height, g.stride_h, g.kernel_h, g.dilation_h, g.pad_top, g.height));
    right[v] = std::max(
        right[v], rest(g.out_width, g.stride_w, g.kernel_w, g.dilation_w, g.pad_left, g.width));
  }
  for (size_t v = 0; v < maps.size(); ++v) {
    maps[v].rows = maps[v].top + maps[v].height + below[v];
    maps[v].columns = maps[v].left + maps[v].width + right[v];
  }
}

// Whole panels are written by convolutions, and read by those with groups: pixels are as far apart.
// Images of few channels that a dense convolution alone reads are not: its taps are merged.
void set_pitch(const std::vector<Step>& steps, std::vector<CodeMap>& maps) {
  std::vector<bool> packed(maps.size(), false);
  for (const Step& step : steps)
    if (step.op == StepOp::quantize) packed[static_cast<size_t>(step.to)] = true;
  for (const Step& step : steps)
    for (int v : step.from)
      if (step.op != StepOp::conv || step.geometry.groups > 1)
        packed[static_cast<size_t>(v)] = false;
  for (size_t v = 0; v < maps.size(); ++v) {
    const int64_t channels = maps[v].channels;
    maps[v].pitch = packed[v] && channels < kPanel ? channels : round_up(channels, kPanel);
  }
}

}  // namespace

int64_t plan_arena(const std::vector<CodeValue>& values, const std::vector<Step>& steps,
                   std::vector<CodeMap>& maps) {
  maps.clear();
  for (const CodeValue& v : values) {
    CodeMap map{v.channels, v.height, v.width};
    map.zero = v.zero;
    maps.push_back(map);
  }
  add_border(steps, maps);
  set_pitch(steps, maps);

  // The largest first, each as low as those allow that live at the same time.
  const std::vector<Life> life = lives(values.size(), steps);
  std::vector<size_t> order(values.size()), placed;
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return maps[a].bytes() > maps[b].bytes(); });
  const auto end = [&](size_t v) {
    return round_up(maps[v].offset + maps[v].bytes() + kBehind, kVectorBytes);
  };
  int64_t total = 0;
  for (size_t v : order) {
    if (life[v].first < 0) continue;
    std::vector<size_t> others;
    for (size_t o : placed)
      if (life[o].first <= life[v].last && life[v].first <= life[o].last) others.push_back(o);
    std::sort(others.begin(), others.end(),
              [&](size_t a, size_t b) { return maps[a].offset < maps[b].offset; });
    maps[v].offset = 0;
    for (size_t o : others)
      if (maps[o].offset < end(v)) maps[v].offset = std::max(maps[v].offset, end(o));
    placed.push_back(v);
    total = std::max(total, end(v));
  }
  return total;
}

}  // namespace lowbit
