// Receptive fields as rows: K over (kh, kw, channels of a group), each tap padded to
// tap_channels(). What pads a tap, and what is behind the last one, is any code: its weights' codes
// are 0.
#pragma once

#include "images.h"

namespace lowbit {

class Columns {
 public:
  // Room for blocks of up to `block` output pixels, in `scratch`.
  Columns(const Kernel& kernel, const Conv2dGeometry& geometry, const Weights& weights,
          const Depth& depth, const Images& images, int64_t block, Scratch& scratch,
          bool want_sums = true, bool lines = false);

  // Whether rows are read where they are in the images, each output row apart: blocks are then
  // whole rows of outputs.
  static bool by_lines(const Kernel& kernel, const Conv2dGeometry& geometry, const Weights& weights,
                       const Depth& depth, const Images& images);

  // Whether sums of rows are made of sums of pixels.
  static bool wants_sums(const Conv2dGeometry& geometry, const Weights& weights,
                         const Depth& depth);

  // The rows of output pixels [first, first + count) of an image for one group. Valid until the
  // next call.
  Rows fill(int64_t image, int64_t first, int64_t count, int64_t group);

 private:
  // A run of output pixels of one row of the image.
  struct Run {
    int64_t row, count;  // the first one's place in the block, how many
    int64_t y, x;        // where its receptive field begins in the padded image
  };
  void gather(const Run& run, const int8_t* from, int64_t group, int8_t* to, int every);
  void add_sums(const Run& run, int64_t image, int64_t group);
  void sum_rows(const Rows& rows);
  void count_bits(const uint32_t* mask, int32_t* sums) const;
  void clear_padding(int64_t rows);
  Range steps_inside(int64_t y) const;

  const Kernel& kernel_;
  const Conv2dGeometry& geometry_;
  const Depth& depth_;
  const Images& images_;
  const int64_t k_, bytes_;    // of a row
  const int64_t width_, tap_;  // channels of a group, the same with padding
  const int64_t summed_;       // the codes of a row that are summed are the first ones
  const bool pixel_sums_, wants_sums_, clears_padding_;
  const bool lines_;     // see by_lines()
  const bool in_place_;  // the image's pixels are the rows: 1x1, stride 1, no padding
  int64_t pitch_, segment_bytes_, segment_count_;
  ptrdiff_t* segments_;
  int8_t *codes_, *mask_;
  int32_t* sums_;
  float* scale_;
  int64_t
      inside_steps_;  // of a row of the kernel; 0 where those outside the image are not left out
  Range* inside_;     // [row]: steps_inside()
};

}  // namespace lowbit
