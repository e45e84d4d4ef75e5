// GEMM by usmmla: 2 rows x 2 channels, 8 k deep. Part of microkernel.inl, for NEON with the
// matrix-multiply extension. The vocabulary that it asks for beside lane_dot.inl's:
//
//   matrix_dot(acc, u, a)   acc[2i + j] += 8 products of half i of u and half j of a
//   signed_matrix_dot       the same of signed codes
//
// The layout has 4 k of 4 channels in a register; a `zip` of two such makes 8 k of 2 channels. Four
// consecutive quads of k, q0 .. q3, are a unit of two octets, (q0, q2) and (q1, q3): so where both
// are bit fields of one byte, one zip serves several fields, and unpacking comes after it. Rows are
// paired in the same order once a call, for all channels.
//
// Tiles of 8 rows x 8 channels: 16 sums, 4 pairs of rows and 4 of channels an octet. For more than
// kFewRows rows, a panel is unpacked once, to `room`. One or two rows go by lane_dot: a pair would
// be half empty, and their weights come from memory.
#include "lane_dot.inl"

constexpr int kFewRows = 8, kLaneRows = 2;
constexpr int kOctet = kHalf * 8;       // bytes of half a panel
constexpr int kUnitBytes = 2 * kOctet;  // 16 k of half a panel, and as much of 8 rows

// A step's or some steps' worth of half a panel: units of 16 k, of `Steps` steps where these are
// fewer than a unit; the rest of it is zero.
template <int B, int Steps>
struct Units {
  static constexpr int kOctets = B == 1 ? 4 : 2;

  LOWBIT_INLINE explicit Units(const uint8_t* w) : w_(w) {
    if constexpr (B == 8) return;
    LOWBIT_UNROLL for (int v = 0; v < kHalf / 4; ++v) {
      const Reg x = load(w + v * kRegBytes);
      // Of 2 bits, fields 0 and 1, to be told apart by one operation each; 2 and 3 likewise.
      zip(B == 2 ? unpack<4, 0, 0, false>(x) : x, next(x, w + v * kRegBytes), z_ + 2 * v);
    }
  }

  // n[i] = 8 k of channels 2i and 2i + 1; of 1 bit, -1 and 0
  template <int O>
  LOWBIT_INLINE void get(Reg (&n)[kHalf / 2]) const {
    if constexpr (B == 8) {
      LOWBIT_UNROLL for (int v = 0; v < kHalf / 4; ++v)
          zip(step<O>(w_ + v * kRegBytes), step<O + 2>(w_ + v * kRegBytes), n + 2 * v);
    } else {
      constexpr int kField = O % 2 + O / 2 * 4;
      LOWBIT_UNROLL for (int i = 0; i < kHalf / 2; ++i) n[i] = field<kField>(z_[i]);
    }
  }

 private:
  // q2 and q3 to where x has q0 and q1.
  static LOWBIT_INLINE Reg next(Reg x, const uint8_t* from) {
    if constexpr (B == 4) return step<1>(from);
    if constexpr (B < 4) return lanes_of(vshrq_n_u8(unsigned_bytes(x), 2 * B));
    return x;
  }
  template <int F>
  static LOWBIT_INLINE Reg field(Reg z) {
    if constexpr (B == 1) return minus_bit<F>(z);
    if constexpr (B == 2 && F == 1) return lanes_of(vshrq_n_u8(unsigned_bytes(z), 2));
    return unpack<B, F, 0, false>(z);
  }
  template <int Index>
  static LOWBIT_INLINE Reg step(const uint8_t* from) {
    if constexpr (Index < Steps) return load(from + Index * kVectorBytes);
    return zero();
  }
  static LOWBIT_INLINE void zip(Reg a, Reg b, Reg* out) {
    out[0] = vzip1q_s32(a, b);
    out[1] = vzip2q_s32(a, b);
  }

  const uint8_t* w_;
  Reg z_[kHalf / 2];
};

// Rows in pairs, units of [octet][pair][16 bytes], for the tiles of a call one after the other.
inline void pair_rows(const Tile& t, int64_t k, int8_t* out) {
  const int pairs = (t.rows + 1) / 2;
  for (int p = 0; p < pairs; ++p) {
    const int8_t* rows[2] = {t.codes + 2 * p * t.pitch,
                             t.codes + (2 * p + 1 < t.rows ? 2 * p + 1 : 2 * p) * t.pitch};
    int8_t* to = out + p * kRegBytes;
    for (int64_t i = 0; i < k; i += 16, to += 2 * pairs * kRegBytes) {
      Reg x[2];
      LOWBIT_UNROLL for (int r = 0; r < 2; ++r) {
        if (i + 16 <= k) {
          x[r] = lanes_of(vld1q_s8(rows[r] + i));
        } else {
          int8_t last[16] = {};
          __builtin_memcpy(last, rows[r] + i, static_cast<size_t>(k - i));
          x[r] = lanes_of(vld1q_s8(last));
        }
      }
      vst1q_s8(to, signed_bytes(vuzp1q_s32(x[0], x[1])));
      vst1q_s8(to + pairs * kRegBytes, signed_bytes(vuzp2q_s32(x[0], x[1])));
    }
  }
}

// Sums of MR rows and half a panel, times 2^S. B: bits of a code; 0: unpacked, in `room`. Minus:
// bits are -1 or 0.
template <int B, int S, int MR, bool Minus>
struct MatrixDot {
  static constexpr int P = B ? 8 / B : 4, kPairs = (MR + 1) / 2, kHalfRegs = kRegs / 2;
  static constexpr int kUnit = P < 4 ? 4 / P : 1;  // steps of a unit at least
  static constexpr int kStepBytes = B ? kVectorBytes : kUnitBytes;

  // A function of its own, whose sums are memory: the registers are the loop's alone. Unpacked, a
  // unit is a step.
  static LOWBIT_NOINLINE void add_steps(const uint8_t* w, ptrdiff_t ahead, const int8_t* x,
                                        int64_t steps, Reg (&sum)[MR][kHalfRegs]) {
    constexpr int kOctetBytes = kPairs * kRegBytes;
    Reg acc[kPairs][kHalf / 2];
    clear(acc);
    for (; steps >= kUnit; steps -= kUnit, w += kUnit * kStepBytes) {
      if constexpr (B > 0) {
        LOWBIT_UNROLL for (int s = 0; s < kUnit; ++s)
            __builtin_prefetch(w + ahead + s * kStepBytes);
        const Units<B, kUnit> units(w);
        octets<0>(acc, units, x);
        x += units.kOctets * kOctetBytes;
      } else {
        LOWBIT_UNROLL for (int o = 0; o < 2; ++o, x += kOctetBytes) {
          Reg n[kHalf / 2];
          LOWBIT_UNROLL for (int i = 0; i < kHalf / 2; ++i) n[i] =
              load(w + o * kOctet + i * kRegBytes);
          multiply(acc, n, x);
        }
      }
    }
    if constexpr (kUnit > 1) {
      if (steps == 1) octets<0>(acc, Units<B, 1>(w), x);
      if constexpr (kUnit > 2) {
        if (steps == 2) octets<0>(acc, Units<B, 2>(w), x);
        if (steps == 3) octets<0>(acc, Units<B, 3>(w), x);
      }
    }
    LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int v = 0; v < kHalfRegs; ++v) {
      const Reg a = acc[r / 2][2 * v], b = acc[r / 2][2 * v + 1];
      const Reg row = r % 2 ? vuzp2q_s32(a, b) : vuzp1q_s32(a, b);
      sum[r][v] = Minus ? sub(sum[r][v], shift_left<S>(row)) : add(sum[r][v], shift_left<S>(row));
    }
  }

 private:
  template <int O, class Source>
  static LOWBIT_INLINE void octets(Reg (&acc)[kPairs][kHalf / 2], const Source& units,
                                   const int8_t* x) {
    Reg n[kHalf / 2];
    units.template get<O>(n);
    multiply(acc, n, x + O * kPairs * kRegBytes);
    if constexpr (O + 1 < Source::kOctets) octets<O + 1>(acc, units, x);
  }

  static LOWBIT_INLINE void multiply(Reg (&acc)[kPairs][kHalf / 2], const Reg (&n)[kHalf / 2],
                                     const int8_t* x) {
    LOWBIT_UNROLL for (int p = 0; p < kPairs; ++p) {
      const int8x16_t m = vld1q_s8(x + p * kRegBytes);
      LOWBIT_UNROLL for (int i = 0; i < kHalf / 2; ++i) acc[p][i] =
          Minus ? signed_matrix_dot(acc[p][i], n[i], m) : matrix_dot(acc[p][i], n[i], m);
    }
  }
};

constexpr int64_t whole_units(int64_t k) { return (k + 15) / 16 * 16; }

template <int B, int S>
struct Dot {
  static constexpr int P = 8 / B;

  static void run(const Tile& t) {
    if (t.rows <= kLaneRows) return run_lanes(t);
    // In room: half a panel, the other half, then the rows of each tile.
    const int64_t k = t.steps * P * 4, half_bytes = whole_units(k) * kHalf;
    int8_t* const paired = reinterpret_cast<int8_t*>(t.room) + 2 * half_bytes;
    const int64_t tile_bytes = whole_units(k) * kDotRows;
    const bool unpacked = t.rows > kFewRows;
    int8_t* x = paired;
    over_rows(t, kDotRows, [&](const Tile& part, int) {
      pair_rows(part, k, x);
      x += tile_bytes;
    });
    for (int p = 0; p < t.panels; ++p) {
      if (unpacked) unpack_panel(t, p, half_bytes);
      x = paired;
      over_rows(t, kDotRows, [&](const Tile& part, int rows) {
        with_rows<kLaneRows + 1, kDotRows>(rows, [&](auto mr) {
          constexpr int MR = decltype(mr)::value;
          if constexpr (MR > kDotRows / 2)
            if (unpacked) return tile_of<MR, 0>(part, p, x, half_bytes);
          tile_of<MR, B>(part, p, x, half_bytes);
        });
        x += tile_bytes;
      });
    }
  }

 private:
  template <int MR, int Bits>
  static void tile_of(const Tile& t, int panel, const int8_t* x, int64_t half_bytes) {
    constexpr int kRowBytes = (MR + 1) / 2 * 2;  // of a k
    constexpr int V = kRegs / 2;
    for (int half = 0; half < 2; ++half)
      sum_groups<MR, V>(
          half_of(t, half), panel, [&](int64_t first, int64_t steps, Reg(&sum)[MR][V]) {
            const uint8_t* w = t.w + panel * t.panel_stride;
            const int8_t* from = x + first * P * 4 * kRowBytes;
            if constexpr (Bits == 0)
              MatrixDot<0, S, MR, B == 1>::add_steps(
                  t.room + half * half_bytes + first * P * 4 * kHalf, 0, from, (steps * P + 3) / 4,
                  sum);
            else
              MatrixDot<B, S, MR, B == 1>::add_steps(w + first * kVectorBytes + half * kHalf * 4,
                                                     ahead_of(t, panel) - w, from, steps, sum);
          });
  }

  static LOWBIT_NOINLINE void unpack_panel(const Tile& t, int panel, int64_t half_bytes) {
    constexpr int kUnit = P < 4 ? 4 / P : 1;
    const uint8_t *w = t.w + panel * t.panel_stride, *ahead = ahead_of(t, panel);
    uint8_t* out = t.room;
    int64_t s = 0;
    for (; s + kUnit <= t.steps; s += kUnit) {
      LOWBIT_UNROLL for (int i = 0; i < kUnit; ++i)
          __builtin_prefetch(ahead + (s + i) * kVectorBytes);
      out = unpack_units<kUnit>(w + s * kVectorBytes, out, half_bytes);
    }
    if constexpr (kUnit > 1) {
      if (t.steps - s == 1) unpack_units<1>(w + s * kVectorBytes, out, half_bytes);
      if constexpr (kUnit > 2) {
        if (t.steps - s == 2) unpack_units<2>(w + s * kVectorBytes, out, half_bytes);
        if (t.steps - s == 3) unpack_units<3>(w + s * kVectorBytes, out, half_bytes);
      }
    }
  }

  template <int Steps>
  static LOWBIT_INLINE uint8_t* unpack_units(const uint8_t* w, uint8_t* out, int64_t half_bytes) {
    using Source = Units<B, Steps>;
    LOWBIT_UNROLL for (int half = 0; half < 2; ++half)
        store_octets<0>(Source(w + half * kHalf * 4), out + half * half_bytes);
    return out + Source::kOctets * kOctet;
  }

  template <int O, class Source>
  static LOWBIT_INLINE void store_octets(const Source& units, uint8_t* out) {
    Reg n[kHalf / 2];
    units.template get<O>(n);
    LOWBIT_UNROLL for (int i = 0; i < kHalf / 2; ++i)
        vst1q_u8(out + O * kOctet + i * kRegBytes, unsigned_bytes(n[i]));
    if constexpr (O + 1 < Source::kOctets) store_octets<O + 1>(units, out);
  }

  static void run_lanes(const Tile& t) {
    for (int p = 0; p < t.panels; ++p)
      with_rows<1, kLaneRows>(t.rows, [&](auto mr) {
        constexpr int MR = decltype(mr)::value;
        sum_groups<MR, kRegs>(t, p, [&](int64_t first, int64_t steps, Reg(&sum)[MR][kRegs]) {
          const uint8_t* w = t.w + p * t.panel_stride;
          LaneDot<B, S, MR, kRegs>::add_steps(w + first * kVectorBytes, ahead_of(t, p) - w,
                                              t.codes + first * P * 4, t.pitch, steps, sum);
        });
      });
  }
};

// An unpacked panel and the rows of a call.
constexpr int64_t room(int64_t k) { return whole_units(k) * (kPanel + kMr); }

template <int B>
double probe_dot(int64_t iterations) {
  Reg acc[kChains], u = bytes(1), a = bytes(1);
  opaque(u), opaque(a);
  LOWBIT_UNROLL for (int i = 0; i < kChains; ++i) acc[i] = zero();
  for (int64_t n = 0; n < iterations; ++n) LOWBIT_UNROLL for (int i = 0; i < kChains; ++i) {
      acc[i] = matrix_dot(acc[i], u, signed_bytes(a));
      opaque(acc[i]);
    }
  return static_cast<double>(iterations) * kChains * kRegBytes * 2;
}
