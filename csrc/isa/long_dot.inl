// Dot products from products of 16 bits, smull and smlal, as many of them added up as cannot
// overflow. Part of microkernel.inl, for NEON. The vocabulary that it asks for beside neon.inl's:
//
//   multiply_low(acc, u, a), multiply_high(acc, u, a)   acc += 8 products, as shorts
//   accumulate_pairs(acc, v)                                   acc[lane] += the lane's two shorts
//
// Tiles of 4 rows x 8 channels: 16 registers of sums. There is one multiplier; unpacking, spreading
// four bytes of activations over a register and adding pairs up find room beside it, so panels are
// unpacked in registers however many rows there are.
#include "half_panels.inl"

constexpr int kLongRows = 4;

// Sums of MR rows and V registers of channels. Any: activations may be -128.
template <int B, int S, int MR, int V, bool Any>
struct LongDot {
  static constexpr int P = 8 / B;
  // Products of a lane whose sum fits 16 bits, twice.
  static constexpr int kCode = (1 << B) - 1, kDepth = 32768 / (2 * kCode * 128);
  static constexpr int kSteps = kDepth / P;
  static_assert(kDepth * 2 * kCode * 128 <= 32768 && kDepth * 2 * kCode * 127 <= 32767 &&
                    kSteps >= 1,
                "a sum would leave int16");

  // A function of its own, whose sums are memory: the registers are the loop's alone.
  static LOWBIT_NOINLINE void add_steps(const uint8_t* w, ptrdiff_t ahead, const int8_t* a,
                                        ptrdiff_t pitch, int64_t steps, Reg (&sum)[MR][V]) {
    while (steps > 0) {
      int16x8_t low[MR][V], high[MR][V];
      LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int v = 0; v < V; ++v)
          low[r][v] = high[r][v] = vdupq_n_s16(0);
      const int64_t now = steps < kSteps ? steps : kSteps;
      for (int64_t s = 0; s < now; ++s, w += kVectorBytes, a += P * 4) {
        __builtin_prefetch(w + ahead);
        fields<0>(low, high, w, a, pitch);
      }
      steps -= now;
      LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int v = 0; v < V; ++v) {
        const int16x8_t pairs = vpaddq_s16(low[r][v], high[r][v]);
        sum[r][v] =
            S ? add(sum[r][v], shift_left<S>(vpaddlq_s16(pairs))) : vpadalq_s16(sum[r][v], pairs);
      }
    }
  }

 private:
  template <int F>
  static LOWBIT_INLINE void fields(int16x8_t (&low)[MR][V], int16x8_t (&high)[MR][V],
                                   const uint8_t* w, const int8_t* a, ptrdiff_t pitch) {
    int8x16_t u[V], x[MR];
    LOWBIT_UNROLL for (int r = 0; r < MR; ++r) x[r] =
        signed_bytes(broadcast(a + r * pitch + F * 4));
    LOWBIT_UNROLL for (int v = 0; v < V; ++v) u[v] =
        signed_bytes(unpack<B, F, 0, false>(load(w + v * kRegBytes)));
    LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int v = 0; v < V; ++v) {
      multiply_low(low[r][v], u[v], x[r]);
      multiply_high(high[r][v], u[v], x[r]);
    }
    if constexpr (F + 1 < P) fields<F + 1>(low, high, w, a, pitch);
  }
};

// Codes of 8 bits, centred. Two products fit 16 bits, unless all factors are -128.
template <int S, int MR, int V, bool Any>
struct LongDot<8, S, MR, V, Any> {
  static_assert(S == 0, "no format of 8 bits has even levels");
  static_assert(2 * 128 * 127 <= 32767, "two products would leave int16");

  static LOWBIT_NOINLINE void add_steps(const uint8_t* w, ptrdiff_t ahead, const int8_t* a,
                                        ptrdiff_t pitch, int64_t steps, Reg (&sum)[MR][V]) {
    constexpr int kUnit = Any ? 1 : 2;
    Reg low[MR][V], high[MR][V];
    clear(low), clear(high);
    for (; steps >= kUnit; steps -= kUnit, w += kUnit * kVectorBytes, a += kUnit * 4) {
      LOWBIT_UNROLL for (int s = 0; s < kUnit; ++s)
          __builtin_prefetch(w + ahead + s * kVectorBytes);
      products<kUnit>(low, high, w, a, pitch);
    }
    if (kUnit > 1 && steps > 0) products<1>(low, high, w, a, pitch);
    LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int v = 0; v < V; ++v) sum[r][v] =
        add(sum[r][v], vpaddq_s32(low[r][v], high[r][v]));
  }

 private:
  template <int Steps>
  static LOWBIT_INLINE void products(Reg (&low)[MR][V], Reg (&high)[MR][V], const uint8_t* w,
                                     const int8_t* a, ptrdiff_t pitch) {
    int8x16_t u[Steps][V];
    LOWBIT_UNROLL for (int s = 0; s < Steps; ++s) LOWBIT_UNROLL for (int v = 0; v < V; ++v)
        u[s][v] = centred(load(w + s * kVectorBytes + v * kRegBytes));
    LOWBIT_UNROLL for (int r = 0; r < MR; ++r) {
      int8x16_t x[Steps];
      LOWBIT_UNROLL for (int s = 0; s < Steps; ++s) x[s] =
          signed_bytes(broadcast(a + r * pitch + s * 4));
      // Two registers of channels at a time, so that no product waits for the one before.
      LOWBIT_UNROLL for (int v = 0; v < V; v += 2) {
        int16x8_t l[2], h[2];
        LOWBIT_UNROLL for (int i = 0; i < 2; ++i) {
          l[i] = vmull_s8(vget_low_s8(u[0][v + i]), vget_low_s8(x[0]));
          h[i] = vmull_high_s8(u[0][v + i], x[0]);
        }
        if constexpr (Steps > 1) {
          LOWBIT_UNROLL for (int i = 0; i < 2; ++i) {
            multiply_low(l[i], u[1][v + i], x[1]);
            multiply_high(h[i], u[1][v + i], x[1]);
          }
        }
        LOWBIT_UNROLL for (int i = 0; i < 2; ++i) {
          accumulate_pairs(low[r][v + i], l[i]);
          accumulate_pairs(high[r][v + i], h[i]);
        }
      }
    }
  }
};

// Whether an activation is -128: the low byte of an int16 one, a static one, what stands where the
// weights are padding.
inline bool has_least(const Tile& t) {
  int8x16_t least = vdupq_n_s8(0);
  for (int r = 0; r < t.rows; ++r) {
    const int8_t* a = t.codes + r * t.pitch;
    const int64_t k = t.steps * 4;
    int64_t i = 0;
    for (; i + kRegBytes <= k; i += kRegBytes) least = vminq_s8(least, vld1q_s8(a + i));
    for (; i < k; i += 4) least = vminq_s8(least, signed_bytes(broadcast(a + i)));
  }
  return vminvq_s8(least) == -128;
}

template <int B, int S>
struct Dot {
  static void run(const Tile& tile) {
    Tile t = tile;
    if constexpr (B == 8) {
      int32_t* offsets = reinterpret_cast<int32_t*>(t.room);
      centre_offsets(t, offsets);
      t.offset = offsets;
      t.offset_pitch = t.groups;
    }
    const bool any = B == 8 && has_least(t);
    for (int p = 0; p < t.panels; ++p)
      over_rows(t, kLongRows, [&](const Tile& part, int rows) {
        with_rows<1, kLongRows>(rows, [&](auto mr) {
          constexpr int MR = decltype(mr)::value;
          if constexpr (B == 8)
            if (any) return tile_of<MR, true>(part, p);
          tile_of<MR, false>(part, p);
        });
      });
  }

 private:
  template <int MR, bool Any>
  static void tile_of(const Tile& t, int panel) {
    constexpr int V = MR <= kLongRows / 2 ? kRegs : kRegs / 2;
    for (int half = 0; half < kRegs / V; ++half)
      sum_groups<MR, V>(
          channels_of(t, half * kHalf), panel, [&](int64_t first, int64_t steps, Reg(&sum)[MR][V]) {
            const uint8_t* w = t.w + panel * t.panel_stride;
            LongDot<B, S, MR, V, Any>::add_steps(w + first * kVectorBytes + half * kHalf * 4,
                                                 ahead_of(t, panel) - w, t.codes + first * (32 / B),
                                                 t.pitch, steps, sum);
          });
  }
};

// Offsets of groups of 32 at least.
constexpr int64_t room(int64_t k) { return kMr * (k / 32 + 1) * 4; }

// The multiplier alone: what is beside it has units of its own.
template <int B>
double probe_dot(int64_t iterations) {
  Reg acc[kChains], u = bytes(1), a = bytes(1);
  opaque(u), opaque(a);
  LOWBIT_UNROLL for (int i = 0; i < kChains; ++i) acc[i] = zero();
  for (int64_t n = 0; n < iterations; ++n) LOWBIT_UNROLL for (int i = 0; i < kChains; ++i) {
      int16x8_t s = vreinterpretq_s16_s32(acc[i]);
      multiply_low(s, signed_bytes(u), signed_bytes(a));
      acc[i] = vreinterpretq_s32_s16(s);
      opaque(acc[i]);
    }
  return static_cast<double>(iterations) * kChains * 8;
}
