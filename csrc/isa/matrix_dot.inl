// GEMM by usmmla: 2 rows x 2 channels, 8 k deep. Part of microkernel.inl, for NEON with the
// matrix-multiply extension. The vocabulary that it asks for beside lane_dot.inl's:
//
//   matrix_dot(acc, u, a)   acc[2i + j] += 8 products of half i of u and half j of a
//   signed_matrix_dot       the same of signed codes
//
// The layout has 4 k of 4 channels in a register; a `zip` of two such makes 8 k of 2 channels. Four
// consecutive quads of k, q0 .. q3, are a unit of two octets, (q0, q2) and (q1, q3); of 2 bits
// eight quads are one of four octets, (q0, q4) .. (q3, q7). So where both are bit fields of one
// byte, one zip serves several fields, and unpacking comes after it. Rows are paired in the same
// order once a call, for all channels.
//
// Tiles have 16 sums: 8 rows x 8 channels, where a register of weights serves 4 products, or 16
// rows x 4, where it serves 8. For more than kFewRows rows, a panel is unpacked once, to `room`.
// One or two rows go by lane_dot: a pair would be half empty, and their weights come from memory.
#include "lane_dot.inl"

constexpr int kFewRows = 16, kLaneRows = 2;
constexpr int kOctet = kHalf * 8;       // bytes of half a panel
constexpr int kUnitBytes = 2 * kOctet;  // 16 k of half a panel, and as much of 8 rows

// k of a unit.
constexpr int unit_k(int bits) { return bits == 2 ? 32 : 16; }
constexpr int steps_of_unit(int bits) { return bits == 1 ? 1 : unit_k(bits) * bits / 32; }

// A unit of V registers of channels, of `Steps` steps where these are fewer; the rest of it is
// zero.
template <int B, int Steps, int V>
struct Units {
  static constexpr int kOctets = B <= 2 ? 4 : 2;

  LOWBIT_INLINE explicit Units(const uint8_t* w) : w_(w) {
    if constexpr (B == 8) return;
    LOWBIT_UNROLL for (int v = 0; v < V; ++v) {
      const Reg x = load(w + v * kRegBytes);
      zip(x, next(x, w + v * kRegBytes), z_ + 2 * v);
    }
  }

  // n[i] = 8 k of channels 2i and 2i + 1; of 1 bit, -1 and 0
  template <int O>
  LOWBIT_INLINE void get(Reg (&n)[2 * V]) const {
    if constexpr (B == 8) {
      LOWBIT_UNROLL for (int v = 0; v < V; ++v)
          zip(step<O>(w_ + v * kRegBytes), step<O + 2>(w_ + v * kRegBytes), n + 2 * v);
    } else {
      constexpr int kField = B == 1 ? O % 2 + O / 2 * 4 : O;
      LOWBIT_UNROLL for (int i = 0; i < 2 * V; ++i) {
        if constexpr (B == 1)
          n[i] = minus_bit<kField>(z_[i]);
        else
          n[i] = unpack<B, kField, 0, false>(z_[i]);
      }
    }
  }

 private:
  // What completes an octet, to where x has its first four k.
  static LOWBIT_INLINE Reg next(Reg x, const uint8_t* from) {
    if constexpr (B == 1) return lanes_of(vshrq_n_u8(unsigned_bytes(x), 2));
    return step<1>(from);
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
  Reg z_[2 * V];
};

// The first or second halves of two registers.
template <int Half>
LOWBIT_INLINE Reg pair_of(Reg a, Reg b) {
  const int64x2_t x = vreinterpretq_s64_s32(a), y = vreinterpretq_s64_s32(b);
  return vreinterpretq_s32_s64(Half == 1 ? vzip1q_s64(x, y) : vzip2q_s64(x, y));
}

// Rows in pairs, units of [octet][pair][16 bytes], for the tiles of a call one after the other.
template <int UnitK>
void pair_rows(const Tile& t, int64_t k, int8_t* out) {
  constexpr int kRegsOfUnit = UnitK / 16;
  const int pairs = (t.rows + 1) / 2, octet = pairs * kRegBytes;
  for (int p = 0; p < pairs; ++p) {
    const int8_t* rows[2] = {t.codes + 2 * p * t.pitch,
                             t.codes + (2 * p + 1 < t.rows ? 2 * p + 1 : 2 * p) * t.pitch};
    int8_t* to = out + p * kRegBytes;
    const auto put = [&](Reg x) {
      vst1q_s8(to, signed_bytes(x));
      to += octet;
    };
    for (int64_t i = 0; i < k; i += UnitK) {
      Reg x[2][kRegsOfUnit];
      LOWBIT_UNROLL for (int r = 0; r < 2; ++r) {
        const int8_t* from = rows[r] + i;
        int8_t last[UnitK] = {};
        if (i + UnitK > k) {
          __builtin_memcpy(last, from, static_cast<size_t>(k - i));
          from = last;
        }
        LOWBIT_UNROLL for (int j = 0; j < kRegsOfUnit; ++j) x[r][j] =
            lanes_of(vld1q_s8(from + j * kRegBytes));
      }
      if constexpr (UnitK == 16) {
        put(vuzp1q_s32(x[0][0], x[1][0]));
        put(vuzp2q_s32(x[0][0], x[1][0]));
      } else {
        const Reg a = vzip1q_s32(x[0][0], x[0][1]), b = vzip1q_s32(x[1][0], x[1][1]);
        const Reg c = vzip2q_s32(x[0][0], x[0][1]), d = vzip2q_s32(x[1][0], x[1][1]);
        put(pair_of<1>(a, b)), put(pair_of<2>(a, b));
        put(pair_of<1>(c, d)), put(pair_of<2>(c, d));
      }
    }
  }
}

// Sums of MR rows and V registers of channels, times 2^S. B: bits of a code; 0: unpacked, in
// `room`. Minus: bits are -1 or 0.
template <int B, int S, int MR, int V, bool Minus>
struct MatrixDot {
  static constexpr int P = B ? 8 / B : 4, kPairs = (MR + 1) / 2;
  static constexpr int kUnit = B ? steps_of_unit(B) : 1;
  static constexpr int kStepBytes = B ? kVectorBytes : kUnitBytes;

  // A function of its own, whose sums are memory: the registers are the loop's alone. Unpacked, a
  // unit is a step.
  static LOWBIT_NOINLINE void add_steps(const uint8_t* w, ptrdiff_t ahead, const int8_t* x,
                                        int64_t steps, Reg (&sum)[MR][V]) {
    constexpr int kOctetBytes = kPairs * kRegBytes;
    Reg acc[kPairs][2 * V];
    clear(acc);
    for (; steps >= kUnit; steps -= kUnit, w += kUnit * kStepBytes) {
      if constexpr (B > 0) {
        LOWBIT_UNROLL for (int s = 0; s < kUnit; ++s)
            __builtin_prefetch(w + ahead + s * kStepBytes);
        const Units<B, kUnit, V> units(w);
        octets<0>(acc, units, x);
        x += units.kOctets * kOctetBytes;
      } else {
        LOWBIT_UNROLL for (int o = 0; o < 2; ++o, x += kOctetBytes) {
          Reg n[2 * V];
          LOWBIT_UNROLL for (int i = 0; i < 2 * V; ++i) n[i] = load(w + o * kOctet + i * kRegBytes);
          multiply(acc, n, x);
        }
      }
    }
    if constexpr (kUnit > 1) {
      if (steps == 1) octets<0>(acc, Units<B, 1, V>(w), x);
      if constexpr (kUnit > 2) {
        if (steps == 2) octets<0>(acc, Units<B, 2, V>(w), x);
        if (steps == 3) octets<0>(acc, Units<B, 3, V>(w), x);
      }
    }
    LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int v = 0; v < V; ++v) {
      const Reg a = acc[r / 2][2 * v], b = acc[r / 2][2 * v + 1];
      const Reg row = r % 2 ? vuzp2q_s32(a, b) : vuzp1q_s32(a, b);
      sum[r][v] = Minus ? sub(sum[r][v], shift_left<S>(row)) : add(sum[r][v], shift_left<S>(row));
    }
  }

 private:
  template <int O, class Source>
  static LOWBIT_INLINE void octets(Reg (&acc)[kPairs][2 * V], const Source& units,
                                   const int8_t* x) {
    Reg n[2 * V];
    units.template get<O>(n);
    multiply(acc, n, x + O * kPairs * kRegBytes);
    if constexpr (O + 1 < Source::kOctets) octets<O + 1>(acc, units, x);
  }

  static LOWBIT_INLINE void multiply(Reg (&acc)[kPairs][2 * V], const Reg (&n)[2 * V],
                                     const int8_t* x) {
    LOWBIT_UNROLL for (int p = 0; p < kPairs; ++p) {
      const int8x16_t m = vld1q_s8(x + p * kRegBytes);
      LOWBIT_UNROLL for (int i = 0; i < 2 * V; ++i) acc[p][i] =
          Minus ? signed_matrix_dot(acc[p][i], n[i], m) : matrix_dot(acc[p][i], n[i], m);
    }
  }
};

// Of any number of bits.
constexpr int64_t whole_units(int64_t k) { return (k + 31) / 32 * 32; }

template <int B, int S>
struct Dot {
  static constexpr int P = 8 / B;

  static void run(const Tile& t) {
    if (t.rows <= kLaneRows) return run_lanes(t);
    // In room: half a panel, the other half, then the rows of each tile.
    const int64_t k = t.steps * P * 4, half_bytes = whole_units(k) * kHalf;
    int8_t* const paired = reinterpret_cast<int8_t*>(t.room) + 2 * half_bytes;
    if (t.rows <= kFewRows) {
      pair_rows<unit_k(B)>(t, k, paired);
      return with_rows<kLaneRows + 1, kFewRows>(t.rows, [&](auto mr) {
        constexpr int MR = decltype(mr)::value;
        for (int p = 0; p < t.panels; ++p) tile_of<MR, B>(t, p, paired, half_bytes);
      });
    }
    const int64_t tile_bytes = whole_units(k) * kDotRows;
    int8_t* x = paired;
    over_rows(t, kDotRows, [&](const Tile& part, int) {
      pair_rows<unit_k(B)>(part, k, x);
      x += tile_bytes;
    });
    for (int p = 0; p < t.panels; ++p) {
      unpack_panel(t, p, half_bytes);
      x = paired;
      over_rows(t, kDotRows, [&](const Tile& part, int rows) {
        with_rows<kDotRows / 2 + 1, kDotRows>(
            rows, [&](auto mr) { tile_of<decltype(mr)::value, 0>(part, p, x, half_bytes); });
        x += tile_bytes;
      });
    }
  }

 private:
  template <int MR, int Bits>
  static void tile_of(const Tile& t, int panel, const int8_t* x, int64_t half_bytes) {
    constexpr int kRowBytes = (MR + 1) / 2 * 2;  // of a k
    constexpr int V = MR <= kDotRows ? kRegs / 2 : kRegs / 4;
    for (int v = 0; v < kRegs; v += V)
      sum_groups<MR, V>(
          channels_of(t, v * kLanes), panel, [&](int64_t first, int64_t steps, Reg(&sum)[MR][V]) {
            const int8_t* from = x + first * P * 4 * kRowBytes;
            if constexpr (Bits == 0) {
              constexpr int kUnitK = unit_k(B);
              const uint8_t* w = t.room + v / V * half_bytes;
              MatrixDot<0, S, MR, V, B == 1>::add_steps(
                  w + first * P * 4 * kHalf, 0, from,
                  (steps * P * 4 + kUnitK - 1) / kUnitK * (kUnitK / 16), sum);
            } else {
              const uint8_t* w = t.w + panel * t.panel_stride;
              MatrixDot<B, S, MR, V, B == 1>::add_steps(w + first * kVectorBytes + v * kRegBytes,
                                                        ahead_of(t, panel) - w, from, steps, sum);
            }
          });
  }

  static LOWBIT_NOINLINE void unpack_panel(const Tile& t, int panel, int64_t half_bytes) {
    constexpr int kUnit = steps_of_unit(B);
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
    using Source = Units<B, Steps, kRegs / 2>;
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
