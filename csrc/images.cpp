#include "images.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "activations.h"
#include "parallel.h"

namespace lowbit {

Images::Images(const Kernel& kernel, const Conv2dGeometry& g, Activation activation, bool use_bits,
               Scratch& scratch)
    : kernel_(kernel),
      geometry_(g),
      activation_(activation),
      planes_(lowbit::planes(activation)),
      // The depthwise microkernel reads whole panels of channels.
      pitch_(g.depthwise() ? round_up(g.channels, kPanel) : g.channels),
      words_(ceil_div(g.channels / g.groups, 32)),
      elements_(g.height * g.width * g.channels) {
  const int64_t pixels = g.batch * g.height * g.width;
  const int64_t codes = use_bits ? 0 : pixels * planes_ * pitch_;
  const int64_t bits = use_bits ? pixels * g.groups * words_ : 0;
  scratch.cut(piece(codes_, codes), piece(bits_, bits), piece(amax_, g.batch),
              piece(scale_, g.batch), piece(inverse_, g.batch));
  for (int64_t i = 0; i < g.batch; ++i) new (amax_ + i) std::atomic<uint32_t>(0);
}

void Images::quantize(const float* x, int thread, int team) {
  const int64_t pixels = geometry_.height * geometry_.width;
  for (int64_t i = 0; i < geometry_.batch; ++i) {
    const Range mine = part(elements_, thread, team);
    const uint32_t largest =
        kernel_.amax_bits(x + i * elements_ + mine.begin, mine.end - mine.begin);
    uint32_t seen = amax_[i].load(std::memory_order_relaxed);
    while (seen < largest && !amax_[i].compare_exchange_weak(seen, largest)) {
    }
  }
  team_barrier(team);
  for (int64_t i = thread; i < geometry_.batch; i += team) {
    const UnitScale unit = unit_scale(kernel_, activation_, amax_[i], x + i * elements_, elements_);
    scale_[i] = unit.scale;
    inverse_[i] = unit.inverse;
  }
  team_barrier(team);
  for (int64_t i = 0; i < geometry_.batch; ++i) {
    const Range mine = part(pixels, thread, team);
    if (geometry_.x_channels_last)
      encode_pixels(x + i * elements_, i, mine.begin, mine.end);
    else
      encode_planes(x + i * elements_, i, mine.begin, mine.end);
  }
  team_barrier(team);
}

void Images::encode_pixels(const float* x, int64_t image, int64_t begin, int64_t end) {
  const int64_t channels = geometry_.channels, pixels = geometry_.height * geometry_.width;
  if (bits_) {
    int64_t width = channels / geometry_.groups;
    if (width % 32 == 0) width = (end - begin) * channels;  // no pixel ends within a dword: one run
    uint32_t* out = bits_ + (image * pixels + begin) * geometry_.groups * words_;
    for (const float* p = x + begin * channels; p < x + end * channels;
         p += width, out += ceil_div(width, 32))
      kernel_.binarize_bits(p, width, out);
    return;
  }
  const UnitScale unit{scale_[image], inverse_[image]};
  int8_t* q = codes_ + image * planes_ * pixels * pitch_;
  int8_t* lo = q + pixels * pitch_;
  if (pitch_ == channels)
    return encode(kernel_, activation_, unit, x + begin * channels, (end - begin) * channels,
                  q + begin * pitch_, lo + begin * pitch_);
  for (int64_t i = begin; i < end; ++i) {
    encode(kernel_, activation_, unit, x + i * channels, channels, q + i * pitch_, lo + i * pitch_);
    for (int p = 0; p < planes_; ++p)
      std::memset((p ? lo : q) + i * pitch_ + channels, 0, static_cast<size_t>(pitch_ - channels));
  }
}

// The same from NCHW: 4 channels of 64 pixels at a time are encoded where they lie and transposed
// as codes.
void Images::encode_planes(const float* x, int64_t image, int64_t begin, int64_t end) {
  constexpr int kRun = 64;
  const int64_t channels = geometry_.channels, pixels = geometry_.height * geometry_.width;
  const UnitScale unit{scale_[image], inverse_[image]};
  int8_t* codes = codes_ + image * planes_ * pixels * pitch_;
  alignas(64) int8_t q[4 * kRun] = {}, lo[4 * kRun] = {};
  for (int64_t at = begin; at < end; at += kRun) {
    const int count = static_cast<int>(std::min<int64_t>(kRun, end - at));
    // Up to the pitch: the channels that only pad a pixel get codes of 0.
    for (int64_t c = 0; c < pitch_; c += 4) {
      for (int64_t i = 0; i < 4; ++i) {
        if (c + i < channels)
          encode(kernel_, activation_, unit, x + (c + i) * pixels + at, count, q + i * kRun,
                 lo + i * kRun);
        else
          std::memset(q + i * kRun, 0, kRun), std::memset(lo + i * kRun, 0, kRun);
      }
      const int width = static_cast<int>(std::min<int64_t>(4, pitch_ - c));
      kernel_.transpose4(q, count, width, codes + at * pitch_ + c, pitch_);
      if (planes_ == 2)
        kernel_.transpose4(lo, count, width, codes + (pixels + at) * pitch_ + c, pitch_);
    }
  }
}

}  // namespace lowbit
