// Depthwise convolution of one channel of NCHW, see PlaneTile. Part of microkernel.inl.

#ifdef LOWBIT_WINDOWS

// 16 codes at a time, the last of a row once more where it ends earlier.
inline void encode_plane(const PlaneTile& t) {
  const float* x = t.x;
  int8_t* q = t.codes;
  for (int64_t y = 0; y < t.height; ++y, x += t.width, q += t.pitch) {
    if (t.inverse == 0.0f) {
      __builtin_memset(q, 0, static_cast<size_t>(t.width));
      continue;
    }
    const FloatReg inverse = float_splat(t.inverse);
    for (int64_t i = 0; i < t.width; i += kPanel) {
      const int64_t at = i + kPanel <= t.width ? i : t.width - kPanel;
      LOWBIT_UNROLL for (int v = 0; v < kRegs; ++v) {
        const int64_t from = at + v * kLanes;
        store_codes(q + from, nearest(multiply(float_load(x + from), inverse)));
      }
    }
  }
}

// R rows of outputs, which share windows where they are neighbours.
template <int KernelRows, int Quads, int R>
LOWBIT_INLINE void plane_rows(const PlaneTile& t, const Windows& windows, const int8_t* from,
                              float* y) {
  const ptrdiff_t pitch = t.pitch, stride = t.stride_w;
  const int64_t pixels = t.pixels;
  const Reg flip = bytes(0x80), seed = broadcast(reinterpret_cast<const int8_t*>(&t.seed));
  const FloatReg scale = float_splat(t.scale), bias = float_splat(t.bias);
  for (int64_t i = 0; i < pixels; i += kPanel) {
    const int64_t at = i + kPanel <= pixels ? i : pixels - kPanel;
    const int8_t* p = from + at * stride;
    Reg acc[R][kRegs];
    LOWBIT_UNROLL for (int r = 0; r < R; ++r) LOWBIT_UNROLL for (int v = 0; v < kRegs; ++v)
        acc[r][v] = seed;
    LOWBIT_UNROLL for (int row = 0; row < KernelRows + R - 1; ++row)
        LOWBIT_UNROLL for (int q = 0; q < Quads; ++q) {
      const int8_t* const at_row = p + row * pitch + 4 * q;
      Reg x[kRegs];
      LOWBIT_UNROLL for (int v = 0; v < kRegs; ++v) x[v] = windows(
          bit_xor(load(reinterpret_cast<const uint8_t*>(at_row + v * kLanes * stride)), flip));
      LOWBIT_UNROLL for (int r = 0; r < R; ++r) {
        if (row - r < 0 || row - r >= KernelRows) continue;
        const Reg w = broadcast(t.w + ((row - r) * Quads + q) * 4);
        LOWBIT_UNROLL for (int v = 0; v < kRegs; ++v) acc[r][v] = dot<8>(acc[r][v], x[v], w);
      }
    }
    LOWBIT_UNROLL for (int r = 0; r < R; ++r) LOWBIT_UNROLL for (int v = 0; v < kRegs; ++v)
        float_store(y + r * pixels + at + v * kLanes, fmadd(to_float(acc[r][v]), scale, bias));
  }
}

template <int KernelRows, int Quads>
void plane_outputs(const PlaneTile& t) {
  const Windows windows(static_cast<int>(t.stride_w));
  const ptrdiff_t step = t.stride_h * t.pitch;
  const int8_t* from = t.from;
  float* y = t.y;
  int64_t left = t.outputs;
  if (t.stride_h == 1)
    for (; left >= 2; left -= 2, from += 2 * step, y += 2 * t.pixels)
      plane_rows<KernelRows, Quads, 2>(t, windows, from, y);
  for (; left > 0; --left, from += step, y += t.pixels)
    plane_rows<KernelRows, Quads, 1>(t, windows, from, y);
}

void plane_tile_of(const PlaneTile& t) {
  encode_plane(t);
  if (t.rows == 3) return plane_outputs<3, 1>(t);
  if (t.rows == 5) return plane_outputs<5, 2>(t);
  plane_outputs<7, 2>(t);
}

constexpr void (*plane_tile)(const PlaneTile&) = plane_tile_of;

void window_panels(const int8_t* from, const ptrdiff_t* places, int64_t steps, int64_t stride,
                   int64_t panels, uint8_t* out) {
  const Windows windows(static_cast<int>(stride));
  const Reg flip = bytes(0x80);
  for (int64_t p = 0; p < panels; ++p, from += kPanel * stride)
    for (int64_t s = 0; s < steps; ++s, out += kVectorBytes)
      LOWBIT_UNROLL for (int v = 0; v < kRegs; ++v) {
        const auto row = reinterpret_cast<const uint8_t*>(from + places[s] + v * kLanes * stride);
        store(reinterpret_cast<int32_t*>(out + v * kRegBytes), windows(bit_xor(load(row), flip)));
      }
}

#else

constexpr void (*plane_tile)(const PlaneTile&) = nullptr;
constexpr void (*window_panels)(const int8_t*, const ptrdiff_t*, int64_t, int64_t, int64_t,
                                uint8_t*) = nullptr;

#endif
