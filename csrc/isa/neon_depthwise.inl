// Depthwise panels for NEON, where a vector is four registers: 4 channels after the other, so that
// the weights of all places stay in registers over a run of pixels. Part of depthwise.inl.
//
// Few places do not leave the 23 bits of a float's fraction. Sums that start at the bits of
// 1.5 * 2^23 are floats already, that much too large: one subtraction, where a conversion takes two
// slots of one unit. Starts and biases are loaded, which has ports to spare: as copies of registers
// they would take those that multiply.
constexpr int32_t kBiased = 0x4b400000;
constexpr int32_t kStarts[2][kLanes] = {{}, {kBiased, kBiased, kBiased, kBiased}};
constexpr int kMostBiased = (1 << 22) / (128 * 128);  // products of bytes

// Where p points to, to be loaded again.
template <class T>
LOWBIT_INLINE const T* anew(const T* p) {
  asm volatile("" : "+r"(p));
  return p;
}

// Sums of a register of channels; add(first, x, w, y, v) takes two places: any if kDot, else of no
// weight that is -128.
#ifdef LOWBIT_LONG_DOT
struct ColumnSum {
  static constexpr bool kDot = false;
  Reg low, high;
  void start(const int32_t*) {}
  void add(bool first, Reg x, Reg w) {
    add_shorts(first, products_low(signed_bytes(x), signed_bytes(w)),
               products_high(signed_bytes(x), signed_bytes(w)));
  }
  void add(bool first, Reg x, Reg w, Reg y, Reg v) {
    int16x8_t l = products_low(signed_bytes(x), signed_bytes(w)),
              h = products_high(signed_bytes(x), signed_bytes(w));
    multiply_low(l, signed_bytes(y), signed_bytes(v));
    multiply_high(h, signed_bytes(y), signed_bytes(v));
    add_shorts(first, l, h);
  }
  Reg total() const { return vpaddq_s32(low, high); }

 private:
  void add_shorts(bool first, int16x8_t l, int16x8_t h) {
    if (first)
      low = vpaddlq_s16(l), high = vpaddlq_s16(h);
    else
      accumulate_pairs(low, l), accumulate_pairs(high, h);
  }
};
#else
struct ColumnSum {
  static constexpr bool kDot = true;
  Reg sum;
  void start(const int32_t* p) { sum = vld1q_s32(anew(p)); }
  void add(bool, Reg x, Reg w) { sum = signed_dot(sum, x, w); }
  void add(bool, Reg x, Reg w, Reg y, Reg v) { add(false, x, w), add(false, y, v); }
  Reg total() const { return sum; }
};
#endif

// Pixels of a run: their columns and outputs stay in the first cache while four registers pass.
constexpr int64_t kRun = 32;

// Sums of R rows of outputs, `Pixels` pixels at a time, where places are many: put(pixel, row,
// sum).
template <int R, int Pixels, class Put>
LOWBIT_INLINE void sum_places(const DepthwiseTile& t, const uint8_t* column, const uint8_t* w,
                              int64_t pixels, Put put) {
  const ptrdiff_t quad = kColumnBytes, pixel = t.quads * quad, row = t.taps * pixel;
  const ptrdiff_t tap_bytes = t.dilation * pixel, step = t.stride * pixel;
  int64_t i = 0;
  for (; i + Pixels <= pixels; i += Pixels, column += Pixels * step) {
    ColumnSum sum[R][Pixels];
    LOWBIT_UNROLL for (int i = 0; i < R * Pixels; ++i) sum[i / Pixels][i % Pixels].start(put.start);
    const uint8_t* at = w;
    const auto place = [&](bool first, const uint8_t* from) __attribute__((always_inline)) {
      Reg weights[R];
      LOWBIT_UNROLL for (int r = 0; r < R; ++r) weights[r] = load(at + r * row);
      LOWBIT_UNROLL for (int n = 0; n < Pixels; ++n) {
        const Reg x = load(from + n * step);
        LOWBIT_UNROLL for (int r = 0; r < R; ++r) sum[r][n].add(first, x, weights[r]);
      }
      at += quad;
    };
    place(true, column);
    int q = 1;
    for (const uint8_t* tap = column; at < w + row; tap += tap_bytes, q = 0)
      for (; q < t.quads; ++q) place(false, tap + q * quad);
    LOWBIT_UNROLL for (int n = 0; n < Pixels; ++n) LOWBIT_UNROLL for (int r = 0; r < R; ++r)
        put(i + n, r, sum[r][n].total());
  }
  if constexpr (Pixels > 1) sum_places<R, 1>(t, column, w, pixels - i, put.from(i));
}

// The same of a known number of places, whose weights are held; in pairs where these may be.
template <int Taps, int Quads, int R, bool Pairs, class Put>
LOWBIT_INLINE void sum_held(const DepthwiseTile& t, const uint8_t* column, const uint8_t* w,
                            int64_t pixels, Put put) {
  constexpr int P = Taps * Quads, kPaired = Pairs ? P / 2 * 2 : 0;
  const ptrdiff_t pixel = Quads * kColumnBytes;
  const ptrdiff_t tap_bytes = t.dilation * pixel, step = t.stride * pixel;
  Reg weights[R][P];
  LOWBIT_UNROLL for (int r = 0; r < R; ++r) LOWBIT_UNROLL for (int p = 0; p < P; ++p)
      weights[r][p] = load(w + (r * P + p) * kColumnBytes);
  const auto at = [&](int p) __attribute__((always_inline)) {
    return load(column + p / Quads * tap_bytes + p % Quads * kColumnBytes);
  };
  for (int64_t i = 0; i < pixels; ++i, column += step) {
    ColumnSum sum[R];
    LOWBIT_UNROLL for (int r = 0; r < R; ++r) sum[r].start(put.start);
    LOWBIT_UNROLL for (int p = 0; p < kPaired; p += 2) {
      const Reg x = at(p), y = at(p + 1);
      LOWBIT_UNROLL for (int r = 0; r < R; ++r) sum[r].add(p == 0, x, weights[r][p], y,
                                                           weights[r][p + 1]);
    }
    LOWBIT_UNROLL for (int p = kPaired; p < P; ++p) {
      const Reg x = at(p);
      LOWBIT_UNROLL for (int r = 0; r < R; ++r) sum[r].add(p == 0, x, weights[r][p]);
    }
    LOWBIT_UNROLL for (int r = 0; r < R; ++r) put(i, r, sum[r].total());
  }
}

// A function of its own: the registers are the loop's alone.
template <int Taps, int Quads, int R, bool Pairs, class Put>
LOWBIT_NOINLINE void sum_run(const DepthwiseTile& t, const uint8_t* column, const uint8_t* w,
                             int64_t pixels, Put put) {
  if constexpr (Taps * Quads == 0)
    sum_places<R, 8 / R>(t, column, w, pixels, put);
  else
    sum_held<Taps, Quads, R, Pairs>(t, column, w, pixels, put);
}

struct PutSums {
  int32_t* out;
  const int32_t* start = kStarts[0];
  PutSums from(int64_t i) const { return {out + i * kNr}; }
  LOWBIT_INLINE void operator()(int64_t i, int, Reg v) const { store(out + i * kNr, v); }
};

template <bool Biased>
LOWBIT_INLINE FloatReg sum_as_float(Reg v) {
  if constexpr (Biased)
    return vsubq_f32(vreinterpretq_f32_s32(v), vreinterpretq_f32_s32(vdupq_n_s32(kBiased)));
  return to_float(v);
}

template <bool Biased>
struct PutOutputs {
  FloatReg scale;
  const float* bias;
  float* y;
  ptrdiff_t pitch, row;
  const int32_t* start = kStarts[Biased];
  PutOutputs from(int64_t i) const { return {scale, bias, y + i * pitch, pitch, row}; }
  LOWBIT_INLINE void operator()(int64_t i, int r, Reg v) const {
    float_store(y + i * pitch + r * row,
                fmadd(sum_as_float<Biased>(v), scale, float_load(anew(bias))));
  }
};

// The same as codes.
template <bool Biased, bool Saturates>
struct PutCodes {
  FloatReg scale;
  const float* bias;
  CodeRegs code;
  int8_t* q;
  ptrdiff_t pitch, row;
  const int32_t* start = kStarts[Biased];
  PutCodes from(int64_t i) const { return {scale, bias, code, q + i * pitch, pitch, row}; }
  LOWBIT_INLINE void operator()(int64_t i, int r, Reg v) const {
    const FloatReg y = fmadd(sum_as_float<Biased>(v), scale, float_load(anew(bias)));
    code.put<Saturates>(q + i * pitch + r * row, y);
  }
};

template <int Taps, int Quads, int R>
void depthwise_panel(const DepthwiseTile& t, int panel) {
  make_columns<Quads>(t, panel);
  const uint8_t* const weights = reinterpret_cast<const uint8_t*>(t.w) + panel * t.w_stride;
  constexpr int P = Taps * Quads;
  bool pairs = true;
  if constexpr (!ColumnSum::kDot && P > 0) {
    int8x16_t least = vdupq_n_s8(0);
    for (int i = 0; i < R * P * kRegs; ++i)
      least = vminq_s8(least, signed_bytes(load(weights + i * kRegBytes)));
    pairs = vminvq_s8(least) > -128;
  }
  const ptrdiff_t step = t.stride * t.quads * kColumnBytes, pitch = t.y_pitch, row = t.y_row;
  for (int64_t first = 0; first < t.pixels; first += kRun) {
    const int64_t rest = t.pixels - first, pixels = rest < kRun ? rest : kRun;
    float* const y = t.y + first * pitch + panel * kPanel;
    if (!t.acc && !t.requantize)
      for (int64_t i = 0; i < pixels; ++i)
        LOWBIT_UNROLL for (int r = 0; r < R; ++r) __builtin_prefetch(y + i * pitch + r * row, 1);
    for (int v = 0; v < kRegs; ++v) {
      const ptrdiff_t at = panel * kPanel + v * kLanes;
      const auto sum_with = [&](auto put) {
        const uint8_t* const column = t.columns + first * step + v * kColumnPart;
        const uint8_t* const w = weights + v * kColumnPart;
        if constexpr (!ColumnSum::kDot && P > 0)
          if (!pairs) return sum_run<Taps, Quads, R, false>(t, column, w, pixels, put);
        sum_run<Taps, Quads, R, true>(t, column, w, pixels, put);
      };
      if constexpr (R == 1)
        if (t.acc) {
          sum_with(PutSums{t.acc + first * kNr + at});
          continue;
        }
      constexpr bool kBiasedSums = ColumnSum::kDot && P > 0 && P * 4 <= kMostBiased;
      if (t.requantize) {
        const CodeRegs code(*t.requantize);
        int8_t* const q = t.q + first * pitch + at;
        const FloatReg scale = float_load(t.scale + at);
        if (t.requantize->saturates)
          sum_with(PutCodes<kBiasedSums, true>{scale, t.bias + at, code, q, pitch, row});
        else
          sum_with(PutCodes<kBiasedSums, false>{scale, t.bias + at, code, q, pitch, row});
        continue;
      }
      sum_with(PutOutputs<kBiasedSums>{float_load(t.scale + at), t.bias + at, y + v * kLanes, pitch,
                                       row});
    }
  }
}
