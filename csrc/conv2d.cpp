// The Conv2d op: quantize the images to NHWC codes, then blocks of output pixels. A block copies
// its receptive fields to rows (im2col, a block at a time) and multiplies them as Linear does; a
// 1x1 convolution needs no copy, and of channels first is a GEMM of other roles (channel_rows);
// depthwise ones and those of many groups have microkernels of their own.
#include <algorithm>
#include <optional>

#include "channel_rows.h"
#include "depthwise.h"
#include "dispatch.h"
#include "grouped.h"
#include "im2col.h"
#include "lowbit.h"
#include "pages.h"
#include "parallel.h"
#include "plane_depthwise.h"

namespace lowbit {

int64_t tap_channels(Format format, int64_t channels_per_group) {
  const int64_t depth = traits(format).depth();
  return channels_per_group < depth ? channels_per_group : round_up(channels_per_group, depth);
}

int64_t conv2d_depth(Format format, const Conv2dGeometry& g) {
  return g.kernel_h * g.kernel_w * tap_channels(format, g.channels / g.groups);
}

namespace {

// What a block reads (its rows; a depthwise one: writes) stays in L2.
constexpr int64_t kBlockBytes = 256 * 1024;
constexpr int64_t kPassBytes = int64_t{512} << 10;
constexpr int64_t kMinBlock = 24, kMaxBlock = 192;
// Outputs channels first are far sooner: no prefetcher follows as many streams as there are
// channels.
constexpr int64_t kPlanesFar = 2;
// Floats of a line of the cache, and so many lines can be shared out evenly.
constexpr int64_t kLine = 16, kManyLines = 32;

// How many blocks an image is cut into: they fit the cache, and there is one for each of `parts`
// threads. A block is a range of units of so many pixels (whole rows of a depthwise convolution).
int64_t blocks_per_image(const Conv2dGeometry& g, const Weights& weights, int64_t unit, int parts) {
  const int64_t units = ceil_div(g.out_height * g.out_width, unit);
  const int64_t bytes = g.depthwise() ? unit * g.out_channels * 4 : weights.k;
  int64_t block = std::clamp(kBlockBytes / std::max<int64_t>(bytes, 1),
                             g.depthwise() ? 1 : kMinBlock, kMaxBlock);
  if (!g.depthwise()) block = std::max<int64_t>(block / unit, 1);
  return std::min(units, round_up(std::max(ceil_div(units, block), int64_t{parts}), parts));
}

// What differs between kinds of convolutions: how a block of output pixels is computed.
class Layer {
 public:
  Layer(const Kernel& kernel, const Conv2dGeometry& g, const Weights& weights, const Depth& depth,
        Activation activation, const Images& images, bool far, Scratch& scratch)
      : kernel_(kernel),
        geometry_(g),
        weights_(weights),
        depth_(depth),
        images_(images),
        far_(far) {
    if (ChannelRows::fits(kernel, g, weights, depth, activation)) {
      channel_rows_.emplace(kernel, g, weights, images, scratch);
    } else if (g.depthwise()) {
      depthwise_.emplace(kernel, g, weights, depth, activation, scratch);
    } else if (is_fine_grouped(g, weights, activation)) {
      grouped_.emplace(kernel, g, weights, images, scratch);
    } else if (g.blocks() < g.groups) {
      weights_ = separate_groups(g, weights, depth, scratch);
    } else if (is_centred(activation)) {
      weights_ = centre(weights, g.channels, scratch, seed_);
    }
    lines_ = !channel_rows_ && !depthwise_ && !grouped_ &&
             Columns::by_lines(kernel, g, weights_, depth, images);
  }

  // Called by every thread of a team. Whether a barrier must follow.
  bool prepare(int thread, int team) const {
    if (depthwise_) depthwise_->make(thread, team);
    if (channel_rows_) channel_rows_->make(thread, team);
    return depthwise_ || channel_rows_;
  }

  // Blocks are whole rows of outputs, or whole panels of pixels, or of any pixels.
  int64_t unit() const {
    return lines_ || depthwise_ ? geometry_.out_width : channel_rows_ ? kPanel : 1;
  }

  // Whether threads may share the channels of a block.
  bool by_channels() const { return geometry_.groups == 1; }

  // Output pixels [first, first + count), those of `channels` alone where threads share them, to y
  // [count][out_channels].
  void run(int64_t image, int64_t first, int64_t count, Range channels, float* y) const {
    static thread_local Scratch scratch;
    const Conv2dGeometry& g = geometry_;
    if (depthwise_)
      depthwise(kernel_, g, weights_, depth_, *depthwise_, images_, image, first / g.out_width,
                (first + count) / g.out_width, y);
    if (grouped_) grouped_->run(images_, image, first, count, y, nullptr, scratch);
    if (depthwise_ || grouped_)
      return kernel_.apply(weights_.epilogue, count, g.out_channels, y, g.out_channels);
    Columns columns(kernel_, g, weights_, depth_, images_, count, scratch, !seed_, lines_);
    const int64_t n = g.out_channels / g.groups;
    for (int64_t group = 0; group < g.groups; ++group)
      gemm(kernel_, group_weights(weights_, g, depth_, group), depth_,
           rows(columns, image, first, count, group), channels.begin, std::min(channels.end, n),
           y + group * n, g.out_channels);
  }

  // The same of all channels, to y [out_channels][plane].
  void run_planes(int64_t image, int64_t first, int64_t count, float* y, ptrdiff_t plane) const {
    static thread_local Scratch scratch, room_scratch;
    const Conv2dGeometry& g = geometry_;
    if (channel_rows_)
      return channel_rows_->run(image, first / kPanel, count, y, plane, far_, scratch);
    float* room;
    room_scratch.cut(piece(room, count * g.out_channels));
    if (depthwise_ || grouped_) {
      run(image, first, count, {0, g.out_channels}, room);
      return kernel_.transpose(count, g.out_channels, room, g.out_channels, y, plane);
    }
    Columns columns(kernel_, g, weights_, depth_, images_, count, scratch, !seed_, lines_);
    const int64_t n = g.out_channels / g.groups;
    for (int64_t group = 0; group < g.groups; ++group)
      gemm(kernel_, group_weights(weights_, g, depth_, group), depth_,
           rows(columns, image, first, count, group), 0, n,
           PlaneRows{y + group * n * plane, plane, room});
  }

 private:
  // First layers, of merged taps: their few weights are centred at each call, which spares the sums
  // of their many short rows.
  bool is_centred(Activation activation) const {
    return kernel_.dot_centred && weights_.format == Format::int8 && geometry_.groups == 1 &&
           geometry_.channels < traits(weights_.format).depth() && depth_.chunks() == 1 &&
           !weights_.group_scale && activation == Activation::int8;
  }

  Rows rows(Columns& columns, int64_t image, int64_t first, int64_t count, int64_t group) const {
    Rows rows = columns.fill(image, first, count, group);
    rows.seed = seed_;
    rows.far = far_;
    return rows;
  }

  const Kernel& kernel_;
  const Conv2dGeometry& geometry_;
  Weights weights_;
  const int32_t* seed_ = nullptr;  // of centred weights
  const Depth& depth_;
  const Images& images_;
  const bool far_;  // see Rows::far
  std::optional<ChannelRows> channel_rows_;
  std::optional<DepthwiseWeights> depthwise_;
  std::optional<Grouped> grouped_;
  bool lines_ = false;  // see Columns::by_lines()
};

// As many images as one pass quantizes at once.
void conv2d_pass(const float* x, const Conv2dGeometry& g, const Weights& weights,
                 Activation activation, float* y, int threads, const UnitScale& fixed, bool far) {
  const int64_t pixels = g.out_height * g.out_width;
  const Kernel& kernel = lowbit::kernel();
  const Depth depth(weights.format, weights.k, weights.group_size);
  const int64_t width = g.channels / g.groups;
  // As bits only where a tap is whole vectors, and without zero points (they need the sum of the
  // activations).
  const bool use_bits = traits(weights.format).bits == 1 && activation == Activation::binary &&
                        !g.depthwise() && width >= traits(weights.format).depth() &&
                        !weights.group_zero;
  static thread_local Scratch scratch, weights_scratch;
  const bool sums =
      !is_fine_grouped(g, weights, activation) && Columns::wants_sums(g, weights, depth);
  Images images = ChannelRows::fits(kernel, g, weights, depth, activation)
                      ? Images(kernel, g, fixed, ChannelRows::layout(g), scratch)
                      : Images(kernel, g, activation, fixed, use_bits,
                               tap_channels(weights.format, width), sums, scratch);
  const Layer layer(kernel, g, weights, depth, activation, images, far, weights_scratch);
  threads = worthwhile_threads(threads, g.batch * pixels * weights.n * weights.k);

  parallel(threads, [&](int thread, int team) {
    const bool prepared = layer.prepare(thread, team);
    images.quantize(x, thread, team);
    // Threads share images, or the pixels of each, or its channels where these have more weights
    // than the pixels have activations: what they share, they need not all read.
    const bool own = g.batch % team == 0;
    if (prepared && own) team_barrier(team);  // else quantize() has ended with one
    const bool by_channels = !own && layer.by_channels() && g.y_channels_last &&
                             weights.n * traits(weights.format).bits > pixels * 8;
    const int64_t blocks =
        blocks_per_image(g, weights, layer.unit(), own || by_channels ? 1 : team);
    const Range mine =
        by_channels ? Range{0, g.batch * blocks} : part(g.batch * blocks, thread, team);
    Range channels{0, weights.n};
    if (by_channels) {
      channels = part(ceil_div(weights.n, kernel.nr), thread, team);
      channels = {channels.begin * kernel.nr, std::min(weights.n, channels.end * kernel.nr)};
    }
    // What a block cannot divide, or whole lines of channels first.
    const bool lines =
        !g.y_channels_last && pixels % kLine == 0 && pixels >= std::max(kManyLines, blocks) * kLine;
    const int64_t unit = layer.unit() == 1 && lines ? kLine : layer.unit();
    for (int64_t b = mine.begin; b < mine.end; ++b) {
      const int64_t image = b / blocks;
      const Range block = part(ceil_div(pixels, unit), b % blocks, blocks);
      const int64_t first = block.begin * unit;
      const int64_t count = std::min(pixels, block.end * unit) - first;
      float* const to = y + image * pixels * g.out_channels;
      if (g.y_channels_last) {
        layer.run(image, first, count, channels, to + first * g.out_channels);
        continue;
      }
      layer.run_planes(image, first, count, to + first, pixels);
    }
  });
}

}  // namespace

void conv2d(const float* x, const Conv2dGeometry& g, const Weights& weights, Activation activation,
            float* y, int threads, const StaticActivation* fixed) {
  const UnitScale unit = fixed_scale(fixed);
  const int64_t in = g.height * g.width * g.channels,
                out = g.out_height * g.out_width * g.out_channels;
  if (out == 0) return;
  prefer_huge_pages(y, static_cast<size_t>(g.batch * out) * sizeof(*y));
  // Codes live for one pass, as many images for each thread as its cache holds, one at least.
  const int64_t bytes = std::max<int64_t>(in * planes(activation), 1);
  const int64_t images = std::max<int64_t>(kPassBytes / bytes, 1) * std::max(threads, 1);
  Conv2dGeometry pass = g;
  pass.x_channels_last |= g.height * g.width == 1;
  pass.y_channels_last |= g.out_height * g.out_width == 1;
  for (int64_t first = 0; first < g.batch; first += images) {
    pass.batch = std::min(images, g.batch - first);
    if (is_plane_depthwise(kernel(), pass, weights, activation, fixed)) {
      plane_depthwise(kernel(), pass, weights, x + first * in, y + first * out, threads);
      continue;
    }
    conv2d_pass(x + first * in, pass, weights, activation, y + first * out, threads, unit,
                is_far(g.batch * out * (g.y_channels_last ? 1 : kPlanesFar)));
  }
}

}  // namespace lowbit
