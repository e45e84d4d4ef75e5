// Images of codes: what a convolution reads instead of the float images.
#pragma once

#include <atomic>

#include "gemm.h"
#include "kernel.h"
#include "lowbit.h"
#include "scratch.h"

namespace lowbit {

// Codes are [image][plane][pixel][pitch] bytes, bits are [image][pixel][group][words] dwords (1
// where x < 0).
class Images {
 public:
  Images(const Kernel& kernel, const Conv2dGeometry& geometry, Activation activation, bool use_bits,
         Scratch& scratch);

  // Called by every thread of a team; ends with a barrier.
  void quantize(const float* x, int thread, int team);

  bool inside(int64_t y, int64_t x) const {
    return y >= 0 && y < geometry_.height && x >= 0 && x < geometry_.width;
  }
  // The channels of a pixel inside the image.
  const int8_t* pixel(int64_t image, int plane, int64_t y, int64_t x) const {
    return codes_ +
           (((image * planes_ + plane) * geometry_.height + y) * geometry_.width + x) * pitch_;
  }
  const uint32_t* bits(int64_t image, int64_t y, int64_t x, int64_t group) const {
    return bits_ +
           (((image * geometry_.height + y) * geometry_.width + x) * geometry_.groups + group) *
               words_;
  }

  bool use_bits() const { return bits_ != nullptr; }
  int planes() const { return planes_; }
  int64_t pitch() const { return pitch_; }  // bytes from a pixel's codes to the next one's
  int64_t words() const { return words_; }  // dwords of a group's channels
  float scale(int64_t image) const { return scale_[image]; }

 private:
  void encode_pixels(const float* x, int64_t image, int64_t begin, int64_t end);
  void encode_planes(const float* x, int64_t image, int64_t begin, int64_t end);

  const Kernel& kernel_;
  const Conv2dGeometry& geometry_;
  const Activation activation_;
  const int planes_;
  int64_t pitch_, words_, elements_;
  int8_t* codes_ = nullptr;
  uint32_t* bits_ = nullptr;
  std::atomic<uint32_t>* amax_;
  float *scale_, *inverse_;
};

}  // namespace lowbit
