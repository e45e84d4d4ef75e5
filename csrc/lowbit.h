// The whole C++ surface: raw pointers and sizes, no torch, no Python.
//
// Numerics are stated in README.md beside this file; every ISA gives the same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "formats.h"

namespace lowbit {

// The packed weights of a layer, as its state dict holds them.
struct Weights {
  Format format;
  int64_t n;                    // output channels (of all groups of a convolution)
  int64_t k;                    // depth, padding inside taps included
  int64_t group_size;           // 0: per channel; else a multiple of 32
  const uint8_t* packed;        // [ceil(n / 16), ceil(k / depth), 64]
  const float* scale;           // [n]
  const uint16_t* group_scale;  // float16 [ceil(n / 16), groups, 16], or null without groups
  const uint16_t* group_zero;   // float16, same shape, or null
  const float* bias;            // [n] or null
  Epilogue epilogue = Epilogue::none;
};

// Calibrated parameters of a layer's activations: code q means scale * (q - zero). The scale and
// its inverse are normal floats; the zero point is one of int8's codes, of other activations 0.
struct StaticActivation {
  float scale;
  int zero = 0;
};

// y [m, n] = x [m, k] * weights. Scale of the activations: one a row, or `fixed`; weights.bias is
// then what static_bias made.
void linear(const float* x, int64_t m, const Weights& weights, Activation activation, float* y,
            int threads, const StaticActivation* fixed = nullptr);

// What decides how many threads `linear` wakes: multiply-accumulates, or for a few rows, which wait
// for the weights, as many as take that long.
int64_t linear_work(int64_t m, const Weights& weights);

inline int64_t conv2d_blocks(int64_t out_channels, int64_t groups) {
  return kPanel % (out_channels / groups) == 0 && out_channels / groups < kPanel ? 1 : groups;
}

struct Conv2dGeometry {
  int64_t batch, height, width, channels;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w;
  int64_t pad_top, pad_left;  // what is missing below and to the right is implied by out_*
  int64_t dilation_h, dilation_w, groups;
  bool x_channels_last = true;  // NHWC, else NCHW
  bool y_channels_last = true;

  // How many matrices the weights are packed as: groups of 1, 2, 4 or 8 output channels share
  // panels, any others have panels of their own.
  int64_t blocks() const { return conv2d_blocks(out_channels, groups); }
  bool depthwise() const { return groups > 1 && groups == channels && groups == out_channels; }
};

// Depth that one tap of the kernel occupies in K: channels rounded up to whole vectors, so that a
// tap is a pointer; fewer channels than a vector holds are not padded (the taps are merged).
int64_t tap_channels(Format format, int64_t channels_per_group);

// K of a convolution in the packed layout: taps * tap_channels.
int64_t conv2d_depth(Format format, const Conv2dGeometry& geometry);

// Scale of the activations: one an image, or `fixed` as above. weights.k = conv2d_depth(). The
// weights are packed as geometry.blocks() matrices, one after the other.
void conv2d(const float* x, const Conv2dGeometry& geometry, const Weights& weights,
            Activation activation, float* y, int threads, const StaticActivation* fixed = nullptr);

// The bias that takes a zero point back, for `linear`, `conv2d` and all others that sum codes as
// they are: out[n] = bias[n] - scale * weight_scale[n] * zero * (sum of the values of channel n's
// weights), see README.md. Without a zero point it is the bias (or 0).
void static_bias(const Weights& weights, const StaticActivation& activation, float* out,
                 int threads);
void static_bias(const Weights& weights, const Conv2dGeometry& geometry,
                 const StaticActivation& activation, float* out, int threads);

// Codes [n, k] to the packed layout and back (pack.cpp).
int64_t packed_panels(int64_t n);
int64_t packed_steps(Format format, int64_t k);
void pack(const uint8_t* codes, int64_t n, int64_t k, Format format, uint8_t* packed);
void unpack(const uint8_t* packed, int64_t n, int64_t k, Format format, uint8_t* codes);
// Whether all that packed holds beyond the n x k codes is 0, as xnor kernels need.
bool padding_is_zero(const uint8_t* packed, int64_t n, int64_t k, Format format);

// Moves what a range holds to pages of 2 MB, as many as lie in it whole (pages.cpp): what reads
// weights from memory waits for the addresses of their pages. No byte and no address of it changes.
// Takes the time of some two copies. Returns how many bytes lie in them now; 0 where Linux refuses.
size_t move_to_huge_pages(const void* memory, size_t bytes);

// For each unit of weights x [units, length] (an output channel or a group) at scale[unit], codes
// low..high: out [units, 3] = sum of squared errors, sum of v * x, sum of v * v, where v is the
// value of the nearest code. Unit u counts what mask [masks, length] has as 1 in row u % masks; x
// is 0 where it has 0.
void fit_scales(const float* x, const float* mask, int64_t units, int64_t masks, int64_t length,
                const float* scale, Format format, int low, int high, float* out, int threads);

// The kernels that are built in, best first, and the one in use.
struct IsaInfo {
  std::string name;
  bool usable;
};
std::vector<IsaInfo> isas();
std::string isa();
void set_isa(const std::string& name);  // throws std::invalid_argument
std::string kernel_name(Format format, Activation activation);
std::string kernel_name(const std::string& isa, Format format, Activation activation);

// Ceilings of one core with the instructions of the ISA in use, in multiply-accumulates a second:
// "dot", "fma", "xnor".
double probe(const std::string& what, double seconds);
double read_bandwidth(int64_t bytes, int threads, double seconds);  // bytes a second

}  // namespace lowbit
