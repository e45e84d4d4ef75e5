// Depthwise convolution on columns, over the vocabulary of microkernel.inl. A column is 16 channels
// of a pixel, four bytes each, from four rows of the image. Where an ISA has no dot product of
// bytes, it defines LOWBIT_WIDE_COLUMNS, and bytes of columns and weights are widened once, by
//
//   widen(v, even, odd)     the even and the odd bytes, signed, as 16-bit lanes
//   dot_shorts(acc, a, b)   acc[lane] += sum of 2 products of 16 bits

#ifdef LOWBIT_WIDE_COLUMNS
constexpr int kWide = 2, kActivationZero = 0;
struct Column {
  Reg even, odd;
};
inline Column make_column(Reg v) {
  Column x;
  widen(v, x.even, x.odd);
  return x;
}
inline Column load_column(const uint8_t* p) { return {load(p), load(p + kRegBytes)}; }
inline void store_column(uint8_t* p, const Column& x) {
  store(reinterpret_cast<int32_t*>(p), x.even);
  store(reinterpret_cast<int32_t*>(p + kRegBytes), x.odd);
}
inline Reg column_dot(Reg acc, const Column& x, const Column& w) {
  return dot_shorts(dot_shorts(acc, x.even, w.even), x.odd, w.odd);
}
#else
using Column = Reg;
inline Column load_column(const uint8_t* p) { return load(p); }
inline void store_column(uint8_t* p, const Column& x) { store(reinterpret_cast<int32_t*>(p), x); }
#ifdef LOWBIT_SIGNED_DOT
constexpr int kWide = 1, kActivationZero = 0;
inline Column make_column(Reg v) { return v; }
inline Reg column_dot(Reg acc, const Column& x, const Column& w) { return signed_dot(acc, x, w); }
#else
// Activations are the unsigned factor: 128 more than they are, which the seed takes back.
constexpr int kWide = 1, kActivationZero = 128;
inline Column make_column(Reg v) { return bit_xor(v, bytes(kActivationZero)); }
inline Reg column_dot(Reg acc, const Column& x, const Column& w) { return dot<8>(acc, x, w); }
#endif
#endif
constexpr int kColumnBytes = kVectorBytes * kWide, kColumnPart = kRegBytes * kWide;

// A weight, mul * code + add, is byte field.to of channel c's dword, wide or not; a seed is
// -kActivationZero times the sum of a channel's weights.
void spread(const uint8_t* packed, ptrdiff_t stride, int panels, const Places& places, int8_t* w,
            ptrdiff_t w_stride, int32_t* seed) {
  constexpr uint32_t kMask = (1u << (8 * kWide)) - 1;
  for (int p = 0; p < panels; ++p, packed += stride, w += w_stride, seed += kPanel)
    for (int r = 0; r < kRegs; ++r) {
      const TapField* field = places.fields;
      uint32_t total[kLanes] = {};
      for (int i = 0; i < places.count; ++i) {
        uint32_t out[kWide][kLanes] = {};
        for (; field < places.fields + places.ends[i]; ++field) {
          const uint32_t mask = (1u << field->bits) - 1, add = static_cast<uint32_t>(field->add);
          const int from = field->from, shift = field->shift, to = field->to / kWide * 8 * kWide;
          uint32_t* const part = out[field->to % kWide];
          uint32_t v[kLanes];
          __builtin_memcpy(v, packed + field->at + r * kRegBytes, sizeof(v));
          for (int c = 0; c < kLanes; ++c) v[c] = ((v[c] >> from & mask) << shift) + add;
          for (int c = 0; c < kLanes; ++c) part[c] |= (v[c] & kMask) << to;
          if (i < places.counted)
            for (int c = 0; c < kLanes; ++c) total[c] += v[c];
        }
        __builtin_memcpy(w + i * kColumnBytes + r * kColumnPart, out, sizeof(out));
      }
      for (int c = 0; c < kLanes; ++c)
        seed[r * kLanes + c] = -kActivationZero * static_cast<int32_t>(total[c]);
    }
}

// The columns of a panel: [pixel][quad].
template <int Quads>
LOWBIT_INLINE void make_columns(const DepthwiseTile& t, int panel) {
  const int quads = Quads ? Quads : t.quads;
  const ptrdiff_t pitch = t.pitch;
  const int64_t width = t.width;
  for (int q = 0; q < quads; ++q) {
    const ptrdiff_t at = t.first + panel * kPanel;
    const int8_t *r0 = t.rows[4 * q] + at, *r1 = t.rows[4 * q + 1] + at;
    const int8_t *r2 = t.rows[4 * q + 2] + at, *r3 = t.rows[4 * q + 3] + at;
    uint8_t* out = t.columns + q * kColumnBytes;
    for (int64_t x = 0; x < width; ++x, out += quads * kColumnBytes) {
      Reg v[kRegs];
      interleave(r0, r1, r2, r3, v);
      r0 += pitch, r1 += pitch, r2 += pitch, r3 += pitch;
      LOWBIT_UNROLL for (int r = 0; r < kRegs; ++r)
          store_column(out + r * kColumnPart, make_column(v[r]));
    }
  }
}

#ifdef LOWBIT_SIGNED_DOT
#include "neon_depthwise.inl"
#else
// So many registers may hold weights; an ISA of two for a vector has 16 in all.
constexpr int kHeldWeights = kRegs == 2 ? 0 : 20;

// Where it goes is fetched so many pixels ahead.
constexpr int kPixelsAhead = 16;

// Taps across and quads of rows that are known (0: not) let weights stay in registers over the
// pixels. R output rows meet the same columns.
template <int Taps, int Quads, int R>
void depthwise_panel(const DepthwiseTile& t, int panel) {
  constexpr int P = Taps * Quads;
  constexpr bool kHeld = P > 0 && R * P * kRegs * kWide <= kHeldWeights;
  make_columns<Quads>(t, panel);
  const int quads = Quads ? Quads : t.quads, taps = Taps ? Taps : t.taps, places = taps * quads;
  const uint8_t* const w = reinterpret_cast<const uint8_t*>(t.w) + panel * t.w_stride;
  const auto weight = [&](int r, int p, int v) __attribute__((always_inline)) {
    return load_column(w + (r * places + p) * kColumnBytes + v * kColumnPart);
  };
  Column weights[R][kHeld ? P : 1][kRegs];
  Reg seed[kRegs];
  FloatReg scale[kRegs], bias[kRegs];
  LOWBIT_UNROLL for (int v = 0; v < kRegs; ++v) {
    const ptrdiff_t at = panel * kPanel + v * kLanes;
    seed[v] = load(reinterpret_cast<const uint8_t*>(t.seed + at));
    scale[v] = float_load(t.scale + at);
    bias[v] = float_load(t.bias + at);
    if constexpr (kHeld)
      LOWBIT_UNROLL for (int r = 0; r < R; ++r) LOWBIT_UNROLL for (int p = 0; p < P; ++p)
          weights[r][p][v] = weight(r, p, v);
  }
  const ptrdiff_t tap_bytes = t.dilation * quads * kColumnBytes;
  const ptrdiff_t step = t.stride * quads * kColumnBytes;
  const uint8_t* column = t.columns;
  const auto sum = [&](Reg(&acc)[R][kRegs]) __attribute__((always_inline)) {
    LOWBIT_UNROLL for (int r = 0; r < R; ++r) LOWBIT_UNROLL for (int v = 0; v < kRegs; ++v)
        acc[r][v] = seed[v];
    const auto add_place = [&](const uint8_t* from, int p) __attribute__((always_inline)) {
      LOWBIT_UNROLL for (int v = 0; v < kRegs; ++v) {
        const Column x = load_column(from + v * kColumnPart);
        LOWBIT_UNROLL for (int r = 0; r < R; ++r) {
          if constexpr (kHeld)
            acc[r][v] = column_dot(acc[r][v], x, weights[r][p][v]);
          else
            acc[r][v] = column_dot(acc[r][v], x, weight(r, p, v));
        }
      }
    };
    if constexpr (P > 0) {
      LOWBIT_UNROLL for (int tap = 0; tap < Taps; ++tap)
          LOWBIT_UNROLL for (int q = 0; q < Quads; ++q)
              add_place(column + tap * tap_bytes + q * kColumnBytes, tap * Quads + q);
    } else {
      for (int tap = 0; tap < taps; ++tap)
        for (int q = 0; q < quads; ++q)
          add_place(column + tap * tap_bytes + q * kColumnBytes, tap * quads + q);
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
  if (t.requantize) {
    const CodeRegs code(*t.requantize);
    const auto put = [&](auto saturates) __attribute__((always_inline)) {
      int8_t* q = t.q + panel * kPanel;
      for (int64_t i = 0; i < pixels; ++i, column += step, q += pitch) {
        Reg acc[R][kRegs];
        sum(acc);
        LOWBIT_UNROLL for (int r = 0; r < R; ++r) LOWBIT_UNROLL for (int v = 0; v < kRegs; ++v)
            code.template put<decltype(saturates)::value != 0>(
                q + r * row + v * kLanes, fmadd(to_float(acc[r][v]), scale[v], bias[v]));
      }
    };
    return t.requantize->saturates ? put(IntConstant<1>{}) : put(IntConstant<0>{});
  }
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
#endif

template <int Taps, int Quads>
void depthwise_rows(const DepthwiseTile& t) {
  for (int p = 0; p < t.panels; ++p)
    t.outputs == 2 ? depthwise_panel<Taps, Quads, 2>(t, p) : depthwise_panel<Taps, Quads, 1>(t, p);
}

void depthwise_tile(const DepthwiseTile& t) {
  if constexpr (kRegs * kPanels > 1) {  // scalar code for known taps would be 380 KB
    if (t.taps == 3 && t.quads == 1) return depthwise_rows<3, 1>(t);
    if (t.taps == 5 && t.quads == 2) return depthwise_rows<5, 2>(t);
  }
  depthwise_rows<0, 0>(t);
}
