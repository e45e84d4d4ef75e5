#include "gemm.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

namespace lowbit {

Depth::Depth(Format format, int64_t k, int64_t group_size)
    : k_(k),
      depth_(traits(format).depth()),
      group_k_(group_size ? group_size : std::max<int64_t>(k, 1)) {
  chunk_k_ = std::min(group_k_, kChunk);
  groups = std::max<int64_t>(ceil_div(k, group_k_), 1);
  chunks_per_group = ceil_div(group_k_, chunk_k_);
  steps = ceil_div(k, depth_);
  group_steps = group_size ? group_size / depth_ : steps;
}

Depth::Chunk Depth::chunk(int64_t group, int64_t index) const {
  const int64_t end = std::min(k_, (group + 1) * group_k_);
  const int64_t first = std::min(end, group * group_k_ + index * chunk_k_);
  const int64_t last = std::min(end, first + chunk_k_);
  return {first / depth_, ceil_div(last - first, depth_), first, last - first};
}

void Depth::sum(const Kernel& kernel, const int8_t* codes, int32_t* sums) const {
  if (k_ == 0) *sums = 0;
  if (chunks_per_group == 1) return kernel.sum_groups(codes, k_, group_k_, sums);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t i = 0; i < chunks_per_group; ++i) {
      const Chunk c = chunk(g, i);
      kernel.sum_groups(codes + c.k, c.size, std::max<int64_t>(c.size, 1), sums++);
    }
}

Weights centre(const Weights& weights, int64_t channels, Scratch& scratch, const int32_t*& seed) {
  const int64_t steps = packed_steps(weights.format, weights.k);
  const int64_t panels = packed_panels(weights.n), tap = tap_channels(weights.format, channels);
  uint8_t* w;
  int32_t* sums;
  scratch.cut(piece(w, panels * steps * kVectorBytes), piece(sums, panels * kPanel));
  Weights own = weights;
  own.packed = w;
  seed = sums;
  const uint8_t* from = weights.packed;
  for (int64_t p = 0; p < panels; ++p, sums += kPanel) {
    std::fill_n(sums, kPanel, 0);
    for (int64_t s = 0; s < steps; ++s, from += kVectorBytes, w += kVectorBytes)
      for (int64_t j = 0; j < 4; ++j) {
        const int64_t k = 4 * s + j;
        const bool used = k < weights.k && k % tap < channels;
        for (int64_t n = 0; n < kPanel; ++n) {
          const uint8_t code = used ? from[4 * n + j] ^ 0x80 : uint8_t{0};
          w[4 * n + j] = code;
          sums[n] -= 128 * static_cast<int8_t>(code);
        }
      }
  }
  return own;
}

namespace {

// `count` floats that may be read up to a multiple of 16: copied to `room` where they end earlier.
const float* padded(const float* from, int count, float* room) {
  if (count % kPanel == 0) return from;
  std::fill_n(std::copy_n(from, count, room), round_up(count, kPanel) - count, 0.0f);
  return room;
}

// How far ahead a tile that takes all rows prefetches: one or two rows wait for memory alone.
// Measured, see README.md.
constexpr int64_t prefetch_steps(int rows) { return rows <= 2 ? 128 : 64; }

// Whether such a tile had better prefetch the memory's next `block` bytes, as many as it reads of
// panels side by side: the prefetcher of the second cache follows one stream only. Meanwhile the
// first cache holds both blocks, unless products of a vector of weights take long enough.
constexpr bool fetches_in_order(int rows, int64_t products, int64_t block) {
  const int64_t most = products >= 16 ? INT64_MAX : products >= 8 ? 48 << 10 : 20 << 10;
  return block < most && (rows > 2 || products >= 4);
}

// Lines of a far output come from L3 or memory, which takes longer than a tile of few products of a
// row and a vector: so many tiles ahead are they fetched, unless tiles are a line wide, which share
// sets of the cache. Measured, see README.md.
constexpr int tiles_ahead(int64_t products) {
  return products < 8 ? 4 : products < 24 ? 2 : products < 40 ? 1 : 0;
}

// Up to so many tall tiles, where reading the weights once or from the first cache counts most; and
// any number of them where the channels are no more.
constexpr int64_t kTallTiles = 2;

// Up to this size, tiles small enough to combine groups in registers are faster than larger ones.
constexpr int64_t kShortGroup = 64;

// The same where there are more rows than tall tiles take otherwise, and so many groups.
constexpr int64_t kLongGroup = 128, kManyGroups = 16;

// A block of channels of one thread, and its tiles.
class Block {
 public:
  // `codes`: null where outputs are floats.
  Block(const Kernel& kernel, const Weights& weights, const Depth& depth, const Rows& rows,
        const CodeRows* codes, Scratch& scratch)
      : kernel_(kernel),
        weights_(weights),
        depth_(depth),
        rows_(rows),
        codes_(codes),
        short_groups_(combines_groups()),
        tall_(short_groups_ ||
              (!rows.line && (rows.count * rows.planes <= tall_tiles() * kernel.tall_mr ||
                              weights.n <= kernel.tall_nr))),
        width_(tall_ ? kernel.tall_nr : kernel.nr),
        line_(rows.line ? rows.line : rows.count),
        line_tiles_(ceil_div(line_, tile_rows() / rows.planes)),
        tiles_(line_tiles_ * (line_ ? rows.count / line_ : 1)),
        least_(line_tiles_ ? line_ / line_tiles_ : 0),
        longer_(line_ - least_ * line_tiles_),
        each_(tiles_ ? ceil_div(width_ / kPanel, tiles_) : 0),
        fields_(rows.bits ? 1 : traits(weights.format).planes()),
        tiles_ahead_(rows.far && kernel.nr > kPanel ? tiles_ahead(depth.steps * fields_) : 0) {
    const int64_t size = int64_t{kernel.tall_mr} * kernel.nr;
    const int64_t code_rows = rows.count * rows.planes;
    const bool zeros = weights.group_zero;
    const bool in_tile = fits_tile();
    in_registers_ =
        codes && in_tile && codes->to->in_registers() && (codes->whole || weights.n % kPanel == 0);
    // A block is no wider than a tile where its channels need padding.
    const int64_t bias = weights.bias ? kernel.nr : std::max<int64_t>(weights.n, kernel.nr);
    scratch.cut(piece(scale_, kernel.nr), piece(bias_, bias),
                piece(offset_, code_rows * depth.chunks()),
                piece(group_sum_, zeros * rows.count * depth.groups), piece(out_, size),
                piece(sums_, in_tile ? 0 : size), piece(wide_, in_tile ? 0 : size),
                piece(value_, in_tile ? 0 : size), piece(total_, in_tile ? 0 : size),
                piece(factor_, in_tile ? 0 : kernel.nr),
                piece(tile_.room, kernel.room(depth.steps * traits(weights.format).depth())));
    const int add = traits(weights.format).add;
    centred_ = rows.seed;
    for (int64_t i = 0; i < code_rows * depth.chunks() && !centred_; ++i)
      offset_[i] = add * rows.sums[i];
    if (zeros) sum_groups();
    if (!weights.bias) std::fill_n(bias_, bias, 0.0f);

    tile_.tall = tall_;
    tile_.planes = rows.planes;
    tile_.pitch = rows.pitch;
    tile_.panel_stride = depth.steps * kVectorBytes;
    tile_.offset_pitch = depth.chunks();
    tile_.sums = sums_;  // null where a tile does everything
    tile_.groups = in_tile ? depth.groups : 1;
    tile_.group_steps = depth.group_steps;
    tile_.steps = depth.steps;
    tile_.bias_pitch = rows.bias ? kPanel : 0;
    tile_.segments = rows.segments;
    tile_.segment_steps = rows.segment_steps;
    if (in_registers_) tile_.requantize = codes->to;
    tile_.stored = in_registers_ || rows.bias;
  }

  int64_t tiles() const { return tiles_; }

  // Takes the channels from c0 on, and returns how many: those of a tile, or where one tile of rows
  // reads them, all whole panels.
  int64_t set_channels(int64_t c0, int64_t end) {
    const int64_t whole = (end - c0) / kPanel * kPanel;
    const bool all = tiles_ == 1 && !sums_ && (!codes_ || in_registers_);
    const int64_t count = std::min(end - c0, all ? std::max<int64_t>(whole, width_) : width_);
    c0_ = c0;
    if (centred_) tile_.seed = rows_.seed + c0;
    cols_ = static_cast<int>(count);
    tile_.panels = (cols_ + kPanel - 1) / kPanel;
    packed_ = weights_.packed + c0 / kPanel * tile_.panel_stride;
    tile_.scale = padded(weights_.scale + c0, cols_, scale_);
    tile_.bias = weights_.bias ? padded(weights_.bias + c0, cols_, bias_) : bias_;
    if (weights_.group_scale) tile_.group_scale = weights_.group_scale + c0 * depth_.groups;
    if (weights_.group_zero) tile_.group_zero = weights_.group_zero + c0 * depth_.groups;
    return count;
  }

  // The row behind a tile's last one.
  int64_t end_of(int64_t index) const { return rows_of(index).end; }

  // y: of the first row and the block's first channel.
  void run(int64_t index, float* y, ptrdiff_t y_pitch) {
    const int64_t first = rows_of(index).begin;
    const int rows = set_rows(index);
    float* const out = y + first * y_pitch;
    if (sums_) return run_in_parts(first, rows, out, y_pitch);

    set_tile(first, rows);
    const bool whole = cols_ % kPanel == 0;
    tile_.y = whole ? out : out_;
    tile_.y_pitch = whole ? y_pitch : kernel_.nr;
    tile_.y_fetched = tile_.y + (whole ? tiles_ahead_ * rows * y_pitch : 0);
    dot();
    if (whole) return;
    for (int i = 0; i < rows; ++i) std::copy_n(out_ + i * kernel_.nr, cols_, out + i * y_pitch);
  }

  // The same to codes.
  void run(int64_t index) {
    const int64_t first = rows_of(index).begin;
    const int rows = set_rows(index);
    int8_t* const* const q = codes_->q + first;
    const int8_t* const* const residual = codes_->residual ? codes_->residual + first : nullptr;
    if (in_registers_) {
      tile_.q = q;
      tile_.residual = residual;
      tile_.q_first = codes_->first + c0_;
      set_tile(first, rows);
      return dot();
    }
    if (sums_) {
      run_in_parts(first, rows, out_, kernel_.nr);
    } else {
      set_tile(first, rows);
      tile_.y_fetched = tile_.y = out_;
      tile_.y_pitch = kernel_.nr;
      dot();
    }
    kernel_.requantize(*codes_->to, rows, cols_, codes_->first + c0_, out_, kernel_.nr, residual,
                       q);
  }

 private:
  // Of a tile; none is much smaller than the rest of its line. Tiles are short: no divisions where
  // there is one line.
  Range rows_of(int64_t index) const {
    int64_t first = 0;
    if (line_tiles_ < tiles_) {
      const int64_t line = index / line_tiles_;
      first = line * line_;
      index -= line * line_tiles_;
    }
    first += index * least_ + std::min(index, longer_);
    return {first, first + least_ + (index < longer_)};
  }

  // Those of a tile, and how many.
  int set_rows(int64_t index) {
    const Range r = rows_of(index);
    const int rows = static_cast<int>(r.end - r.begin);
    tile_.rows = rows * rows_.planes;
    set_prefetch(index);
    tile_.row_scale = rows_.scale + r.begin;
    if (rows_.bias) tile_.bias = rows_.bias + r.begin * kPanel;
    return rows;
  }

  int tile_rows() const {
    return short_groups_ ? kernel_.group_mr : tall_ ? kernel_.tall_mr : kernel_.mr;
  }

  // Rows with a bias of their own read activations of many pixels, which no tile reads once.
  int64_t tall_tiles() const { return rows_.bias ? 1 : kTallTiles; }

  // Whether tiles are small enough to combine groups in registers.
  bool combines_groups() const {
    if (!kernel_.group_mr || !weights_.group_scale || rows_.planes > 1 || !fits_tile())
      return false;
    return weights_.group_size <= kShortGroup ||
           (weights_.group_size <= kLongGroup && depth_.groups >= kManyGroups &&
            rows_.count > kTallTiles * kernel_.tall_mr);
  }

  // Whether a group's sum stays within int32: one chunk, and of int16 activations 256 * hi + lo.
  bool fits_tile() const {
    if (depth_.chunks_per_group > 1) return false;
    constexpr int64_t kMax16 = 128 * 256 + 128;
    return rows_.planes == 1 ||
           kMax16 * traits(weights_.format).largest() * depth_.chunk(0, 0).size < INT32_MAX;
  }

  // A tile that takes all rows reads its panels from memory, in order: it fetches what comes soon.
  // Of several, the last ones fetch the next block.
  void set_prefetch(int64_t index) {
    const int64_t panels = width_ / kPanel;
    const int64_t first = tiles_ >= panels ? index - (tiles_ - panels) : index * each_;
    tile_.fetch = static_cast<int>(first < 0 ? 0 : std::clamp<int64_t>(panels - first, 0, each_));
    tile_.in_order = tiles_ == 1 && fetches_in_order(tile_.rows, tile_.rows * fields_,
                                                     panels * tile_.panel_stride);
    ahead_ = tiles_ == 1 ? prefetch_steps(tile_.rows) * kVectorBytes
                         : (panels + first) * tile_.panel_stride;
  }

  // All of K, or what of it is not 0 in all rows. Tiles are short: where it is all, `step` had
  // better be a constant.
  void set_tile(int64_t first, int rows) {
    if (!rows_.steps) return set_operands(first, 0, 0);
    const int64_t step = rows_.steps[first + rows - 1].begin;
    tile_.steps = tile_.group_steps = rows_.steps[first].end - step;
    if (rows_.segments) tile_.segments = rows_.segments + step / rows_.segment_steps;
    set_operands(first, step, 0);
  }

  void set_operands(int64_t first, int64_t step, int64_t chunk) {
    const ptrdiff_t row = first * rows_.planes;
    if (weights_.group_zero) tile_.group_sum = group_sum_ + first * depth_.groups;
    tile_.w = packed_ + step * kVectorBytes;
    tile_.ahead = tile_.w + ahead_;
    tile_.offset = offset_ + row * depth_.chunks() + chunk;
    if (rows_.bits) {
      const ptrdiff_t from = row * rows_.pitch + step;
      tile_.bits = rows_.bits + from;
      tile_.mask = rows_.mask ? rows_.mask + from : nullptr;
    } else {
      const ptrdiff_t lines = rows_.line ? row / line_ : 0;
      tile_.codes = rows_.codes + lines * rows_.line_pitch + (row - lines * line_) * rows_.pitch;
      if (!rows_.segments) tile_.codes += step * traits(weights_.format).depth();
    }
  }

  void dot() {
    if (centred_)
      kernel_.dot_centred(tile_);
    else if (rows_.bias)
      kernel_.dot_rows(tile_);
    else if (rows_.bits)
      kernel_.xnor(tile_);
    else
      kernel_.dot[static_cast<int>(weights_.format)](tile_);
  }

  // Sums that need more than int32: chunk by chunk, combined in float64.
  void run_in_parts(int64_t first, int rows, float* y, ptrdiff_t y_pitch) {
    const auto values = static_cast<size_t>(rows * kernel_.nr);
    std::memset(total_, 0, values * sizeof(float));
    for (int64_t g = 0; g < depth_.groups; ++g) {
      std::memset(wide_, 0, values * sizeof(double));
      for (int64_t i = 0; i < depth_.chunks_per_group; ++i) {
        const Depth::Chunk chunk = depth_.chunk(g, i);
        set_operands(first, chunk.step, g * depth_.chunks_per_group + i);
        tile_.steps = tile_.group_steps = chunk.steps;
        dot();
        kernel_.widen(rows, rows_.planes, sums_, wide_);
      }
      kernel_.narrow(rows, wide_, tile_.group_scale ? value_ : total_);
      if (tile_.group_scale) kernel_.madd(rows, factors(tile_.group_scale, g), value_, total_);
      if (!tile_.group_zero) continue;
      for (int r = 0; r < rows; ++r)
        std::fill_n(value_ + r * kernel_.nr, kernel_.nr,
                    group_sum_[(first + r) * depth_.groups + g]);
      kernel_.madd(rows, factors(tile_.group_zero, g), value_, total_);
    }
    kernel_.finish(rows, cols_, total_, tile_.row_scale, tile_.scale, tile_.bias, y, y_pitch);
  }

  // Of a group, for the block's channels.
  const float* factors(const uint16_t* from, int64_t group) const {
    kernel_.widen_scales(from + group * kPanel, depth_.groups * kPanel, tile_.panels, factor_);
    return factor_;
  }

  // group_sum_ = the exact sum of a group's activation codes, rounded once.
  void sum_groups() {
    const int32_t* s = rows_.sums;
    for (int64_t r = 0; r < rows_.count; ++r, s += rows_.planes * depth_.chunks())
      for (int64_t g = 0; g < depth_.groups; ++g) {
        double sum = 0;
        for (int64_t i = g * depth_.chunks_per_group; i < (g + 1) * depth_.chunks_per_group; ++i)
          sum += rows_.planes == 2 ? 256.0 * s[i] + s[depth_.chunks() + i] : s[i];
        group_sum_[r * depth_.groups + g] = static_cast<float>(sum);
      }
  }

  const Kernel& kernel_;
  const Weights& weights_;
  const Depth& depth_;
  const Rows& rows_;
  const CodeRows* const codes_;
  bool in_registers_, centred_;
  const bool short_groups_, tall_;
  const int64_t width_;                      // of a block, in channels
  const int64_t line_, line_tiles_, tiles_;  // rows and tiles of a line, tiles of all
  const int64_t least_, longer_;  // rows of a tile, and how many tiles of a line have one more
  const int64_t each_;            // so many panels of the next block does a tile fetch
  const int fields_;              // of a byte: products of a row and a vector of weights
  const int tiles_ahead_;         // see tiles_ahead()
  Tile tile_{};
  float *scale_, *bias_, *group_sum_, *out_, *value_, *total_, *factor_;
  int32_t *offset_, *sums_;
  double* wide_;
  int64_t c0_ = 0, ahead_ = 0;
  int cols_ = 0;
  const uint8_t* packed_ = nullptr;
};

}  // namespace

void gemm(const Kernel& kernel, const Weights& weights, const Depth& depth, const Rows& rows,
          int64_t begin, int64_t end, float* y, ptrdiff_t y_pitch) {
  static thread_local Scratch scratch;
  Block block(kernel, weights, depth, rows, nullptr, scratch);
  for (int64_t c = begin; c < end;) {
    const int64_t count = block.set_channels(c, end);
    for (int64_t t = 0; t < block.tiles(); ++t) block.run(t, y + c, y_pitch);
    kernel.apply(weights.epilogue, rows.count, count, y + c, y_pitch);
    c += count;
  }
}

namespace {

constexpr int64_t kSquare = 16, kMost = 64;  // rows that are transposed at once, from L1

// The lines of `channels` planes that begin behind rows [begin, end).
void fetch_planes(const PlaneRows& planes, Range channels, int64_t begin, int64_t end) {
  for (int64_t r = round_up(begin, kSquare); r < end; r += kSquare)
    for (int64_t c = channels.begin; c < channels.end; ++c)
      __builtin_prefetch(planes.y + c * planes.plane + r, 1);
}

}  // namespace

void gemm(const Kernel& kernel, const Weights& weights, const Depth& depth, const Rows& rows,
          int64_t begin, int64_t end, const PlaneRows& planes) {
  static thread_local Scratch scratch;
  Rows near = rows;  // tiles write to a room
  near.far = false;
  Block block(kernel, weights, depth, near, nullptr, scratch);
  for (int64_t c = begin; c < end;) {
    const int64_t count = block.set_channels(c, end);
    int64_t done = 0;
    for (int64_t t = 0, made = 0; t < block.tiles(); ++t) {
      const int64_t begun = std::exchange(made, block.end_of(t)), left = rows.count - made;
      if (rows.far) fetch_planes(planes, {c, c + count}, begun + kMost, made + kMost);
      block.run(t, planes.room, count);
      int64_t ready = left == 0 ? made : made / kSquare * kSquare;
      if (rows.count - ready < kSquare) ready -= left == 0 ? 0 : kSquare;  // squares to the end
      if (ready - done < kMost && left > 0) continue;
      float* const from = planes.room + done * count;
      kernel.apply(weights.epilogue, ready - done, count, from, count);
      kernel.transpose(ready - done, count, from, count, planes.y + c * planes.plane + done,
                       planes.plane);
      done = ready;
    }
    c += count;
  }
}

void gemm(const Kernel& kernel, const Weights& weights, const Depth& depth, const Rows& rows,
          int64_t begin, int64_t end, const CodeRows& codes) {
  static thread_local Scratch scratch;
  Block block(kernel, weights, depth, rows, &codes, scratch);
  for (int64_t c = begin; c < end;) {
    const int64_t count = block.set_channels(c, end);
    for (int64_t t = 0; t < block.tiles(); ++t) block.run(t);
    c += count;
  }
}

}  // namespace lowbit
