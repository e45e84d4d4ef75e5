// Quantizing activations, and the epilogue: plain loops that the compiler vectorizes for the ISA's
// flags. They use IEEE single operations alone, in a fixed order and without contraction, so every
// ISA gives the same bits.

inline uint32_t bits_of(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}

inline float float_of(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}

// x rounded to the nearest even integer sits in the low bits of x + 1.5 * 2^23, for |x| < 2^22.
constexpr float kRound = 12582912.0f;
constexpr uint32_t kRoundBits = 0x4B400000u;

uint32_t amax_bits(const float* x, int64_t n) {
  uint32_t m = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t u = bits_of(x[i]) & 0x7fffffffu;
    m = u > m ? u : m;
  }
  return m;
}

// 16 strided lanes, added pairwise: the order of every float sum.
inline float sum_lanes(float (&lane)[16]) {
  for (int width = 8; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
  return lane[0];
}

inline float absolute(float x) { return float_of(bits_of(x) & 0x7fffffffu); }

void add_abs(const float* x, int64_t n, int64_t at, float* lanes) {
  int64_t i = 0;
  for (; i < n && (at + i) % 16; ++i) lanes[(at + i) % 16] += absolute(x[i]);
  // Registers: an array of floats would go through memory at each addition.
  FloatReg lane[16 / kLanes];
  LOWBIT_UNROLL for (int j = 0; j < 16 / kLanes; ++j) lane[j] = float_load(lanes + j * kLanes);
  for (; i + 16 <= n; i += 16)
    LOWBIT_UNROLL for (int j = 0; j < 16 / kLanes; ++j) lane[j] =
        float_add(lane[j], magnitude(float_load(x + i + j * kLanes)));
  LOWBIT_UNROLL for (int j = 0; j < 16 / kLanes; ++j) float_store(lanes + j * kLanes, lane[j]);
  for (int j = 0; i + j < n; ++j) lanes[j] += absolute(x[i + j]);
}

void fit(const float* x, const float* mask, int64_t n, float scale, float low, float high,
         float mul, float add, float* out) {
  float error[16] = {}, product[16] = {}, power[16] = {};
  const float inverse = 1.0f / scale, inverse_mul = 1.0f / mul;
  const auto take = [&](int64_t i, int j) {
    float code = (x[i] * inverse - add) * inverse_mul;
    code = code < low ? low : code;
    code = code > high ? high : code;
    const float v = (mul * (code + kRound - kRound) + add) * mask[i], e = x[i] - scale * v;
    error[j] += e * e;
    product[j] += v * x[i];
    power[j] += v * v;
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int j = 0; j < 16; ++j) take(i + j, j);
  for (int j = 0; i + j < n; ++j) take(i + j, j);
  out[0] = sum_lanes(error);
  out[1] = sum_lanes(product);
  out[2] = sum_lanes(power);
}

void quantize8(const float* x, int64_t n, float inverse_scale, int8_t* q) {
  for (int64_t i = 0; i < n; ++i)
    q[i] = static_cast<int8_t>(bits_of(x[i] * inverse_scale + kRound));
}

// Two rows at once: the codes of one, and the largest |x| of the next, which comes from memory
// meanwhile.
template <bool Next>
LOWBIT_INLINE int32_t quantize_and_sum(const float* x, int64_t n, float inverse_scale, int8_t* q,
                                       const float* next, uint32_t& largest) {
  int32_t sum = 0;
  uint32_t most = largest;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t v = bits_of(x[i] * inverse_scale + kRound);
    q[i] = static_cast<int8_t>(v);
    sum += static_cast<int32_t>(v - kRoundBits);
    if constexpr (Next) {
      const uint32_t u = bits_of(next[i]) & 0x7fffffffu;
      most = u > most ? u : most;
    }
  }
  largest = most;
  return sum;
}

int32_t quantize_row8(const float* x, int64_t n, float inverse_scale, int8_t* q, const float* next,
                      uint32_t* amax) {
  constexpr int64_t kBlock = 512, kAhead = 1024, kLine = 64 / sizeof(float);
  uint32_t largest = 0;
  int32_t sum = 0;
  if (!next) return quantize_and_sum<false>(x, n, inverse_scale, q, next, largest);
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    for (int64_t j = 0; j < kBlock; j += kLine) __builtin_prefetch(next + i + kAhead + j);
    sum += quantize_and_sum<true>(x + i, kBlock, inverse_scale, q + i, next + i, largest);
  }
  sum += quantize_and_sum<true>(x + i, n - i, inverse_scale, q + i, next + i, largest);
  *amax = largest;
  return sum;
}

void quantize16(const float* x, int64_t n, float inverse_scale, int8_t* hi, int8_t* lo) {
  for (int64_t i = 0; i < n; ++i) {
    const int32_t q = static_cast<int32_t>(bits_of(x[i] * inverse_scale + kRound) - kRoundBits);
    const int8_t low = static_cast<int8_t>(q);
    lo[i] = low;
    hi[i] = static_cast<int8_t>((q - low) >> 8);
  }
}

// clamp(round(x * inverse_scale), low, high), in the low bits of what comes back as of kRound. The
// bounds are integers, so clamping first gives the same, and keeps what is huge out of the bits.
inline uint32_t saturated(float x, float inverse_scale, float low, float high) {
  float v = x * inverse_scale;
  v = v > low ? v : low;  // in this order a NaN becomes the bound
  v = v < high ? v : high;
  return bits_of(v + kRound);
}

uint32_t saturate8(const float* x, int64_t n, float inverse_scale, int zero, int8_t* q) {
  const float low = static_cast<float>(-128 - zero), high = static_cast<float>(127 - zero);
  const uint32_t add = static_cast<uint32_t>(zero);
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t u = bits_of(x[i]) & 0x7fffffffu;
    largest = u > largest ? u : largest;
    q[i] = static_cast<int8_t>(saturated(x[i], inverse_scale, low, high) + add);
  }
  return largest;
}

uint32_t saturate16(const float* x, int64_t n, float inverse_scale, int8_t* hi, int8_t* lo) {
  constexpr float kLargest = 32639.0f;
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t u = bits_of(x[i]) & 0x7fffffffu;
    largest = u > largest ? u : largest;
    const int32_t q =
        static_cast<int32_t>(saturated(x[i], inverse_scale, -kLargest, kLargest) - kRoundBits);
    const int8_t low = static_cast<int8_t>(q);
    lo[i] = low;
    hi[i] = static_cast<int8_t>((q - low) >> 8);
  }
  return largest;
}

void binarize(const float* x, int64_t n, int8_t* q) {
  for (int64_t i = 0; i < n; ++i) q[i] = x[i] >= 0.0f ? 1 : -1;
}

// Bit b4 b3 b2 b1 b0 of x moves to b0 b4 b3 b2 b1 (Warren, "Hacker's Delight", 7-2: outer
// unshuffle).
inline uint32_t unshuffle(uint32_t x) {
  uint32_t t = (x ^ (x >> 1)) & 0x22222222u;
  x ^= t ^ (t << 1);
  t = (x ^ (x >> 2)) & 0x0c0c0c0cu;
  x ^= t ^ (t << 2);
  t = (x ^ (x >> 4)) & 0x00f000f0u;
  x ^= t ^ (t << 4);
  t = (x ^ (x >> 8)) & 0x0000ff00u;
  return x ^ t ^ (t << 8);
}

// Sign bits of 32 floats, the first one's lowest; with Sum, |x| is added to `lane`.
template <bool Sum>
LOWBIT_INLINE uint32_t sign_bits(const float* x, FloatReg (&lane)[16 / kLanes]) {
  uint32_t word = 0;
  LOWBIT_UNROLL for (int k = 0; k < 32; k += kLanes) {
    const FloatReg v = float_load(x + k);
    word |= negative(v) << k;
    if constexpr (Sum) {
      FloatReg& sum = lane[k / kLanes % (16 / kLanes)];
      sum = float_add(sum, magnitude(v));
    }
  }
  return word;
}

// R rows, `x_pitch` and `pitch` apart: one alone waits for its additions, each of which needs the
// one before.
template <bool Sum, int R>
LOWBIT_INLINE void sign_words(const float* x, ptrdiff_t x_pitch, int64_t words, uint32_t* bits,
                              ptrdiff_t pitch, float* lanes) {
  FloatReg lane[R][16 / kLanes];
  if constexpr (Sum)
    LOWBIT_UNROLL for (int r = 0; r < R; ++r) LOWBIT_UNROLL for (int i = 0; i < 16 / kLanes; ++i)
        lane[r][i] = float_load(lanes + r * 16 + i * kLanes);
  for (int64_t w = 0; w < words; ++w)
    LOWBIT_UNROLL for (int r = 0; r < R; ++r) bits[r * pitch + w] =
        sign_bits<Sum>(x + r * x_pitch + 32 * w, lane[r]);
  if constexpr (Sum)
    LOWBIT_UNROLL for (int r = 0; r < R; ++r) LOWBIT_UNROLL for (int i = 0; i < 16 / kLanes; ++i)
        float_store(lanes + r * 16 + i * kLanes, lane[r][i]);
}

// What sign_words leaves of a row, whose bits then get the order of the W1 layout: bit 8j + p of a
// dword is k = 4p + j, which is k with its two low bits in front. In a pass of its own, so that it
// is vectorized over words.
inline void finish_bits(const float* x, int64_t n, uint32_t* bits, float* lanes) {
  const int64_t words = n / 32, rest = n % 32;
  if (rest) {
    uint32_t word = 0;
    for (int64_t k = 0; k < rest; ++k) word |= x[32 * words + k] >= 0.0f ? 0u : 1u << k;
    bits[words] = word;
    if (lanes) add_abs(x + 32 * words, rest, 0, lanes);
  }
  for (int64_t w = 0; w < words + (rest > 0); ++w) bits[w] = unshuffle(unshuffle(bits[w]));
}

void binarize_bits(const float* x, int64_t n, uint32_t* bits, float* lanes) {
  if (lanes)
    sign_words<true, 1>(x, 0, n / 32, bits, 0, lanes);
  else
    sign_words<false, 1>(x, 0, n / 32, bits, 0, lanes);
  finish_bits(x, n, bits, lanes);
}

void binarize_rows(const float* x, int64_t n, uint32_t* bits, ptrdiff_t pitch, float* lanes) {
  sign_words<true, kBitRows>(x, n, n / 32, bits, pitch, lanes);
  for (int r = 0; r < kBitRows; ++r) finish_bits(x + r * n, n, bits + r * pitch, lanes + r * 16);
}

void to_float(int rows, const int32_t* sums, float* f) {
  for (int i = 0; i < rows * kNr; ++i) f[i] = static_cast<float>(sums[i]);
}

void widen(int rows, int planes, const int32_t* sums, double* wide) {
  for (int r = 0; r < rows; ++r, sums += planes * kNr, wide += kNr) {
    if (planes == 1) {
      for (int c = 0; c < kNr; ++c) wide[c] += sums[c];
    } else {
      for (int c = 0; c < kNr; ++c) wide[c] += 256.0 * sums[c] + sums[c + kNr];
    }
  }
}

void narrow(int rows, const double* wide, float* f) {
  for (int i = 0; i < rows * kNr; ++i) f[i] = static_cast<float>(wide[i]);
}

void madd(int rows, const float* scale, const float* x, float* f) {
  for (int r = 0; r < rows; ++r, x += kNr, f += kNr)
    for (int c = 0; c < kNr; ++c) f[c] = __builtin_fmaf(scale[c], x[c], f[c]);
}

void finish(int rows, int cols, const float* f, const float* row_scale, const float* scale,
            const float* bias, float* y, ptrdiff_t y_pitch) {
  for (int r = 0; r < rows; ++r, f += kNr, y += y_pitch) {
    const float s = row_scale[r];
    if (bias) {
      for (int c = 0; c < cols; ++c) y[c] = __builtin_fmaf(f[c], s * scale[c], bias[c]);
    } else {
      for (int c = 0; c < cols; ++c) y[c] = __builtin_fmaf(f[c], s * scale[c], 0.0f);
    }
  }
}

template <class Call>
inline void apply_each(int64_t rows, int64_t cols, float* y, ptrdiff_t y_pitch, Call call) {
  if (y_pitch == cols) cols *= rows, rows = 1;
  for (int64_t r = 0; r < rows; ++r, y += y_pitch)
    for (int64_t c = 0; c < cols; ++c) y[c] = call(y[c]);
}

void apply(Epilogue epilogue, int64_t rows, int64_t cols, float* y, ptrdiff_t y_pitch) {
  const auto relu = [](float v) { return 0.0f > v ? 0.0f : v; };
  const auto relu6 = [relu](float v) {
    const float above = relu(v);
    return above > 6.0f ? 6.0f : above;
  };
  switch (epilogue) {
    case Epilogue::none:
      return;
    case Epilogue::relu:
      return apply_each(rows, cols, y, y_pitch, relu);
    case Epilogue::relu6:
      return apply_each(rows, cols, y, y_pitch, relu6);
    case Epilogue::hardswish:
      return apply_each(rows, cols, y, y_pitch,
                        [relu6](float v) { return v * relu6(v + 3.0f) / 6.0f; });
  }
}

void widen_scales(const uint16_t* from, ptrdiff_t stride, int panels, float* to) {
  for (int p = 0; p < panels; ++p)
    for (int v = 0; v < kPanel; v += kLanes)
      float_store(to + p * kPanel + v, half_load(from + p * stride + v));
}

uint64_t read_all(const void* p, int64_t bytes) {
  const uint64_t* q = static_cast<const uint64_t*>(p);
  uint64_t lane[32] = {};
  for (int64_t i = 0; i + 32 <= bytes / 8; i += 32) {
    LOWBIT_UNROLL for (int v = 0; v < 4; ++v) __builtin_prefetch(q + i + 512 + 8 * v);
    for (int j = 0; j < 32; ++j) lane[j] += q[i + j];
  }
  uint64_t total = 0;
  for (uint64_t v : lane) total += v;
  return total;
}

#include "planes.inl"
#include "requantize.inl"
