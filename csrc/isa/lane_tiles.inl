// GEMM by lane_dot: tiles of up to 8 rows. With more than kFewRows rows, a panel is unpacked once
// for all of them, to `room`, half after half. Part of microkernel.inl, for NEON.
#include "lane_dot.inl"

constexpr int kFewRows = 16;

template <int B, int S>
struct Dot {
  static constexpr int P = 8 / B;

  static void run(const Tile& tile) {
    Tile t = tile;
    const int64_t half_bytes = t.steps * P * kHalf * 4;
    if constexpr (B == 8) {
      int32_t* offsets = reinterpret_cast<int32_t*>(t.room + 2 * half_bytes);
      centre_offsets(t, offsets);
      t.offset = offsets;
      t.offset_pitch = t.groups;
    }
    for (int p = 0; p < t.panels; ++p) {
      const bool unpacked = t.rows > kFewRows;
      if (unpacked) unpack_panel(t, p, half_bytes);
      over_rows(t, kDotRows, [&](const Tile& part, int rows) {
        with_rows<1, kDotRows>(rows, [&](auto mr) {
          constexpr int MR = decltype(mr)::value;
          if constexpr (MR > kDotRows / 2)
            if (unpacked) return unpacked_tile<MR>(part, p, half_bytes);
          tile_of<MR>(part, p);
        });
      });
    }
  }

 private:
  template <int MR>
  static void tile_of(const Tile& t, int panel) {
    constexpr int V = MR <= kDotRows / 2 ? kRegs : kRegs / 2;
    for (int half = 0; half < kRegs / V; ++half)
      sum_groups<MR, V>(
          channels_of(t, half * kHalf), panel, [&](int64_t first, int64_t steps, Reg(&sum)[MR][V]) {
            const uint8_t* w = t.w + panel * t.panel_stride;
            LaneDot<B, S, MR, V>::add_steps(w + first * kVectorBytes + half * kHalf * 4,
                                            ahead_of(t, panel) - w, t.codes + first * P * 4,
                                            t.pitch, steps, sum);
          });
  }

  template <int MR>
  static void unpacked_tile(const Tile& t, int panel, int64_t half_bytes) {
    constexpr int V = kRegs / 2;
    for (int half = 0; half < 2; ++half)
      sum_groups<MR, V>(
          channels_of(t, half * kHalf), panel, [&](int64_t first, int64_t steps, Reg(&sum)[MR][V]) {
            LaneDot<0, S, MR, V>::add_steps(t.room + half * half_bytes + first * P * kHalf * 4, 0,
                                            t.codes + first * P * 4, t.pitch, steps * P, sum);
          });
  }

  static LOWBIT_NOINLINE void unpack_panel(const Tile& t, int panel, int64_t half_bytes) {
    const uint8_t *w = t.w + panel * t.panel_stride, *ahead = ahead_of(t, panel);
    uint8_t* out = t.room;
    for (int64_t s = 0; s < t.steps; ++s, w += kVectorBytes, out += P * kHalf * 4) {
      __builtin_prefetch(ahead + s * kVectorBytes);
      LOWBIT_UNROLL for (int v = 0; v < kRegs; ++v)
          unpack_fields<0>(load(w + v * kRegBytes), out + v / 2 * half_bytes + v % 2 * kRegBytes);
    }
  }

  template <int F>
  static LOWBIT_INLINE void unpack_fields(Reg x, uint8_t* out) {
    Reg u;
    if constexpr (B == 8)
      u = lanes_of(centred(x));
    else
      u = unpack<B, F, 0, false>(x);
    store(reinterpret_cast<int32_t*>(out + F * kHalf * 4), u);
    if constexpr (F + 1 < P) unpack_fields<F + 1>(x, out);
  }
};

// An unpacked panel; offsets of groups of 32 at least.
constexpr int64_t room(int64_t k) { return k * kPanel + kMr * (k / 32 + 1) * 4; }

template <int B>
double probe_dot(int64_t iterations) {
  Reg acc[kChains], u = bytes(1), a = bytes(1);
  opaque(u), opaque(a);
  LOWBIT_UNROLL for (int i = 0; i < kChains; ++i) acc[i] = zero();
  for (int64_t n = 0; n < iterations; ++n) LOWBIT_UNROLL for (int i = 0; i < kChains; ++i) {
      acc[i] = lane_dot<0>(acc[i], u, signed_bytes(a));
      opaque(acc[i]);
    }
  return static_cast<double>(iterations) * kChains * kRegBytes;
}
