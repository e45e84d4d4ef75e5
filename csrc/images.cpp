#include "images.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "parallel.h"

namespace lowbit {
namespace {

constexpr int64_t kSquare = 16;  // pixels that are transposed at once

// How far the taps reach over `out` outputs, and the image itself.
int64_t padded_size(int64_t size, int64_t out, int64_t kernel, int64_t stride, int64_t pad,
                    int64_t dilation) {
  return std::max((out - 1) * stride + (kernel - 1) * dilation + 1, pad + size);
}
int64_t padded_height(const Conv2dGeometry& g) {
  return padded_size(g.height, g.out_height, g.kernel_h, g.stride_h, g.pad_top, g.dilation_h);
}
int64_t padded_width(const Conv2dGeometry& g) {
  return padded_size(g.width, g.out_width, g.kernel_w, g.stride_w, g.pad_left, g.dilation_w);
}

}  // namespace

Images::Images(const Kernel& kernel, const Conv2dGeometry& g, Activation activation,
               const UnitScale& fixed, bool use_bits, int64_t tap, bool want_sums, Scratch& scratch)
    : kernel_(kernel),
      geometry_(g),
      activation_(activation),
      fixed_(fixed),
      use_bits_(use_bits),
      view_(false),
      planes_(lowbit::planes(activation)),
      height_(padded_height(g)),
      width_(padded_width(g)),
      row_pixels_(width_),
      elements_(g.height * g.width * g.channels) {
  const int64_t group = g.channels / g.groups;
  group_bytes_ = use_bits ? ceil_div(group, 32) * 4 : group;
  pitch_ = group_bytes_ * g.groups;
  if (!use_bits && g.groups == 1) pitch_ = tap;
  if (g.depthwise()) pitch_ = round_up(g.channels, kPanel);  // the microkernel reads whole panels
  plane_bytes_ = height_ * width_ * pitch_;
  const int64_t pixels = g.batch * planes_ * height_ * width_;
  scratch.cut(piece(codes_, pixels * pitch_ + kBehind),
              piece(mask_, use_bits && padded() ? plane_bytes_ + kVectorBytes : 0),
              piece(sums_, want_sums ? pixels * g.groups : 0), piece(seen_, g.batch),
              piece(scale_, g.batch), piece(inverse_, g.batch));
  for (int64_t i = 0; i < g.batch; ++i) new (seen_ + i) std::atomic<uint32_t>(0);
}

Images::Images(const Kernel& kernel, const Conv2dGeometry& g, const UnitScale& fixed, Layout layout,
               Scratch& scratch)
    : kernel_(kernel),
      geometry_(g),
      activation_(Activation::int8),
      fixed_(fixed),
      layout_(layout),
      use_bits_(false),
      view_(false),
      planes_(layout == Layout::channels ? static_cast<int>(g.channels) : 1),
      height_(layout == Layout::panels ? ceil_div(g.height * g.width, kPanel) : padded_height(g)),
      width_(layout == Layout::panels ? kPanel : padded_width(g)),
      row_pixels_(width_),
      elements_(g.height * g.width * g.channels),
      group_bytes_(0),
      pitch_(1),
      panel_bytes_(packed_steps(Format::int8, g.channels) * kVectorBytes) {
  plane_bytes_ = height_ * (layout == Layout::panels ? panel_bytes_ : width_);
  const int64_t size = layout == Layout::none ? 0 : g.batch * planes_ * plane_bytes_ + kBehind;
  scratch.cut(piece(codes_, size), piece(seen_, g.batch), piece(scale_, g.batch),
              piece(inverse_, g.batch));
  for (int64_t i = 0; i < g.batch; ++i) new (seen_ + i) std::atomic<uint32_t>(0);
}

Images::Images(const Kernel& kernel, const Conv2dGeometry& g, const int8_t* codes, int64_t rows,
               int64_t row_pixels, int64_t pitch)
    : kernel_(kernel),
      geometry_(g),
      activation_(Activation::int8),
      fixed_{},
      use_bits_(false),
      view_(true),
      planes_(1),
      height_(rows),
      width_((g.out_width - 1) * g.stride_w + (g.kernel_w - 1) * g.dilation_w + 1),
      row_pixels_(row_pixels),
      elements_(g.height * g.width * g.channels),
      group_bytes_(g.channels / g.groups),
      pitch_(pitch),
      plane_bytes_(0),
      codes_(const_cast<int8_t*>(codes)),
      scale_(&one_) {}

void Images::quantize(const float* x, int thread, int team) {
  // Images of their own for each thread, or a part of each for all of them.
  const bool own = geometry_.batch % team == 0;
  const Range images = own ? part(geometry_.batch, thread, team) : Range{0, geometry_.batch};
  if (activation_ == Activation::binary && !fixed_.fixed) {
    for (int64_t i = images.begin; i < images.end; ++i)
      quantize_binary(x + i * elements_, i, own ? 0 : thread, own ? 1 : team);
  } else if (own) {
    for (int64_t i = images.begin; i < images.end; ++i) {
      if (!fixed_.fixed) {
        see(i, unit_amax(kernel_, activation_, x + i * elements_, elements_));
        scale_image(x, i);
      }
      encode_rows(x + i * elements_, i, 0, height_, nullptr);
    }
  } else {
    if (!fixed_.fixed) {
      const Range mine = part(elements_, thread, team);
      for (int64_t i = 0; i < geometry_.batch; ++i)
        see(i,
            unit_amax(kernel_, activation_, x + i * elements_ + mine.begin, mine.end - mine.begin));
      team_barrier(team);
      for (int64_t i = thread; i < geometry_.batch; i += team) scale_image(x, i);
      team_barrier(team);
    }
    const Range mine = part(height_, thread, team);
    for (int64_t i = 0; i < geometry_.batch; ++i)
      encode_rows(x + i * elements_, i, mine.begin, mine.end, nullptr);
  }
  if (mask_) {
    const Range mine = part(height_, thread, team);
    for (int64_t y = mine.begin; y < mine.end; ++y) mask_row(y);
  }
  // Images of their own are also what threads read afterwards, but for the mask.
  if (!own || mask_) team_barrier(team);
}

// Signs do not wait for the scale. Its sum is one chain: one of the threads adds it up, and where
// there are others, they encode.
void Images::quantize_binary(const float* x, int64_t image, int thread, int team) {
  const int rank = static_cast<int>((thread + team - image % team) % team);
  if (rank > 0) {
    const Range mine = part(height_, rank - 1, team - 1);
    return encode_rows(x, image, mine.begin, mine.end, nullptr);
  }
  float lanes[kSumLanes] = {};
  if (team == 1)
    encode_rows(x, image, 0, height_, lanes);
  else
    each_run(x, 0, geometry_.height * geometry_.width,
             [&](const float* run, int64_t first, int64_t count) {
               const int64_t channels = geometry_.channels;
               kernel_.add_abs(run, count * channels, first * channels, lanes);
             });
  const UnitScale unit = unit_scale(kernel_, lanes, x, elements_);
  scale_[image] = unit.scale;
  inverse_[image] = unit.inverse;
}

void Images::see(int64_t image, uint32_t largest) {
  uint32_t seen = seen_[image].load(std::memory_order_relaxed);
  while (seen < largest && !seen_[image].compare_exchange_weak(seen, largest)) {
  }
}

void Images::scale_image(const float* x, int64_t image) {
  const UnitScale unit =
      unit_scale(kernel_, activation_, seen_[image], x + image * elements_, elements_);
  scale_[image] = unit.scale;
  inverse_[image] = unit.inverse;
}

void Images::mask_row(int64_t y) {
  int8_t* const row = mask_ + y * width_ * pitch_;
  std::memset(row, 0, static_cast<size_t>(width_ * pitch_));
  const int64_t in = y - geometry_.pad_top;
  if (in < 0 || in >= geometry_.height) return;
  // Beyond the channels both bits are 0: no agreement is counted.
  std::memset(row + geometry_.pad_left * pitch_, 0xff,
              static_cast<size_t>(geometry_.width * pitch_));
}

// call(x, first, count) for runs of the pixels [begin, end), as channels last.
template <class Call>
void Images::each_run(const float* x, int64_t begin, int64_t end, Call call) const {
  constexpr int64_t kFloats = 4096;  // a run stays in L1
  constexpr int64_t kFarImage = int64_t{512} << 10, kSameSet = 1024;
  const int64_t channels = geometry_.channels, pixels = geometry_.height * geometry_.width;
  const int64_t size = std::max(kFloats / channels / kSquare, int64_t{1}) * kSquare;
  // Pixels that share a set of the cache would push each other out: some floats between them.
  const int64_t pitch = channels % kSameSet == 0 ? channels + kSquare : channels;
  static thread_local Scratch scratch;
  float* block = nullptr;
  if (!geometry_.x_channels_last) scratch.cut(piece(block, (size + kSquare) * pitch));
  for (int64_t at = begin; at < end;) {
    // No run is much smaller than a square.
    const int64_t count = end - at < size + kSquare ? end - at : size;
    if (block) {
      kernel_.transpose(channels, count, x + at, pixels, block, pitch);
      // No prefetcher follows as many streams as there are channels; the second cache needs none.
      for (int64_t c = 0; c < channels && elements_ >= kFarImage; ++c)
        for (int64_t i = 0; i < size; i += kSquare)
          __builtin_prefetch(x + c * pixels + at + count + i);
    }
    if (block && pitch != channels)
      for (int64_t i = 0; i < count; ++i) call(block + i * pitch, at + i, int64_t{1});
    else
      call(block ? block : x + at * channels, at, count);
    at += count;
  }
}

// Rows [begin, end) of the padded image. `lanes`: null, or what |x| are added to.
void Images::encode_rows(const float* x, int64_t image, int64_t begin, int64_t end, float* lanes) {
  if (layout_ == Layout::panels) return encode_panels(x, image, begin, end);
  if (layout_ == Layout::channels) return encode_channels(x, image, begin, end);
  if (layout_ == Layout::none) return;
  const Conv2dGeometry& g = geometry_;
  const Range inside{std::max(begin - g.pad_top, int64_t{0}), std::min(end - g.pad_top, g.height)};
  const bool by_rows = g.x_channels_last && !lanes;
  // What no output reads need not be encoded, unless it is searched for what is not finite, too.
  const bool skips = !fixed_.fixed && !lanes && g.kernel_h * g.kernel_w == 1 && !g.depthwise() &&
                     g.stride_h * g.stride_w > 1;
  if (!g.x_channels_last && activation_ == Activation::int8) {
    // Rows shorter than a square had better be encoded together.
    if (!skips || g.stride_h == 1 || g.width < kSquare)
      encode_planes(x, image, inside.begin, inside.end);
    else
      for (int64_t y = inside.begin; y < inside.end; ++y)
        if ((y + g.pad_top) % g.stride_h == 0) encode_planes(x, image, y, y + 1);
  } else if (!by_rows) {
    each_run(x, inside.begin * g.width, inside.end * g.width,
             [&](const float* run, int64_t first, int64_t count) {
               if (lanes && !sums_with_bits())
                 kernel_.add_abs(run, count * g.channels, first * g.channels, lanes);
               for (int64_t i = 0; i < count;) {
                 const int64_t y = (first + i) / g.width, at = (first + i) % g.width;
                 const int64_t here = std::min(count - i, g.width - at);
                 encode_run(run + i * g.channels, image, y + g.pad_top, at, here, lanes);
                 i += here;
               }
             });
  }
  // From the end: what was searched last for the largest is still in the cache.
  for (int64_t y = end; y-- > begin;) {
    const int64_t in = y - g.pad_top;
    if (skips && y % g.stride_h != 0) continue;
    if (in < 0 || in >= g.height) {
      encode_padding(image, y, 0, width_);
      continue;
    }
    const float* const row = x + in * g.width * g.channels;
    if (by_rows && skips)
      for (int64_t at = round_up(g.pad_left, g.stride_w) - g.pad_left; at < g.width;
           at += g.stride_w)
        encode_run(row + at * g.channels, image, y, at, 1, nullptr);
    else if (by_rows)
      encode_run(row, image, y, 0, g.width, nullptr);
    if (g.pad_left > 0) encode_padding(image, y, 0, g.pad_left);
    if (g.pad_left + g.width < width_) encode_padding(image, y, g.pad_left + g.width, width_);
    if (sums_) sum_row(image, y);
  }
}

// Pixels [begin, end) of a row that pad the image: what means 0 there.
void Images::encode_padding(int64_t image, int64_t y, int64_t begin, int64_t end) {
  const Conv2dGeometry& g = geometry_;
  const int64_t pixels = end - begin;
  const bool whole = pitch_ == g.channels;  // pixels have no padding of their own
  for (int p = 0; p < planes_; ++p) {
    int8_t* const q = codes(image, p, y, begin);
    std::memset(q, whole ? fixed_.zero : 0, static_cast<size_t>(pixels * pitch_));
    if (!whole && fixed_.zero)
      for (int64_t i = 0; i < pixels; ++i)
        std::memset(q + i * pitch_, fixed_.zero, static_cast<size_t>(g.channels));
    if (sums_)
      std::fill_n(sums_of(image, p, y, begin), pixels * g.groups,
                  static_cast<int32_t>(fixed_.zero * (g.channels / g.groups)));
  }
}

// Whether no pixel ends within a dword of its bits: a run of pixels is a run of dwords.
bool Images::sums_with_bits() const {
  return use_bits_ && geometry_.channels / geometry_.groups % 32 == 0;
}

UnitScale Images::unit(int64_t image) const {
  return fixed_.fixed ? fixed_ : UnitScale{scale_[image], inverse_[image]};
}

// Pixels [first, first + count) of row y, counted without padding, of channels last. `lanes`: as
// above; they have the sums of |x| already where bits do not make them.
void Images::encode_run(const float* x, int64_t image, int64_t y, int64_t first, int64_t count,
                        float* lanes) {
  const Conv2dGeometry& g = geometry_;
  int8_t* const q = codes(image, 0, y, g.pad_left + first);
  const int64_t size = count * g.channels;
  if (use_bits_) {
    auto* out = reinterpret_cast<uint32_t*>(q);
    if (sums_with_bits()) return see(image, encode_bits(kernel_, fixed_, x, size, out, lanes));
    const int64_t width = g.channels / g.groups;
    for (const float* p = x; p < x + size; p += width, out += ceil_div(width, 32))
      see(image, encode_bits(kernel_, fixed_, p, width, out));
    return;
  }
  // Signs do not depend on the scale.
  const UnitScale unit = activation_ == Activation::binary && !fixed_.fixed ? UnitScale{1.0f, 1.0f}
                                                                            : this->unit(image);
  int8_t* const lo = planes_ == 2 ? codes(image, 1, y, g.pad_left + first) : nullptr;
  if (pitch_ == g.channels) return see(image, encode(kernel_, activation_, unit, x, size, q, lo));
  const auto rest = static_cast<size_t>(pitch_ - g.channels);
  for (int64_t i = 0; i < count; ++i) {
    see(image, encode(kernel_, activation_, unit, x + i * g.channels, g.channels, q + i * pitch_,
                      lo + i * pitch_));
    std::memset(q + i * pitch_ + g.channels, 0, rest);
    if (lo) std::memset(lo + i * pitch_ + g.channels, 0, rest);
  }
}

// Rows [begin, end) of NCHW: squares of channels and pixels become codes in registers.
void Images::encode_planes(const float* x, int64_t image, int64_t begin, int64_t end) {
  constexpr int64_t kRun = 64, kChannels = 64;
  const Conv2dGeometry& g = geometry_;
  const int64_t pixels = g.height * g.width;
  const UnitScale unit = this->unit(image);
  const PlaneCodes how{unit.inverse, unit.zero, unit.fixed};
  uint32_t largest = 0;
  if (g.channels == 3 && pitch_ == 3) {
    for (int64_t y = begin; y < end; ++y)
      largest =
          std::max(largest, kernel_.encode_triples(how, x + y * g.width, pixels, g.width,
                                                   codes(image, 0, g.pad_top + y, g.pad_left)));
    return see(image, largest);
  }
  int8_t* to[kRun];
  // What is written behind the channels is written again, by those before: from the last ones on.
  // They are also what was searched last for the largest.
  for (int64_t c = (pitch_ - 1) / kChannels * kChannels; c >= 0; c -= kChannels) {
    const int channels = static_cast<int>(std::min(kChannels, g.channels - c));
    const int width = static_cast<int>(std::min(kChannels, pitch_ - c));
    for (int64_t at = begin * g.width; at < end * g.width;) {
      // No run is smaller than a square, if it need not be.
      const int64_t left = end * g.width - at;
      const int64_t count = left <= kRun ? left : left < kRun + kSquare ? kRun - kSquare : kRun;
      for (int64_t i = 0; i < count;) {
        const int64_t y = (at + i) / g.width, first = (at + i) % g.width;
        const int64_t here = std::min(count - i, g.width - first);
        int8_t* const q = codes(image, 0, g.pad_top + y, g.pad_left + first);
        for (int64_t j = 0; j < here; ++j) to[i + j] = q + j * pitch_;
        i += here;
      }
      largest =
          std::max(largest, kernel_.encode_planes(how, x + c * pixels + at, pixels,
                                                  static_cast<int>(count), channels, width, to, c));
      at += count;
    }
  }
  see(image, largest);
}

void Images::encode_panels(const float* x, int64_t image, int64_t begin, int64_t end) {
  constexpr int64_t kRun = 4;  // lines of each channel
  const int64_t pixels = geometry_.height * geometry_.width, channels = geometry_.channels;
  const UnitScale unit = this->unit(image);
  const PlaneCodes how{unit.inverse, unit.zero, unit.fixed};
  uint32_t largest = 0;
  const auto put = [&](const float* from, ptrdiff_t plane, int64_t at, int64_t count) {
    auto* const to = const_cast<uint8_t*>(panels(image, at));
    largest = std::max(largest,
                       kernel_.encode_panels(how, from, plane, count, channels, to, panel_bytes_));
  };
  const int64_t whole = std::min(end, pixels / kPanel);
  for (int64_t at = begin; at < whole; at += kRun)
    put(x + at * kPanel, pixels, at, std::min(kRun, whole - at));
  if (whole < end) {
    static thread_local Scratch scratch;
    float* last;
    scratch.cut(piece(last, channels * kPanel));
    std::fill_n(last, channels * kPanel, 0.0f);
    for (int64_t c = 0; c < channels; ++c)
      std::copy_n(x + c * pixels + whole * kPanel, pixels % kPanel, last + c * kPanel);
    put(last, kPanel, whole, 1);
  }
  see(image, largest);
}

void Images::encode_channels(const float* x, int64_t image, int64_t begin, int64_t end) {
  const Conv2dGeometry& g = geometry_;
  const UnitScale unit = this->unit(image);
  const auto pad = [&](int8_t* q, int64_t count) {
    std::memset(q, fixed_.zero, static_cast<size_t>(count));
  };
  for (int64_t c = g.channels; c-- > 0;)
    for (int64_t y = begin; y < end; ++y) {
      int8_t* const q = codes(image, static_cast<int>(c), y, 0);
      const int64_t in = y - g.pad_top;
      if (in < 0 || in >= g.height) {
        pad(q, width_);
        continue;
      }
      pad(q, g.pad_left);
      see(image, encode(kernel_, activation_, unit, x + (c * g.height + in) * g.width, g.width,
                        q + g.pad_left, nullptr));
      pad(q + g.pad_left + g.width, width_ - g.pad_left - g.width);
    }
}

void Images::sum_row(int64_t image, int64_t y) {
  const Conv2dGeometry& g = geometry_;
  const int64_t width = g.channels / g.groups;
  for (int p = 0; p < planes_; ++p) {
    int32_t* const out = sums_of(image, p, y, g.pad_left);
    if (use_bits_)  // how many count
      std::fill_n(out, g.width * g.groups, static_cast<int32_t>(width));
    else
      kernel_.sum_rows(codes(image, p, y, g.pad_left), g.groups == 1 ? pitch_ : width,
                       g.width * g.groups, width, out);
  }
}

}  // namespace lowbit
