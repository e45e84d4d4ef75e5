#include "images.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "parallel.h"

namespace lowbit {
namespace {

// How far the taps reach over `out` outputs, and the image itself.
int64_t padded_size(int64_t size, int64_t out, int64_t kernel, int64_t stride, int64_t pad,
                    int64_t dilation) {
  return std::max((out - 1) * stride + (kernel - 1) * dilation + 1, pad + size);
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
      height_(padded_size(g.height, g.out_height, g.kernel_h, g.stride_h, g.pad_top, g.dilation_h)),
      width_(padded_size(g.width, g.out_width, g.kernel_w, g.stride_w, g.pad_left, g.dilation_w)),
      row_pixels_(width_),
      elements_(g.height * g.width * g.channels) {
  const int64_t group = g.channels / g.groups;
  group_bytes_ = use_bits ? ceil_div(group, 32) * 4 : group;
  pitch_ = group_bytes_ * g.groups;
  if (!use_bits && g.groups == 1) pitch_ = tap;
  if (g.depthwise()) pitch_ = round_up(g.channels, kPanel);  // the microkernel reads whole panels
  plane_bytes_ = height_ * width_ * pitch_;
  const int64_t pixels = g.batch * planes_ * height_ * width_;
  scratch.cut(piece(codes_, pixels * pitch_ + kVectorBytes),
              piece(mask_, use_bits && padded() ? plane_bytes_ + kVectorBytes : 0),
              piece(sums_, want_sums ? pixels * g.groups : 0), piece(seen_, g.batch),
              piece(scale_, g.batch), piece(inverse_, g.batch));
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
  const int index = own ? 0 : thread, parts = own ? 1 : team;
  const auto barrier = [&] { team_barrier(parts); };

  for (int64_t i = images.begin; i < images.end; ++i) {
    if (!fixed_.fixed) {
      const Range mine = part(elements_, index, parts);
      see(i,
          unit_amax(kernel_, activation_, x + i * elements_ + mine.begin, mine.end - mine.begin));
      if (own) scale_image(x, i);
    }
    if (own) encode_rows(x + i * elements_, i, 0, height_);
  }
  if (!own) {
    if (!fixed_.fixed) {
      barrier();
      for (int64_t i = thread; i < geometry_.batch; i += team) scale_image(x, i);
      barrier();
    }
    for (int64_t i = 0; i < geometry_.batch; ++i) {
      const Range mine = part(height_, index, parts);
      encode_rows(x + i * elements_, i, mine.begin, mine.end);
    }
  }
  if (mask_) {
    const Range mine = part(height_, thread, team);
    for (int64_t y = mine.begin; y < mine.end; ++y) mask_row(y);
  }
  // Images of their own are also what threads read afterwards, but for the mask.
  if (!own || mask_) team_barrier(team);
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

// Rows [begin, end) of the padded image.
void Images::encode_rows(const float* x, int64_t image, int64_t begin, int64_t end) {
  const Conv2dGeometry& g = geometry_;
  if (!use_bits_ && !g.x_channels_last)
    encode_planes(x, image, std::max(begin - g.pad_top, int64_t{0}),
                  std::min(end - g.pad_top, g.height));
  // From the end: what was searched last for the largest is still in the cache.
  for (int64_t y = end; y-- > begin;) {
    const int64_t in = y - g.pad_top;
    if (in < 0 || in >= g.height) {
      encode_padding(image, y, 0, width_);
      continue;
    }
    if (use_bits_)
      encode_bits(x + in * g.width * g.channels, image, y);
    else if (g.x_channels_last)
      encode_row(x + in * g.width * g.channels, image, y);
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

void Images::encode_bits(const float* x, int64_t image, int64_t y) {
  const Conv2dGeometry& g = geometry_;
  const int64_t count = g.width * g.channels;
  int64_t width = g.channels / g.groups;
  if (width % 32 == 0) width = count;  // no pixel ends within a dword: one run
  auto* out = reinterpret_cast<uint32_t*>(codes(image, 0, y, g.pad_left));
  for (const float* p = x; p < x + count; p += width, out += ceil_div(width, 32))
    see(image, lowbit::encode_bits(kernel_, fixed_, p, width, out));
}

UnitScale Images::unit(int64_t image) const {
  return fixed_.fixed ? fixed_ : UnitScale{scale_[image], inverse_[image]};
}

void Images::encode_row(const float* x, int64_t image, int64_t y) {
  const Conv2dGeometry& g = geometry_;
  const UnitScale unit = this->unit(image);
  int8_t* const q = codes(image, 0, y, g.pad_left);
  int8_t* const lo = planes_ == 2 ? codes(image, 1, y, g.pad_left) : nullptr;
  if (pitch_ == g.channels)
    return see(image, encode(kernel_, activation_, unit, x, g.width * g.channels, q, lo));
  const auto rest = static_cast<size_t>(pitch_ - g.channels);
  for (int64_t i = 0; i < g.width; ++i) {
    see(image, encode(kernel_, activation_, unit, x + i * g.channels, g.channels, q + i * pitch_,
                      lo + i * pitch_));
    std::memset(q + i * pitch_ + g.channels, 0, rest);
    if (lo) std::memset(lo + i * pitch_ + g.channels, 0, rest);
  }
}

// Rows [begin, end) of NCHW: 16 channels of 64 pixels at a time are encoded where they lie and
// transposed as codes.
void Images::encode_planes(const float* x, int64_t image, int64_t begin, int64_t end) {
  constexpr int kRun = 64, kChannels = 16;
  const Conv2dGeometry& g = geometry_;
  const int64_t pixels = g.height * g.width;
  const UnitScale unit = this->unit(image);
  uint32_t largest = 0;
  alignas(64) int8_t q[kChannels * kRun] = {}, lo[kChannels * kRun] = {};
  int8_t* to[2][kRun];
  for (int64_t at = begin * g.width; at < end * g.width; at += kRun) {
    const int count = static_cast<int>(std::min<int64_t>(kRun, end * g.width - at));
    for (int p = 0; p < planes_; ++p) {
      int64_t y = at / g.width, x_at = at % g.width;
      for (int64_t i = 0; i < count; ++i) {
        to[p][i] = codes(image, p, g.pad_top + y, g.pad_left + x_at);
        if (++x_at == g.width) ++y, x_at = 0;
      }
    }
    // What is written behind the channels is written again, by those before: from the last ones on.
    for (int64_t c = (pitch_ - 1) / kChannels * kChannels; c >= 0; c -= kChannels) {
      // Up to the pitch: the channels that only pad a pixel get codes of 0.
      for (int64_t i = 0; i < kChannels; ++i) {
        if (c + i < g.channels)
          largest = std::max(largest, encode(kernel_, activation_, unit, x + (c + i) * pixels + at,
                                             count, q + i * kRun, lo + i * kRun));
        else if (pitch_ > kChannels)  // else nothing else was there
          std::memset(q + i * kRun, 0, kRun), std::memset(lo + i * kRun, 0, kRun);
      }
      const int width = static_cast<int>(std::min<int64_t>(kChannels, pitch_ - c));
      for (int p = 0; p < planes_; ++p) kernel_.transpose16(p ? lo : q, count, width, to[p], c);
    }
  }
  see(image, largest);
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
