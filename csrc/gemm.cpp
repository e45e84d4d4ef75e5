#include "gemm.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"
#include "scratch.h"

namespace lowbit {

Depth::Depth(Format format, int64_t k, int64_t group_size)
    : k_(k),
      depth_(traits(format).depth()),
      group_k_(group_size ? group_size : std::max<int64_t>(k, 1)) {
  chunk_k_ = std::min(group_k_, kChunk);
  groups = std::max<int64_t>(ceil_div(k, group_k_), 1);
  chunks_per_group = ceil_div(group_k_, chunk_k_);
  steps = ceil_div(k, depth_);
}

Depth::Chunk Depth::chunk(int64_t group, int64_t index) const {
  const int64_t end = std::min(k_, (group + 1) * group_k_);
  const int64_t first = std::min(end, group * group_k_ + index * chunk_k_);
  const int64_t last = std::min(end, first + chunk_k_);
  return {first / depth_, ceil_div(last - first, depth_), first, last - first};
}

namespace {

// One tile of one thread: channels [c0, c0 + cols) of `count` rows from `first`.
class Tile {
 public:
  Tile(const Kernel& kernel, const Weights& weights, const Depth& depth, const Rows& rows,
       Scratch& scratch)
      : kernel_(kernel),
        weights_(weights),
        depth_(depth),
        rows_(rows),
        traits_(traits(weights.format)) {
    const int64_t size = int64_t{kernel.mr} * kernel.nr, scales = depth.groups * kernel.nr;
    scratch.cut(piece(acc_, size), piece(sum_, size), piece(total_, size), piece(row_sum_, size),
                piece(wide_, size), piece(offset_, kernel.mr), piece(group_scale_, scales),
                piece(group_zero_, scales));
  }

  void set_channels(int64_t c0, int64_t end) {
    c0_ = c0;
    cols_ = static_cast<int>(std::min<int64_t>(kernel_.nr, end - c0));
    panels_ = (cols_ + kPanel - 1) / kPanel;
    packed_ = weights_.packed + c0 / kPanel * depth_.steps * kVectorBytes;
    if (weights_.group_scale)
      kernel_.expand_groups(weights_.group_scale + c0 * depth_.groups, cols_, depth_.groups,
                            group_scale_);
    if (weights_.group_zero)
      kernel_.expand_groups(weights_.group_zero + c0 * depth_.groups, cols_, depth_.groups,
                            group_zero_);
  }

  void run(int64_t first, int count, float* y, ptrdiff_t y_pitch) {
    first_ = first;
    count_ = count;
    const float* f = sum_;
    if (!weights_.group_scale) {
      integer_sums(0);
    } else {
      std::memset(total_, 0, sizeof(float) * static_cast<size_t>(count_ * kernel_.nr));
      for (int64_t g = 0; g < depth_.groups; ++g) {
        integer_sums(g);
        kernel_.madd(count_, group_scale_ + g * kernel_.nr, sum_, total_);
        if (weights_.group_zero) {
          row_sums(g);
          kernel_.madd(count_, group_zero_ + g * kernel_.nr, row_sum_, total_);
        }
      }
      f = total_;
    }
    kernel_.finish(count_, cols_, f, rows_.scale + first_, weights_.scale + c0_,
                   weights_.bias ? weights_.bias + c0_ : nullptr, y + first_ * y_pitch + c0_,
                   y_pitch);
  }

 private:
  // sum_ = the exact integer sum of a group, rounded to float once.
  void integer_sums(int64_t group) {
    const int shift = traits_.shift();
    if (rows_.planes == 1 && depth_.chunks_per_group == 1) {
      dot(group, 0);
      return kernel_.to_float(count_, acc_, shift, offset_, sum_);
    }
    std::memset(wide_, 0, sizeof(double) * static_cast<size_t>(count_ * kernel_.nr));
    for (int64_t i = 0; i < depth_.chunks_per_group; ++i) {
      dot(group, i);
      kernel_.widen(count_, rows_.planes, acc_, shift, offset_, wide_);
    }
    kernel_.narrow(count_, wide_, sum_);
  }

  // acc_ = sums of code * activation over a chunk; offset_ = what the formats' `add` contributes.
  void dot(int64_t group, int64_t index) {
    const Depth::Chunk chunk = depth_.chunk(group, index);
    const int rows = count_ * rows_.planes;
    const int64_t row0 = first_ * rows_.planes;
    const int64_t at = group * depth_.chunks_per_group + index;
    for (int r = 0; r < rows; ++r)
      offset_[r] = traits_.add * rows_.sums[(row0 + r) * depth_.chunks() + at];
    const uint8_t* w = packed_ + chunk.step * kVectorBytes;
    const ptrdiff_t stride = depth_.steps * kVectorBytes;
    if (rows_.bits) {
      const ptrdiff_t from = row0 * rows_.pitch + chunk.step;
      kernel_.xnor(rows, rows_.bits + from, rows_.mask ? rows_.mask + from : nullptr, rows_.pitch,
                   w, stride, panels_, chunk.steps, acc_);
    } else {
      kernel_.dot[traits_.width_index()](rows, rows_.codes + row0 * rows_.pitch + chunk.k,
                                         rows_.pitch, w, stride, panels_, chunk.steps, acc_);
    }
  }

  // row_sum_ = the exact sum of a group's activation codes, rounded once, in every channel.
  void row_sums(int64_t group) {
    for (int r = 0; r < count_; ++r) {
      double sum = 0;
      for (int p = 0; p < rows_.planes; ++p) {
        const int32_t* s = rows_.sums + ((first_ + r) * rows_.planes + p) * depth_.chunks() +
                           group * depth_.chunks_per_group;
        for (int64_t i = 0; i < depth_.chunks_per_group; ++i)
          sum += (rows_.planes == 2 && p == 0 ? 256.0 : 1.0) * s[i];
      }
      std::fill_n(row_sum_ + r * kernel_.nr, kernel_.nr, static_cast<float>(sum));
    }
  }

  const Kernel& kernel_;
  const Weights& weights_;
  const Depth& depth_;
  const Rows& rows_;
  const FormatTraits& traits_;
  int32_t *acc_, *offset_;
  float *sum_, *total_, *row_sum_, *group_scale_, *group_zero_;
  double* wide_;
  int64_t c0_ = 0, first_ = 0;
  int cols_ = 0, panels_ = 0, count_ = 0;
  const uint8_t* packed_ = nullptr;
};

}  // namespace

void gemm(const Kernel& kernel, const Weights& weights, const Depth& depth, const Rows& rows,
          int64_t begin, int64_t end, float* y, ptrdiff_t y_pitch) {
  static thread_local Scratch scratch;
  Tile tile(kernel, weights, depth, rows, scratch);
  const int64_t tiles = ceil_div(rows.count, kernel.mr / rows.planes);
  for (int64_t c = begin; c < end; c += kernel.nr) {
    tile.set_channels(c, end);
    for (int64_t t = 0; t < tiles; ++t) {
      const Range r =
          part(rows.count, t, tiles);  // balanced: no tile is much smaller than the rest
      tile.run(r.begin, static_cast<int>(r.end - r.begin), y, y_pitch);
    }
  }
}

}  // namespace lowbit
