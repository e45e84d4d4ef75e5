// Depthwise convolution on columns, over the vocabulary of microkernel.inl. A column is 16 channels
// of a pixel, four bytes each, from four rows of the image.

// Activations are the unsigned factor of `dot`: 128 more than they are, which the seed takes back.
constexpr int kActivationZero = 128;

// w[panel][c] |= mul * code + add of one tap, as a byte at bit `to` of channel c's dword; seed
// (unless null) -= kActivationZero times that.
void spread_tap(const uint8_t* packed, ptrdiff_t stride, int panels, const TapField& field,
                int8_t* w, ptrdiff_t w_stride, int32_t* seed) {
  const uint32_t mask = (1u << field.bits) - 1;
  for (int p = 0; p < panels; ++p, packed += stride, w += w_stride) {
    uint32_t v[kPanel], out[kPanel];
    __builtin_memcpy(v, packed, sizeof(v));
    __builtin_memcpy(out, w, sizeof(out));
    for (int c = 0; c < kPanel; ++c) {
      v[c] = ((v[c] >> field.from & mask) << field.shift) + static_cast<uint32_t>(field.add);
      out[c] |= (v[c] & 0xff) << field.to;
    }
    __builtin_memcpy(w, out, sizeof(out));
    if (!seed) continue;
    for (int c = 0; c < kPanel; ++c)
      seed[p * kPanel + c] -= kActivationZero * static_cast<int>(v[c]);
  }
}

// The columns of a panel: [pixel][quad].
template <int Quads>
LOWBIT_INLINE void make_columns(const DepthwiseTile& t, int panel) {
  const int quads = Quads ? Quads : t.quads;
  const Reg flip = bytes(kActivationZero);
  const ptrdiff_t pitch = t.pitch;
  const int64_t width = t.width;
  for (int q = 0; q < quads; ++q) {
    const ptrdiff_t at = t.first + panel * kPanel;
    const int8_t *r0 = t.rows[4 * q] + at, *r1 = t.rows[4 * q + 1] + at;
    const int8_t *r2 = t.rows[4 * q + 2] + at, *r3 = t.rows[4 * q + 3] + at;
    uint8_t* out = t.columns + q * kVectorBytes;
    for (int64_t x = 0; x < width; ++x, out += quads * kVectorBytes) {
      Reg v[kRegs];
      interleave(r0, r1, r2, r3, v);
      r0 += pitch, r1 += pitch, r2 += pitch, r3 += pitch;
      LOWBIT_UNROLL for (int r = 0; r < kRegs; ++r)
          store(reinterpret_cast<int32_t*>(out + r * kRegBytes), bit_xor(v[r], flip));
    }
  }
}

// Where it goes is fetched so many pixels ahead.
constexpr int kPixelsAhead = 16;

// Taps across and quads of rows that are known (0: not) let weights stay in registers over the
// pixels. R output rows meet the same columns.
template <int Taps, int Quads, int R>
void depthwise_panel(const DepthwiseTile& t, int panel) {
  constexpr int P = Taps * Quads;
  make_columns<Quads>(t, panel);
  const int quads = Quads ? Quads : t.quads, taps = Taps ? Taps : t.taps, places = taps * quads;
  const uint8_t* const w = reinterpret_cast<const uint8_t*>(t.w) + panel * t.w_stride;
  const auto weight = [&](int r, int p, int v) __attribute__((always_inline)) {
    return load(w + (r * places + p) * kVectorBytes + v * kRegBytes);
  };
  Reg weights[R][P ? P : 1][kRegs], seed[kRegs];
  FloatReg scale[kRegs], bias[kRegs];
  LOWBIT_UNROLL for (int v = 0; v < kRegs; ++v) {
    const ptrdiff_t at = panel * kPanel + v * kLanes;
    seed[v] = load(reinterpret_cast<const uint8_t*>(t.seed + at));
    scale[v] = float_load(t.scale + at);
    bias[v] = float_load(t.bias + at);
    if constexpr (P > 0)
      LOWBIT_UNROLL for (int r = 0; r < R; ++r) LOWBIT_UNROLL for (int p = 0; p < P; ++p)
          weights[r][p][v] = weight(r, p, v);
  }
  const ptrdiff_t tap_bytes = t.dilation * quads * kVectorBytes;
  const ptrdiff_t step = t.stride * quads * kVectorBytes;
  const uint8_t* column = t.columns;
  const auto sum = [&](Reg(&acc)[R][kRegs]) __attribute__((always_inline)) {
    LOWBIT_UNROLL for (int r = 0; r < R; ++r) LOWBIT_UNROLL for (int v = 0; v < kRegs; ++v)
        acc[r][v] = seed[v];
    const auto add_place = [&](const uint8_t* from, int p) __attribute__((always_inline)) {
      LOWBIT_UNROLL for (int v = 0; v < kRegs; ++v) {
        const Reg x = load(from + v * kRegBytes);
        LOWBIT_UNROLL for (int r = 0; r < R; ++r) {
          if constexpr (P > 0)
            acc[r][v] = dot<8>(acc[r][v], x, weights[r][p][v]);
          else
            acc[r][v] = dot<8>(acc[r][v], x, weight(r, p, v));
        }
      }
    };
    if constexpr (P > 0) {
      LOWBIT_UNROLL for (int tap = 0; tap < Taps; ++tap)
          LOWBIT_UNROLL for (int q = 0; q < Quads; ++q)
              add_place(column + tap * tap_bytes + q * kVectorBytes, tap * Quads + q);
    } else {
      for (int tap = 0; tap < taps; ++tap)
        for (int q = 0; q < quads; ++q)
          add_place(column + tap * tap_bytes + q * kVectorBytes, tap * quads + q);
    }
  };
  const int64_t pixels = t.pixels;
  if (t.acc) {
    int32_t* out = t.acc + panel * kPanel;
    for (int64_t i = 0; i < pixels; ++i, column += step, out += kNr) {
      Reg acc[R][kRegs];
      sum(acc);
      LOWBIT_UNROLL for (int v = 0; v < kRegs; ++v) store(out + v * kLanes, acc[0][v]);
    }
    return;
  }
  const ptrdiff_t pitch = t.y_pitch, row = t.y_row;
  float* y = t.y + panel * kPanel;
  for (int64_t i = 0; i < pixels; ++i, column += step, y += pitch) {
    Reg acc[R][kRegs];
    LOWBIT_UNROLL for (int r = 0; r < R; ++r)
        __builtin_prefetch(y + kPixelsAhead * pitch + r * row, 1);
    sum(acc);
    LOWBIT_UNROLL for (int r = 0; r < R; ++r) LOWBIT_UNROLL for (int v = 0; v < kRegs; ++v)
        float_store(y + r * row + v * kLanes, fmadd(to_float(acc[r][v]), scale[v], bias[v]));
  }
}

void depthwise_tile(const DepthwiseTile& t) {
  const bool two = t.outputs == 2;
  const auto run =
      t.taps == 3 && t.quads == 1   ? two ? depthwise_panel<3, 1, 2> : depthwise_panel<3, 1, 1>
        : t.taps == 5 && t.quads == 2 ? two ? depthwise_panel<5, 2, 2> : depthwise_panel<5, 2, 1>
        : two ? depthwise_panel<0, 0, 2>
                                    : depthwise_panel<0, 0, 1>;
  for (int p = 0; p < t.panels; ++p) run(t, p);
}
