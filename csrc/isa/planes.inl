// Between channels first and channels last, in squares in registers: floats, and floats to codes.

// v[c] = column c of a square. Loads put what belongs together into the quarters of a register, so
// that no shuffle crosses these.
LOWBIT_INLINE void load_columns(const float* x, ptrdiff_t pitch, FloatReg (&v)[kLanes]) {
  LOWBIT_UNROLL for (int c = 0; c < kLanes; c += 4) {
    FloatReg a[4];
    LOWBIT_UNROLL for (int i = 0; i < 4; ++i) a[i] = float_quads(x + i * pitch + c, 4 * pitch);
    const FloatReg low[] = {zip_low(a[0], a[1]), zip_low(a[2], a[3])};
    const FloatReg high[] = {zip_high(a[0], a[1]), zip_high(a[2], a[3])};
    v[c] = pair_low(low[0], low[1]);
    v[c + 1] = pair_high(low[0], low[1]);
    v[c + 2] = pair_low(high[0], high[1]);
    v[c + 3] = pair_high(high[0], high[1]);
  }
}

// In squares; the last ones of an edge overlap those before.
void transpose(int64_t rows, int64_t cols, const float* x, ptrdiff_t x_pitch, float* y,
               ptrdiff_t y_pitch) {
  if (rows < kLanes || cols < kLanes) {
    for (int64_t c = 0; c < cols; ++c)
      for (int64_t r = 0; r < rows; ++r) y[c * y_pitch + r] = x[r * x_pitch + c];
    return;
  }
  const auto edge = [](int64_t at, int64_t end) { return at + kLanes <= end ? at : end - kLanes; };
  for (int64_t c = 0; c < cols; c += kLanes)  // columns of y's memory one after the other
    for (int64_t r = 0; r < rows; r += kLanes) {
      const int64_t r0 = edge(r, rows), c0 = edge(c, cols);
      FloatReg v[kLanes];
      load_columns(x + r0 * x_pitch + c0, x_pitch, v);
      LOWBIT_UNROLL for (int i = 0; i < kLanes; ++i) float_store(y + (c0 + i) * y_pitch + r0, v[i]);
    }
}

// Floats of a run: no prefetcher follows as many streams as there are channels.
constexpr int kAhead = 64;

// Codes of kLanes floats, in the low byte of a lane.
struct RoundedCodes {
  float inverse;

  LOWBIT_INLINE void operator()(const float* x, Lanes& q) {
    __builtin_prefetch(x + kAhead);
    const FloatReg v =
        float_add(multiply(float_load(x), float_splat(inverse)), float_splat(kRound));
    __builtin_memcpy(&q, &v, sizeof(q));
  }
  uint32_t seen() const { return 0; }
};

// The same, saturated; looks for what is not finite on the way.
struct SaturatedCodes {
  float inverse, low, high;
  int32_t zero;
  Lanes largest;

  LOWBIT_INLINE void operator()(const float* x, Lanes& q) {
    __builtin_prefetch(x + kAhead);
    const FloatReg v = float_load(x);
    Lanes bits;
    __builtin_memcpy(&bits, &v, sizeof(bits));
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
    FloatReg scaled = multiply(v, float_splat(inverse));
    scaled = float_min(float_max(scaled, float_splat(low)), float_splat(high));
    scaled = float_add(scaled, float_splat(kRound));
    __builtin_memcpy(&q, &scaled, sizeof(q));
    q += zero;
  }
  uint32_t seen() const {
    int32_t most = 0;
    for (int i = 0; i < kLanes; ++i) most = most < largest[i] ? largest[i] : most;
    return static_cast<uint32_t>(most);
  }
};

// call(codes) with what encodes in this way; returns the largest |x| that it has seen.
template <class Call>
LOWBIT_INLINE uint32_t with_codes(const PlaneCodes& how, Call call) {
  if (!how.saturates) {
    RoundedCodes codes{how.inverse};
    call(codes);
    return codes.seen();
  }
  SaturatedCodes codes{how.inverse, static_cast<float>(-128 - how.zero),
                       static_cast<float>(127 - how.zero), how.zero, Lanes{}};
  call(codes);
  return codes.seen();
}

// Four channels of kLanes pixels as a dword each; those from `channels` on are 0.
template <bool Whole, class Codes>
LOWBIT_INLINE void quad_of_codes(Codes& codes, const float* x, ptrdiff_t plane, int channels,
                                 Lanes& v) {
  if constexpr (Whole) {
    Lanes q[4];
    LOWBIT_UNROLL for (int i = 0; i < 4; ++i) codes(x + i * plane, q[i]);
    v = (((q[0] & 0xff) | (q[1] << 8 & 0xff00)) & 0xffff) | (((q[2] & 0xff) << 16) | q[3] << 24);
  } else {
    v = Lanes{};
    for (int i = 0; i < channels && i < 4; ++i) {
      Lanes q;
      codes(x + i * plane, q);
      v |= (q & 0xff) << (8 * i);
    }
  }
}

// `Quads` x 4 channels of kLanes pixels to where these are.
template <int Quads, class Codes>
LOWBIT_INLINE void put_quads(Codes& codes, const float* x, ptrdiff_t plane, int8_t* const* out,
                             ptrdiff_t offset) {
  Lanes v[Quads];
  LOWBIT_UNROLL for (int q = 0; q < Quads; ++q)
      quad_of_codes<true>(codes, x + 4 * q * plane, plane, 4, v[q]);
  if constexpr (Quads == kLanes) {
    transpose_square(v);
    LOWBIT_UNROLL for (int i = 0; i < kLanes; ++i)
        __builtin_memcpy(out[i] + offset, &v[i], sizeof(Lanes));
  } else {
    static_assert(Quads == 4, "their dwords are dealt out in two rounds");
    Lanes even[2], odd[2], all[4];
    zip(v[0], v[2], even[0], even[1]);
    zip(v[1], v[3], odd[0], odd[1]);
    zip(even[0], odd[0], all[0], all[1]);
    zip(even[1], odd[1], all[2], all[3]);
    int8_t pixels[kLanes][16];
    __builtin_memcpy(pixels, all, sizeof(all));
    LOWBIT_UNROLL for (int i = 0; i < kLanes; ++i)
        __builtin_memcpy(out[i] + offset, pixels[i], sizeof(pixels[i]));
  }
}

// The last channels, up to four, of kLanes pixels: `width` bytes of each. Of fewer than four, what
// is written behind a pixel is written again by the next; `left` pixels are there.
template <class Codes>
LOWBIT_INLINE void put_last(Codes& codes, const float* x, ptrdiff_t plane, int channels, int width,
                            int left, int8_t* const* out, ptrdiff_t offset) {
  Lanes v;
  if (channels >= 4)
    quad_of_codes<true>(codes, x, plane, 4, v);
  else
    quad_of_codes<false>(codes, x, plane, channels, v);
  int8_t pixels[kLanes][4];
  __builtin_memcpy(pixels, &v, sizeof(v));
  const int safe = width >= 4 ? kLanes : left - 3, whole = safe < kLanes ? safe : kLanes;
  int i = 0;
  for (; i < whole; ++i) __builtin_memcpy(out[i] + offset, pixels[i], 4);
  for (; i < kLanes; ++i)
    for (int c = 0; c < width; ++c) out[i][offset + c] = pixels[i][c];
}

// Whether a square fits in registers: scalar code for it would be 100 KB.
constexpr bool kSquares = kRegs * kPanels > 1;

template <class Codes>
LOWBIT_INLINE void put_planes(Codes& codes, const float* x, ptrdiff_t plane, int count,
                              int channels, int width, int8_t* const* out, ptrdiff_t offset) {
  // The last pixels overlap those before.
  for (int done = 0; done < count;) {
    const int at = done + kLanes <= count ? done : count - kLanes;
    // From the last channels on: what is written behind a pixel is written again.
    int c = (width - 1) / 4 * 4;
    const auto whole = [&](int quads) { return c + 4 <= channels && (c + 4) % (4 * quads) == 0; };
    while (c >= 0) {
      if (kSquares && whole(kLanes)) {
        c -= 4 * kLanes;
        put_quads<kLanes>(codes, x + (c + 4) * plane + at, plane, out + at, offset + c + 4);
      } else if (whole(4)) {
        c -= 16;
        put_quads<4>(codes, x + (c + 4) * plane + at, plane, out + at, offset + c + 4);
      } else {
        put_last(codes, x + c * plane + at, plane, channels - c, width - c, count - at, out + at,
                 offset + c);
        c -= 4;
      }
    }
    done = at + kLanes;
  }
}

uint32_t encode_planes(const PlaneCodes& how, const float* x, ptrdiff_t plane, int count,
                       int channels, int width, int8_t* const* out, ptrdiff_t offset) {
  if (count < kLanes) {
    float few[64 * kLanes] = {};
    int8_t pixels[kLanes][64], *to[kLanes];
    for (int c = 0; c < channels; ++c)
      for (int i = 0; i < count; ++i) few[c * kLanes + i] = x[c * plane + i];
    for (int i = 0; i < kLanes; ++i) to[i] = pixels[i];
    const uint32_t seen = encode_planes(how, few, kLanes, kLanes, channels, width, to, 0);
    for (int i = 0; i < count; ++i)
      __builtin_memcpy(out[i] + offset, pixels[i], static_cast<size_t>(width));
    return seen;
  }
  return with_codes(
      how, [&](auto& codes) { put_planes(codes, x, plane, count, channels, width, out, offset); });
}

template <class Codes>
LOWBIT_INLINE void put_triples(Codes& codes, const float* x, ptrdiff_t plane, int64_t count,
                               int8_t* q) {
  using Quad = int8_t __attribute__((vector_size(16)));  // four pixels
  for (int64_t done = 0; done < count; done += kLanes) {
    const int64_t at = done + kLanes <= count ? done : count - kLanes;  // overlaps those before
    Lanes c[3];
    LOWBIT_UNROLL for (int i = 0; i < 3; ++i) codes(x + i * plane + at, c[i]);
    const Lanes v = (c[0] & 0xff) | (c[1] & 0xff) << 8 | (c[2] & 0xff) << 16;
    Quad quads[kLanes / 4];
    __builtin_memcpy(quads, &v, sizeof(v));
    LOWBIT_UNROLL for (int i = 0; i < kLanes / 4; ++i) {
      const Quad b = __builtin_shufflevector(quads[i], quads[i], 0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13,
                                             14, 3, 7, 11, 15);
      const int64_t pixel = at + 4 * i;
      // What is written behind four pixels is written again by the next ones.
      if (pixel + 6 <= count)
        __builtin_memcpy(q + 3 * pixel, &b, 16);
      else
        __builtin_memcpy(q + 3 * pixel, &b, 12);
    }
  }
}

uint32_t encode_triples(const PlaneCodes& how, const float* x, ptrdiff_t plane, int64_t count,
                        int8_t* q) {
  if (count < kLanes) {
    float few[3 * kLanes + kAhead] = {};
    int8_t pixels[3 * kLanes];
    for (int c = 0; c < 3; ++c)
      for (int64_t i = 0; i < count; ++i) few[c * kLanes + i] = x[c * plane + i];
    const uint32_t seen = encode_triples(how, few, kLanes, kLanes, pixels);
    __builtin_memcpy(q, pixels, static_cast<size_t>(3 * count));
    return seen;
  }
  return with_codes(how, [&](auto& codes) { put_triples(codes, x, plane, count, q); });
}

// As above, lanes of pixels as they are.
template <class Codes>
LOWBIT_INLINE void put_panels(Codes& codes, const float* x, ptrdiff_t plane, int64_t panels,
                              int64_t channels, uint8_t* out, ptrdiff_t stride) {
  // From the last channels on: they were searched last for the largest.
  for (int64_t c = (channels - 1) / 4 * 4; c >= 0; c -= 4) {
    const float* from = x + c * plane;
    uint8_t* to = out + c / 4 * kVectorBytes;
    for (int64_t p = 0; p < panels; ++p, from += kPanel, to += stride)
      LOWBIT_UNROLL for (int i = 0; i < kRegs; ++i) {
        Lanes v;
        if (c + 4 <= channels)
          quad_of_codes<true>(codes, from + i * kLanes, plane, 4, v);
        else
          quad_of_codes<false>(codes, from + i * kLanes, plane, static_cast<int>(channels - c), v);
        v ^= static_cast<int32_t>(0x80808080u);
        __builtin_memcpy(to + i * kRegBytes, &v, sizeof(v));
      }
  }
}

uint32_t encode_panels(const PlaneCodes& how, const float* x, ptrdiff_t plane, int64_t panels,
                       int64_t channels, uint8_t* out, ptrdiff_t stride) {
  return with_codes(
      how, [&](auto& codes) { put_panels(codes, x, plane, panels, channels, out, stride); });
}

void value_rows(const uint8_t* packed, int64_t steps, const FormatTraits& format, int8_t* rows,
                ptrdiff_t pitch) {
  using Words = uint32_t __attribute__((vector_size(kRegBytes)));
  using Bytes = uint8_t __attribute__((vector_size(kRegBytes)));
  constexpr int kQuads = 16;  // of k, four weights of each channel
  float quads[kQuads][kPanel];
  const uint32_t mask = ((1u << format.bits) - 1) * 0x01010101u;
  const int planes = format.planes();
  const int64_t count = steps * planes;
  for (int64_t q = 0; q < count; ++q) {
    for (int i = 0; i < kRegs; ++i) {
      Words w;
      __builtin_memcpy(&w, packed + q / planes * kVectorBytes + i * kRegBytes, sizeof(w));
      w = (w >> static_cast<uint32_t>(q % planes * format.bits) & mask) << format.shift();
      const Bytes value = reinterpret_cast<const Bytes&>(w) + static_cast<uint8_t>(format.add);
      __builtin_memcpy(&quads[q % kQuads][i * kLanes], &value, sizeof(value));
    }
    if ((q + 1) % kQuads && q + 1 < count) continue;
    const int64_t first = q / kQuads * kQuads;
    transpose(q + 1 - first, kPanel, quads[0], kPanel, reinterpret_cast<float*>(rows + first * 4),
              pitch / 4);
  }
}
