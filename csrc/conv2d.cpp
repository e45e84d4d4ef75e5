// The Conv2d op: quantize the images to NHWC codes, then blocks of output pixels. A block copies
// its receptive fields to rows (im2col, a block at a time) and multiplies them as Linear does; a
// 1x1 convolution needs no copy; a depthwise one has a microkernel of its own.
#include <algorithm>
#include <optional>

#include "depthwise.h"
#include "dispatch.h"
#include "im2col.h"
#include "lowbit.h"
#include "parallel.h"

namespace lowbit {

int64_t tap_channels(Format format, int64_t channels_per_group) {
  const int64_t depth = traits(format).depth();
  return channels_per_group < depth ? channels_per_group : round_up(channels_per_group, depth);
}

int64_t conv2d_depth(Format format, const Conv2dGeometry& g) {
  const int64_t taps = g.kernel_h * g.kernel_w;
  return g.depthwise() ? taps : taps * tap_channels(format, g.channels / g.groups);
}

namespace {

// What a block reads (its rows; a depthwise one: writes) stays in L2.
constexpr int64_t kBlockBytes = 256 * 1024;
constexpr int64_t kPassBytes = int64_t{32} << 20;
constexpr int64_t kMinBlock = 24, kMaxBlock = 192;

// The weights of one group of a convolution.
Weights group_weights(const Weights& all, const Conv2dGeometry& g, const Depth& depth,
                      int64_t group) {
  Weights w = all;
  w.n = g.out_channels / g.groups;
  w.packed += group * packed_panels(w.n) * depth.steps * kVectorBytes;
  w.scale += group * w.n;
  if (w.bias) w.bias += group * w.n;
  if (w.group_scale) w.group_scale += group * w.n * depth.groups;
  if (w.group_zero) w.group_zero += group * w.n * depth.groups;
  return w;
}

// How many blocks an image is cut into: they fit the cache, and there is one for each thread. A
// block is a range of pixels, or of whole rows for a depthwise convolution.
int64_t blocks_per_image(const Conv2dGeometry& g, const Weights& weights, int threads) {
  const int64_t units = g.depthwise() ? g.out_height : g.out_height * g.out_width;
  const int64_t bytes = g.depthwise() ? g.out_width * g.out_channels * 4 : weights.k;
  const int64_t block = std::clamp(kBlockBytes / std::max<int64_t>(bytes, 1),
                                   g.depthwise() ? 1 : kMinBlock, kMaxBlock);
  const int64_t wanted = std::max(ceil_div(units, block), ceil_div(threads, g.batch));
  return std::min(units, round_up(wanted, g.batch % threads == 0 ? 1 : threads));
}

// As many images as one pass quantizes at once.
void conv2d_pass(const float* x, const Conv2dGeometry& g, const Weights& weights,
                 Activation activation, float* y, int threads) {
  const int64_t pixels = g.out_height * g.out_width;
  const Kernel& kernel = lowbit::kernel();
  const Depth depth(weights.format, weights.k, weights.group_size);
  const int64_t width = g.channels / g.groups;
  // As bits only where a tap is whole vectors, and without zero points (they need the sum of the
  // activations).
  const bool use_bits = traits(weights.format).bits == 1 && activation == Activation::binary &&
                        !g.depthwise() && width >= traits(weights.format).depth() &&
                        !weights.group_zero;
  static thread_local Scratch scratch;
  Images images(kernel, g, activation, use_bits, tap_channels(weights.format, width),
                Columns::wants_sums(g, weights, depth), scratch);
  threads = worthwhile_threads(threads, g.batch * pixels * weights.n * weights.k);
  const int64_t blocks = blocks_per_image(g, weights, threads);
  const int64_t unit = g.depthwise() ? g.out_width : 1;  // pixels that a block cannot divide
  static thread_local Scratch weights_scratch;
  std::optional<DepthwiseWeights> expanded;
  if (g.depthwise()) expanded.emplace(kernel, g, weights, depth, activation, weights_scratch);

  parallel(threads, [&](int thread, int team) {
    images.quantize(x, thread, team);
    static thread_local Scratch rows_scratch, block_scratch;
    const Range mine = part(g.batch * blocks, thread, team);
    for (int64_t b = mine.begin; b < mine.end; ++b) {
      const int64_t image = b / blocks;
      const Range block = part(pixels / unit, b % blocks, blocks);
      const int64_t first = block.begin * unit, count = (block.end - block.begin) * unit;
      float* out = y + (image * pixels + first) * g.out_channels;
      if (!g.y_channels_last) {
        block_scratch.cut(piece(out, count * g.out_channels));
      }
      if (g.depthwise()) {
        depthwise(kernel, g, weights, depth, *expanded, images, image, block.begin, block.end, out);
      } else {
        Columns columns(kernel, g, weights, depth, images, count, rows_scratch);
        for (int64_t group = 0; group < g.groups; ++group) {
          const Weights w = group_weights(weights, g, depth, group);
          gemm(kernel, w, depth, columns.fill(image, first, count, group), 0, w.n,
               out + group * w.n, g.out_channels);
        }
      }
      if (!g.y_channels_last)
        kernel.transpose(count, g.out_channels, out, y + image * pixels * g.out_channels + first,
                         pixels);
    }
  });
}

}  // namespace

void conv2d(const float* x, const Conv2dGeometry& g, const Weights& weights, Activation activation,
            float* y, int threads) {
  const int64_t in = g.height * g.width * g.channels,
                out = g.out_height * g.out_width * g.out_channels;
  if (out == 0) return;
  // Codes live for one pass: an image for each thread at least.
  const int64_t images =
      std::max<int64_t>(kPassBytes / std::max<int64_t>(in * planes(activation), 1), threads);
  Conv2dGeometry pass = g;
  for (int64_t first = 0; first < g.batch; first += images) {
    pass.batch = std::min(images, g.batch - first);
    conv2d_pass(x + first * in, pass, weights, activation, y + first * out, threads);
  }
}

}  // namespace lowbit
