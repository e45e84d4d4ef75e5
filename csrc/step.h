// What a program is made of: values, which are images of codes, and steps from value to value.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "gemm.h"
#include "lowbit.h"
#include "parallel.h"
#include "scratch.h"

namespace lowbit {

// An image of codes, NHWC: code q means scale * (q - zero). Tokens [N, T, C] have height 1.
struct CodeValue {
  int64_t channels, height, width;
  float scale;
  int zero;
};

#define LOWBIT_STEPS(X) \
  X(quantize)           \
  X(dequantize)         \
  X(conv)               \
  X(add)                \
  X(mul)                \
  X(concat)             \
  X(lut)                \
  X(max_pool)           \
  X(avg_pool)           \
  X(adaptive_avg_pool)  \
  X(pad)                \
  X(view)               \
  X(resize)

enum class StepOp : int {
#define X(name) name,
  LOWBIT_STEPS(X)
#undef X
};
inline constexpr const char* kStepOps[] = {
#define X(name) #name,
    LOWBIT_STEPS(X)
#undef X
};
inline constexpr int kStepOpCount = sizeof(kStepOps) / sizeof(kStepOps[0]);

// One step. What an operation has no use for stays as it is here.
struct Step {
  StepOp op = StepOp::view;
  std::vector<int> from;  // values: x; a and b; all that concat joins
  int to = -1;            // the value that it makes
  int64_t port = -1;      // of the program: input of quantize, output of dequantize or of conv
  // conv; pools take kernel, stride, padding and dilation from its geometry. Sizes of images are
  // the values', but where a conv's output is float.
  Conv2dGeometry geometry{};
  Weights weights{};
  Activation activation = Activation::int8;
  int residual = -1;
  bool has_table = false;
  float table_inverse = 0;
  int table_first = 0;
  std::vector<int8_t> table;  // also lut's 256
  bool include_pad = true;    // avg_pool
  int64_t top = 0, left = 0;  // pad
  int code = 0;
};

// Where a value lies in memory: with a border, its pixels `pitch` bytes apart. What is behind the
// channels of a pixel is any code; the border is the zero point.
struct CodeMap {
  int64_t channels, height, width;
  int64_t top = 0, left = 0;      // of the border
  int64_t rows = 0, columns = 0;  // with it
  int64_t pitch = 0;
  int64_t offset = 0;  // in the arena
  int zero = 0;

  int64_t row_bytes() const { return columns * pitch; }
  int64_t bytes() const { return rows * row_bytes(); }
  int8_t* pixel(int8_t* arena, int64_t y, int64_t x) const {
    return arena + offset + (y + top) * row_bytes() + (x + left) * pitch;
  }
  bool dense() const { return pitch == channels && rows == height && columns == width; }
};

// A program's input or output: float32, dense.
struct FloatImages {
  float* data;
  bool channels_last;
};

// One image on its way through a program.
struct Frame {
  int8_t* arena;
  std::atomic<bool>* not_finite;  // of an input, something: the image's outputs are NaN
  const FloatImages *inputs, *outputs;
  int64_t image;
};

// A step, prepared.
class Executor {
 public:
  virtual ~Executor() = default;
  // Part `thread` of `team`: what the parts read and write is apart.
  virtual void run(const Frame& frame, int thread, int team) const = 0;
  // About how many multiply-accumulates it is worth, for how many threads share it.
  virtual int64_t work() const = 0;
};

// Rows [begin, end) of the border of an image, the border's rows above and below counted.
void fill_border(const CodeMap& map, int8_t* arena, int thread, int team);

// How a value's codes are made of floats, ReLU and ReLU6 included.
Requantize requantize_to(const CodeValue& value, Epilogue epilogue);

// A block of pixels [first, first + count) of `pixels`, all channels, y [count][channels], to a
// program's output; NaN where the image is not finite, as y is then, too.
void put_floats(const Kernel& kernel, const Frame& frame, int64_t port, int64_t pixels,
                int64_t channels, int64_t first, int64_t count, float* y);

}  // namespace lowbit
