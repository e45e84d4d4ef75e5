// Grouped convolution of few channels: a panel holds several groups, and all that they read of a
// pixel are 16 bytes. Part of microkernel.inl. The vocabulary that it asks for:
//
//   load16(p)                 16 bytes, in every 128 bits
//   shuffle(v, control)       v's bytes by number within 128 bits, 0 where a number is above 127

template <int MR>
void grouped_pixels(const GroupedTile& t, int panel, int64_t first) {
  const int8_t* from = t.from + first * t.stride + panel * t.panel_bytes;
  const uint8_t* w = reinterpret_cast<const uint8_t*>(t.w) + panel * t.w_stride;
  const uint8_t* const seed = reinterpret_cast<const uint8_t*>(t.seed + panel * kPanel);
  const ptrdiff_t stride = t.stride, *const taps = t.taps;
  const int count = t.tap_count, steps = t.steps;
  Reg acc[MR][kRegs];
  LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int v = 0; v < kRegs; ++v)
      acc[r][v] = load(seed + v * kRegBytes);
  for (int tap = 0; tap < count; ++tap) {
    Reg a[MR];
    LOWBIT_UNROLL for (int r = 0; r < MR; ++r) a[r] = load16(from + taps[tap] + r * stride);
    for (int s = 0; s < steps; ++s, w += kColumnBytes)
      LOWBIT_UNROLL for (int v = 0; v < kRegs; ++v) {
        const Column weights = load_column(w + v * kColumnPart);
        const Reg control = load(t.control + s * kVectorBytes + v * kRegBytes);
        LOWBIT_UNROLL for (int r = 0; r < MR; ++r) acc[r][v] =
            column_dot(acc[r][v], make_column(shuffle(a[r], control)), weights);
      }
  }
  if (t.requantize) {
    const CodeRegs code(*t.requantize);
    int8_t* q = t.q + first * t.y_pitch + panel * kPanel;
    LOWBIT_UNROLL for (int v = 0; v < kRegs; ++v) {
      const ptrdiff_t at = panel * kPanel + v * kLanes;
      const FloatReg scale = float_load(t.scale + at), bias = float_load(t.bias + at);
      LOWBIT_UNROLL for (int r = 0; r < MR; ++r)
          code.put<false>(q + r * t.y_pitch + v * kLanes, fmadd(to_float(acc[r][v]), scale, bias));
    }
    return;
  }
  float* y = t.y + first * t.y_pitch + panel * kPanel;
  LOWBIT_UNROLL for (int v = 0; v < kRegs; ++v) {
    const ptrdiff_t at = panel * kPanel + v * kLanes;
    const FloatReg scale = float_load(t.scale + at), bias = float_load(t.bias + at);
    LOWBIT_UNROLL for (int r = 0; r < MR; ++r)
        float_store(y + r * t.y_pitch + v * kLanes, fmadd(to_float(acc[r][v]), scale, bias));
  }
}

void grouped_tile(const GroupedTile& t) {
  constexpr int kRows = kRegs == 1 ? 8 : 4;
  for (int64_t i = 0; i < t.pixels; i += kRows)
    for (int p = 0; p < t.panels; ++p)
      with_rows<1, kRows>(t.pixels - i < kRows ? static_cast<int>(t.pixels - i) : kRows,
                          [&](auto mr) { grouped_pixels<decltype(mr)::value>(t, p, i); });
}
