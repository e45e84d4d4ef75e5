// Steps of programs on codes of activations: plain loops that the compiler vectorizes. Part of
// rows.inl.

// clamp(round(v * inverse), low, high), in the low bits of what comes back as of kRound.
inline uint32_t bounded(const Requantize& to, float v) {
  v *= to.inverse;
  v = v > to.low ? v : to.low;  // in this order a NaN becomes the bound
  v = v < to.high ? v : to.high;
  return bits_of(v + kRound);
}

template <class Call>
inline void requantize_row(const Requantize& to, int64_t n, const float* y, const int8_t* residual,
                           Call put) {
  constexpr int64_t kRun = 256;
  float v[kRun];
  const float scale = to.residual_scale;
  const int zero = to.residual_zero;
  for (int64_t at = 0; at < n; at += kRun) {
    const int64_t count = n - at < kRun ? n - at : kRun;
    if (residual)
      for (int64_t i = 0; i < count; ++i)
        v[i] = y[at + i] + static_cast<float>(residual[at + i] - zero) * scale;
    else
      for (int64_t i = 0; i < count; ++i) v[i] = y[at + i];
    if (to.hardswish) apply(Epilogue::hardswish, 1, count, v, count);
    put(v, at, count);
  }
}

void requantize(const Requantize& to, int64_t rows, int64_t cols, ptrdiff_t first, const float* y,
                ptrdiff_t y_pitch, const int8_t* const* residual, int8_t* const* q) {
  for (int64_t r = 0; r < rows; ++r, y += y_pitch) {
    int8_t* const out = q[r] + first;
    const int8_t* const with = residual ? residual[r] + first : nullptr;
    if (to.table) {
      const uint32_t zeroth = kRoundBits + static_cast<uint32_t>(to.first);
      const int8_t* const table = to.table;
      requantize_row(to, cols, y, with, [&](const float* v, int64_t at, int64_t count) {
        for (int64_t i = 0; i < count; ++i) out[at + i] = table[bounded(to, v[i]) - zeroth];
      });
    } else {
      const uint32_t zero = static_cast<uint32_t>(to.zero);
      requantize_row(to, cols, y, with, [&](const float* v, int64_t at, int64_t count) {
        for (int64_t i = 0; i < count; ++i)
          out[at + i] = static_cast<int8_t>(bounded(to, v[i]) + zero);
      });
    }
  }
}

void add_codes(int64_t n, const int8_t* a, int zero_a, float scale_a, const int8_t* b, int zero_b,
               float scale_b, float* y) {
  for (int64_t i = 0; i < n; ++i)
    y[i] = __builtin_fmaf(static_cast<float>(b[i] - zero_b), scale_b,
                          static_cast<float>(a[i] - zero_a) * scale_a);
}

void multiply_codes(int64_t n, const int8_t* a, int zero_a, const int8_t* b, int zero_b,
                    float scale, float* y) {
  for (int64_t i = 0; i < n; ++i)
    y[i] = static_cast<float>((a[i] - zero_a) * (b[i] - zero_b)) * scale;
}

void max_codes(int64_t n, const int8_t* a, int8_t* q) {
  for (int64_t i = 0; i < n; ++i) q[i] = a[i] > q[i] ? a[i] : q[i];
}

void total_codes(int64_t n, const int8_t* a, int32_t* sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] += a[i];
}

void lookup(int64_t n, const int8_t* a, const int8_t* table, int8_t* q) {
  for (int64_t i = 0; i < n; ++i) q[i] = table[static_cast<uint8_t>(a[i])];
}

void dequantize(int64_t n, const int8_t* a, int zero, float scale, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = static_cast<float>(a[i] - zero) * scale;
}
