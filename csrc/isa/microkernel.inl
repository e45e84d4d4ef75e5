// The integer microkernels, once, over the vocabulary that an ISA's file defines before it includes
// this one:
//
//   Reg                     a register of int32 lanes; kRegs of them make one 64-byte vector
//   kMr, kPanels            the largest tile: kMr rows x kPanels panels of 16 channels
//   zero() load(p) store(p, v) ones() opaque(v)
//   broadcast(p)            4 bytes to every lane
//   unpack<B, P>(v)         bit field P (B bits wide) of every byte
//   dot<B>(acc, u, a)       acc[lane] += sum of 4 products u8 * s8 (u < 2^B)
//   popcount_add(acc, v)    acc[lane] += bits set in the lane
//   bit_xor(a, b) bit_and(a, b) sub(a, b): the last on lanes
//   interleave(t0..t3, out) 16 bytes of each of 4 taps to 16 lanes of 4 bytes
//   FloatReg, float_ones(), fmadd(a, b, c), opaque_float(v): for the float32 ceiling alone
//
// Everything is in an unnamed namespace: code compiled for one ISA must not be linked into
// another's. GCC keeps big accumulator arrays on the stack unless every loop over them is unrolled:
// hence the pragmas.

#define LOWBIT_UNROLL _Pragma("GCC unroll 16")

// Distance that hides DRAM latency for the streaming (few-row) kernels; measured, see ../README.md.
constexpr int kPrefetchSteps = 32;

constexpr int kNr = kPanels * kPanel;  // channels of a tile
constexpr int kRegBytes = kVectorBytes / kRegs;

// How far ahead of step s to prefetch, in bytes. At the end of whole panels the next tile's are
// next: they lie behind this tile's.
template <int NP>
inline ptrdiff_t prefetch_distance(int64_t s, int64_t steps, ptrdiff_t panel_stride) {
  const bool ends = s + kPrefetchSteps >= steps && panel_stride == steps * kVectorBytes;
  return kPrefetchSteps * kVectorBytes + (ends ? (NP - 1) * panel_stride : 0);
}

template <int B, int P, int MR, int V>
inline void dot_planes(Reg (&acc)[MR][V], const Reg (&x)[V], const int8_t* a, ptrdiff_t pitch) {
  Reg u[V];
  LOWBIT_UNROLL for (int v = 0; v < V; ++v) u[v] = unpack<B, P>(x[v]);
  LOWBIT_UNROLL for (int r = 0; r < MR; ++r) {
    const Reg av = broadcast(a + r * pitch + 4 * P);
    LOWBIT_UNROLL for (int v = 0; v < V; ++v) acc[r][v] = dot<B>(acc[r][v], u[v], av);
  }
  if constexpr (P + 1 < 8 / B) dot_planes<B, P + 1>(acc, x, a, pitch);
}

template <int B, int MR, int NP>
void dot_tile(const int8_t* a, ptrdiff_t pitch, const uint8_t* w, ptrdiff_t panel_stride,
              int64_t steps, int32_t* out) {
  constexpr int V = NP * kRegs;
  Reg acc[MR][V];
  LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int v = 0; v < V; ++v) acc[r][v] =
      zero();
  for (int64_t s = 0; s < steps; ++s) {
    Reg x[V];
    const ptrdiff_t ahead = prefetch_distance<NP>(s, steps, panel_stride);
    LOWBIT_UNROLL for (int p = 0; p < NP; ++p) {
      const uint8_t* q = w + p * panel_stride + s * kVectorBytes;
      if constexpr (MR <= 2) __builtin_prefetch(q + ahead);
      LOWBIT_UNROLL for (int i = 0; i < kRegs; ++i) x[p * kRegs + i] = load(q + i * kRegBytes);
    }
    dot_planes<B, 0>(acc, x, a + s * (32 / B), pitch);
  }
  LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int v = 0; v < V; ++v)
      store(out + r * kNr + v * (kRegBytes / 4), acc[r][v]);
}

template <int MR, int NP, bool Masked>
void xnor_tile(const uint32_t* a, const uint32_t* mask, ptrdiff_t pitch, const uint8_t* w,
               ptrdiff_t panel_stride, int64_t steps, int32_t* out) {
  constexpr int V = NP * kRegs;
  Reg acc[MR][V];
  LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int v = 0; v < V; ++v) acc[r][v] =
      zero();
  for (int64_t s = 0; s < steps; ++s) {
    Reg x[V];
    const ptrdiff_t ahead = prefetch_distance<NP>(s, steps, panel_stride);
    LOWBIT_UNROLL for (int p = 0; p < NP; ++p) {
      const uint8_t* q = w + p * panel_stride + s * kVectorBytes;
      if constexpr (MR <= 2) __builtin_prefetch(q + ahead);
      LOWBIT_UNROLL for (int i = 0; i < kRegs; ++i) x[p * kRegs + i] = load(q + i * kRegBytes);
    }
    LOWBIT_UNROLL for (int r = 0; r < MR; ++r) {
      const Reg av = broadcast(reinterpret_cast<const int8_t*>(a + r * pitch + s));
      LOWBIT_UNROLL for (int v = 0; v < V; ++v) {
        Reg d = bit_xor(x[v], av);
        if constexpr (Masked)
          d = bit_and(d, broadcast(reinterpret_cast<const int8_t*>(mask + r * pitch + s)));
        acc[r][v] = popcount_add(acc[r][v], d);
      }
    }
  }
  LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int v = 0; v < V; ++v)
      store(out + r * kNr + v * (kRegBytes / 4), acc[r][v]);
}

// Calls the tile for a number of rows known at run time: tile<rows>(...).
template <int MR, class Call>
inline void with_rows(int rows, Call call) {
  if constexpr (MR > 1) {
    if (rows < MR) return with_rows<MR - 1>(rows, call);
  }
  call(IntConstant<MR>{});
}

// Sums are modulo 2^32 until the offset is added: then they are exact.
inline int32_t affine(int32_t acc, int shift, int32_t offset) {
  return static_cast<int32_t>((static_cast<uint32_t>(acc) << shift) +
                              static_cast<uint32_t>(offset));
}

// A full tile of panels at once; fewer panels than that one by one.
template <class Call>
inline void over_panels(int panels, Call call) {
  if (panels == kPanels) return call(0, IntConstant<kPanels>{});
  for (int p = 0; p < panels; ++p) call(p, IntConstant<1>{});
}

template <int B>
void dot_any(int rows, const int8_t* a, ptrdiff_t pitch, const uint8_t* w, ptrdiff_t panel_stride,
             int panels, int64_t steps, int32_t* acc) {
  over_panels(panels, [&](int p, auto np) {
    with_rows<kMr>(rows, [&](auto mr) {
      dot_tile<B, decltype(mr)::value, decltype(np)::value>(a, pitch, w + p * panel_stride,
                                                            panel_stride, steps, acc + p * kPanel);
    });
  });
}

void xnor_any(int rows, const uint32_t* a, const uint32_t* mask, ptrdiff_t pitch, const uint8_t* w,
              ptrdiff_t panel_stride, int panels, int64_t steps, int32_t* acc) {
  over_panels(panels, [&](int p, auto np) {
    with_rows<kMr>(rows, [&](auto mr) {
      constexpr int kRows = decltype(mr)::value, kWide = decltype(np)::value;
      const uint8_t* q = w + p * panel_stride;
      int32_t* out = acc + p * kPanel;
      if (mask)
        xnor_tile<kRows, kWide, true>(a, mask, pitch, q, panel_stride, steps, out);
      else
        xnor_tile<kRows, kWide, false>(a, nullptr, pitch, q, panel_stride, steps, out);
    });
  });
}

int32_t sum_codes(const int8_t* q, int64_t n) {
  Reg acc = zero();
  int64_t i = 0;
  for (; i + kRegBytes <= n; i += kRegBytes)
    acc = dot<1>(acc, ones(), load(reinterpret_cast<const uint8_t*>(q + i)));
  int32_t lanes[kRegBytes / 4], s = 0;
  store(lanes, acc);
  for (int32_t lane : lanes) s += lane;
  for (; i < n; ++i) s += q[i];
  return s;
}

// N: the number of taps, so that their weights stay in registers over the pixels; 0: any number.
template <int B, int N>
void depthwise_panel(int pixels, const int8_t* columns, ptrdiff_t pixel_stride, int taps,
                     const ptrdiff_t* offsets, const uint8_t* w, ptrdiff_t w_stride,
                     const int8_t* zeros, int32_t* acc, int32_t* sums) {
  Reg codes[N ? N : 1][kRegs], zero_points[N ? N : 1];
  const auto weights_of = [&](int t, Reg(&c)[kRegs], Reg& z) {
    LOWBIT_UNROLL for (int r = 0; r < kRegs; ++r) c[r] = load(w + t * w_stride + r * kRegBytes);
    z = broadcast(zeros + 4 * t);
  };
  if constexpr (N > 0)
    LOWBIT_UNROLL for (int t = 0; t < N; ++t) weights_of(t, codes[t], zero_points[t]);
  for (int i = 0; i < pixels; ++i, columns += pixel_stride, acc += kNr) {
    Reg a[kRegs], s[kRegs];
    LOWBIT_UNROLL for (int r = 0; r < kRegs; ++r) a[r] = s[r] = zero();
    const auto add_tap = [&](int t, const Reg(&c)[kRegs], const Reg& z) {
      const uint8_t* column = reinterpret_cast<const uint8_t*>(columns + offsets[t]);
      LOWBIT_UNROLL for (int r = 0; r < kRegs; ++r) {
        const Reg x = load(column + r * kRegBytes);
        a[r] = dot<B>(a[r], c[r], x);
        s[r] = dot<B>(s[r], z, x);
      }
    };
    if constexpr (N > 0) {
      LOWBIT_UNROLL for (int t = 0; t < N; ++t) add_tap(t, codes[t], zero_points[t]);
    } else {
      for (int t = 0; t < taps; ++t) {
        weights_of(t, codes[0], zero_points[0]);
        add_tap(t, codes[0], zero_points[0]);
      }
    }
    LOWBIT_UNROLL for (int r = 0; r < kRegs; ++r) store(acc + r * (kRegBytes / 4), sub(a[r], s[r]));
    if (sums) {
      LOWBIT_UNROLL for (int r = 0; r < kRegs; ++r) store(sums + r * (kRegBytes / 4), s[r]);
      sums += kNr;
    }
  }
}

template <int B>
void depthwise_any(int pixels, const int8_t* columns, ptrdiff_t pixel_stride, int taps,
                   const ptrdiff_t* offsets, const uint8_t* w, ptrdiff_t w_stride,
                   const int8_t* zeros, int panels, int32_t* acc, int32_t* sums) {
  const auto run = taps == 3    ? depthwise_panel<B, 3>   // 3 x 3
                   : taps == 10 ? depthwise_panel<B, 10>  // 5 x 5
                                : depthwise_panel<B, 0>;
  for (int p = 0; p < panels; ++p)
    run(pixels, columns + p * kVectorBytes, pixel_stride, taps, offsets, w + p * kVectorBytes,
        w_stride, zeros, acc + p * kPanel, sums ? sums + p * kPanel : nullptr);
}

void interleave4(const int8_t* const* rows, int64_t count, int8_t* out) {
  for (int64_t i = 0; i < count; i += 16) {
    Reg v[kRegs];
    interleave(rows[0] + i, rows[1] + i, rows[2] + i, rows[3] + i, v);
    LOWBIT_UNROLL for (int r = 0; r < kRegs; ++r)
        store(reinterpret_cast<int32_t*>(out + 4 * i) + r * (kRegBytes / 4), v[r]);
  }
}

// Rows are 64 bytes and may be read whole.
void transpose4(const int8_t* rows, int count, int channels, int8_t* out, ptrdiff_t pitch) {
  for (int i = 0; i < count; i += 16) {
    Reg v[kRegs];
    interleave(rows + i, rows + 64 + i, rows + 128 + i, rows + 192 + i, v);
    int32_t pixels[16];
    LOWBIT_UNROLL for (int r = 0; r < kRegs; ++r) store(pixels + r * (kRegBytes / 4), v[r]);
    const int n = count - i < 16 ? count - i : 16;
    if (channels == 4) {
      for (int j = 0; j < n; ++j) __builtin_memcpy(out + (i + j) * pitch, pixels + j, 4);
    } else {
      for (int j = 0; j < n; ++j)
        for (int c = 0; c < channels; ++c)
          out[(i + j) * pitch + c] = static_cast<int8_t>(pixels[j] >> (8 * c));
    }
  }
}

// The ceilings: the kernels' own instruction mix on registers alone.
constexpr int kChains = 12;

double probe_dot(int64_t iterations) {
  Reg acc[kChains], u = ones(), a = ones();
  opaque(u), opaque(a);
  LOWBIT_UNROLL for (int i = 0; i < kChains; ++i) acc[i] = zero();
  for (int64_t n = 0; n < iterations; ++n) LOWBIT_UNROLL for (int i = 0; i < kChains; ++i) {
      acc[i] = dot<4>(acc[i], u, a);
      opaque(acc[i]);
    }
  return static_cast<double>(iterations) * kChains * kRegBytes;
}

double probe_xnor(int64_t iterations) {
  Reg acc[kChains], u = ones(), a = zero();
  opaque(u), opaque(a);
  LOWBIT_UNROLL for (int i = 0; i < kChains; ++i) acc[i] = zero();
  for (int64_t n = 0; n < iterations; ++n) LOWBIT_UNROLL for (int i = 0; i < kChains; ++i) {
      opaque(u);
      acc[i] = popcount_add(acc[i], bit_xor(u, a));
      opaque(acc[i]);
    }
  return static_cast<double>(iterations) * kChains * kRegBytes * 8;
}

double probe_fma(int64_t iterations) {
  FloatReg acc[kChains], a = float_ones(), b = float_ones();
  opaque_float(a), opaque_float(b);
  LOWBIT_UNROLL for (int i = 0; i < kChains; ++i) acc[i] = float_ones();
  for (int64_t n = 0; n < iterations; ++n) LOWBIT_UNROLL for (int i = 0; i < kChains; ++i) {
      acc[i] = fmadd(a, b, acc[i]);
      opaque_float(acc[i]);
    }
  return static_cast<double>(iterations) * kChains * (kRegBytes / 4);
}
