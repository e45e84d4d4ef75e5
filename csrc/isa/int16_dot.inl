// Dot products for ISAs whose products of bytes are 16-bit: sums of as many as cannot overflow stay
// in int16, rows x a panel in registers; the int32 sums lie in memory. Part of microkernel.inl. The
// vocabulary that it asks for:
//
//   multiply_bytes(u, a)    pairs of products u8 * s8, added to 16 bits, saturated
//   accumulate_shorts(acc, v), accumulate(acc, v)   acc += v on shorts, on lanes; they stay in the
//                           order of the source: GCC 12 would keep many products, and spill sums
//   sum_pairs(v, x)         x * (sum of the two shorts of a lane)
//   magnitude(a)            |a| of every byte, unsigned
//   sign_flip(a)            0x80 where a byte is not negative, else 0x7f

// Bytes of a dword of every channel of a panel: 4 consecutive k.
constexpr int kQuadBytes = kVectorBytes;
// Rows of a tile: its registers are 2 x rows sums, 2 of weights, an activation, a product.
constexpr int kRows = 6;
constexpr int kFewRows = 12;

// Codes of at most 4 bits. With few rows the bit fields are unpacked in registers; with many, once
// for all rows, to `room`, where a panel becomes a dword of every channel after the other.
template <int B, int S>
struct Dot {
  static constexpr int kPlanes = 8 / B;
  // How many products of a lane fit its 16 bits.
  static constexpr int kCode = (1 << B) - 1, kDepth = 32768 / (2 * kCode * 128);
  static_assert(kDepth * 2 * kCode * 128 <= 32768 && kDepth * 2 * kCode * 127 <= 32767 &&
                    kDepth >= 8,
                "a sum would leave int16");
  static constexpr int kEights = kDepth / 8;  // eight quads are the smallest group of K: 32
  static constexpr int kSteps = kDepth / kPlanes;

  static void run(const Tile& t) {
    for (int p = 0; p < t.panels; ++p) {
      const bool decoded = t.rows > kFewRows;
      if (decoded) decode(t, p);
      over_rows(t, kRows, [&](const Tile& part, int rows) {
        with_rows<1, kRows>(rows, [&](auto mr) {
          constexpr int MR = decltype(mr)::value;
          if constexpr (MR >= kRows / 2)
            if (decoded) return tile<MR>(part, p);
          stream<MR>(part, p);
        });
      });
    }
  }

 private:
  static void decode(const Tile& t, int panel) {
    const uint8_t *w = t.w + panel * t.panel_stride, *ahead = ahead_of(t, panel);
    uint8_t* out = t.room;
    for (int64_t s = 0; s < t.steps; ++s, w += kVectorBytes, out += kPlanes * kQuadBytes) {
      __builtin_prefetch(ahead + s * kVectorBytes);
      LOWBIT_UNROLL for (int i = 0; i < kRegs; ++i)
          decode_planes<0>(load(w + i * kRegBytes), out + i * kRegBytes);
    }
  }

  template <int P>
  static LOWBIT_INLINE void decode_planes(Reg x, uint8_t* out) {
    store(reinterpret_cast<int32_t*>(out + P * kQuadBytes), unpack<B, P, 0, false>(x));
    if constexpr (P + 1 < kPlanes) decode_planes<P + 1>(x, out);
  }

  template <int MR>
  static void tile(const Tile& t, int panel) {
    sum_groups<MR, kRegs>(t, panel, [&](int64_t first, int64_t steps, Reg(&sum)[MR][kRegs]) {
      add_quads(t.room + first * kPlanes * kQuadBytes, t.codes + first * kPlanes * 4, t.pitch,
                steps * kPlanes, sum);
    });
  }

  // A function of its own, whose sums are memory: else GCC 12 spills the partial ones.
  template <int MR>
  static LOWBIT_NOINLINE void add_quads(const uint8_t* u, const int8_t* a, ptrdiff_t pitch,
                                        int64_t quads, Reg (&sum)[MR][kRegs]) {
    while (quads >= 8) {
      Reg part[MR][kRegs];
      const int64_t eights = quads / 8 < kEights ? quads / 8 : kEights;
      eight<true>(part, u, a, pitch);
      for (int64_t i = 1; i < eights; ++i)
        eight<false>(part, u += 8 * kQuadBytes, a += 8 * 4, pitch);
      u += 8 * kQuadBytes, a += 8 * 4, quads -= 8 * eights;
      flush(part, sum);
    }
    if (quads == 0) return;
    Reg part[MR][kRegs];
    multiply<true>(part, u, a, pitch);
    while (--quads) multiply<false>(part, u += kQuadBytes, a += 4, pitch);
    flush(part, sum);
  }

  template <bool Start, int MR>
  static LOWBIT_INLINE void eight(Reg (&part)[MR][kRegs], const uint8_t* u, const int8_t* a,
                                  ptrdiff_t pitch) {
    multiply<Start>(part, u, a, pitch);
    LOWBIT_UNROLL for (int q = 1; q < 8; ++q)
        multiply<false>(part, u + q * kQuadBytes, a + q * 4, pitch);
  }

  template <bool Start, int MR>
  static LOWBIT_INLINE void multiply(Reg (&part)[MR][kRegs], const uint8_t* w, const int8_t* a,
                                     ptrdiff_t pitch) {
    Reg u[kRegs];
    LOWBIT_UNROLL for (int i = 0; i < kRegs; ++i) u[i] = load(w + i * kRegBytes);
    multiply<Start>(part, u, a, pitch);
  }

  template <bool Start, int MR>
  static LOWBIT_INLINE void multiply(Reg (&part)[MR][kRegs], const Reg (&u)[kRegs], const int8_t* a,
                                     ptrdiff_t pitch) {
    LOWBIT_UNROLL for (int r = 0; r < MR; ++r) {
      const Reg av = broadcast(a + r * pitch);
      LOWBIT_UNROLL for (int i = 0; i < kRegs; ++i) {
        const Reg product = multiply_bytes(u[i], av);
        if constexpr (Start)
          part[r][i] = product;
        else
          accumulate_shorts(part[r][i], product);
      }
    }
  }

  template <int MR>
  static LOWBIT_INLINE void flush(const Reg (&part)[MR][kRegs], Reg (&sum)[MR][kRegs]) {
    LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int i = 0; i < kRegs; ++i)
        sum[r][i] = add(sum[r][i], sum_pairs(part[r][i], 1 << S));
  }

  template <int MR>
  static void stream(const Tile& t, int panel) {
    sum_groups<MR, kRegs>(t, panel, [&](int64_t first, int64_t steps, Reg(&sum)[MR][kRegs]) {
      const uint8_t* w = t.w + panel * t.panel_stride;
      add_steps(w + first * kVectorBytes, ahead_of(t, panel) - w, t.codes + first * kPlanes * 4,
                t.pitch, steps, sum);
    });
  }

  // The latency of adding asks for two chains where there is one row.
  template <int MR>
  static LOWBIT_NOINLINE void add_steps(const uint8_t* w, ptrdiff_t ahead, const int8_t* a,
                                        ptrdiff_t pitch, int64_t steps, Reg (&sum)[MR][kRegs]) {
    constexpr int C = MR == 1 ? 2 : 1;
    while (steps > 0) {
      const int64_t now = steps < kSteps ? steps : kSteps;
      Reg part[C][MR][kRegs];
      stream_planes<true, 0>(part, w, ahead, a, pitch);
      for (int64_t s = 1; s < now; ++s)
        stream_planes<false, 0>(part, w += kVectorBytes, ahead, a += kPlanes * 4, pitch);
      w += kVectorBytes, a += kPlanes * 4, steps -= now;
      if constexpr (C > 1) {
        LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int i = 0; i < kRegs; ++i)
            accumulate_shorts(part[0][r][i], part[1][r][i]);
      }
      flush(part[0], sum);
    }
  }

  template <bool Start, int P, int C, int MR>
  static LOWBIT_INLINE void stream_planes(Reg (&part)[C][MR][kRegs], const uint8_t* w,
                                          ptrdiff_t ahead, const int8_t* a, ptrdiff_t pitch) {
    if constexpr (P == 0) __builtin_prefetch(w + ahead);
    Reg u[kRegs];
    LOWBIT_UNROLL for (int i = 0; i < kRegs; ++i) u[i] =
        unpack<B, P, 0, (MR > 3)>(load(w + i * kRegBytes));
    constexpr bool kFirst = Start && P < C;
    multiply<kFirst>(part[P % C], u, a + 4 * P, pitch);
    // Loading the vector again costs no register.
    if constexpr (MR > 3) asm volatile("" ::: "memory");
    if constexpr (P + 1 < kPlanes) stream_planes<Start, P + 1>(part, w, ahead, a, pitch);
  }
};

// Codes of 8 bits: pairs of products do not fit 16 bits. They do as |a| times the centred code with
// the sign of a, and instead of negating, flipping the bits will do: c ^ 0x80 is c - 128, and
// c ^ 0x7f is -(c - 128) - 1. So
//
//   |a| * (c ^ flip(a)) = a * c - 128 a - (a < 0 ? |a| : 0)
//
// and what is too little depends on the row alone: it is what codes of 0 yield, whose true sum is
// 0.
template <int S>
struct Dot<8, S> {
  static_assert(S == 0, "no format of 8 bits has even levels");
  static_assert(2 * 128 * 128 <= 32768 && 2 * 128 * 127 <= 32767, "a pair would saturate");
  static constexpr int kMost = 4;  // rows of a tile: each has two operands
  static constexpr int64_t kBlockBytes = 512 * 1024;

  static void run(const Tile& t) {
    // Panels that stay in the second cache while the rows pass by.
    const int most = static_cast<int>(kBlockBytes / (t.steps * kVectorBytes + 1)) + 1;
    for (int first = 0; first < t.panels; first += most) {
      const int end = first + most < t.panels ? first + most : t.panels;
      bool fetch = true;
      over_rows(t, kMost, [&](Tile part, int rows) {
        const Operands x(part, rows);
        part.offset = x.offset;
        part.offset_pitch = t.groups;
        for (int p = first; p < end; ++p)
          with_rows<1, kMost>(rows, [&](auto mr) { tile<decltype(mr)::value>(part, x, p, fetch); });
        fetch = false;
      });
    }
  }

  // Both operands of kMost rows, and offsets of groups of 32 at least.
  static constexpr int64_t room(int64_t k) {
    return kMost * (2 * padded(k) + padded((k + 31) / 32 * 4));
  }

 private:
  // A spare line lets rows that are a power of two long not share a set of the cache.
  static constexpr int64_t padded(int64_t bytes) { return bytes / 64 * 64 + 128; }

  // Rows in Tile::room: magnitudes, `pitch` bytes further their flips, then the next row's.
  struct Operands {
    Operands(const Tile& t, int rows)
        : pitch(padded(t.steps * 4)),
          first(t.room),
          offset(reinterpret_cast<int32_t*>(t.room + kMost * 2 * pitch)) {
      for (int r = 0; r < rows; ++r)
        for (int64_t g = 0; g < t.groups; ++g) {
          const int64_t from = g * t.group_steps, rest = t.steps - from;
          const int64_t steps = rest < t.group_steps ? rest : t.group_steps;
          offset[r * t.groups + g] = t.offset[r * t.offset_pitch + g] -
                                     prepare(t.codes + r * t.pitch + from * 4, steps * 4,
                                             first + r * 2 * pitch + from * 4);
        }
    }

    const ptrdiff_t pitch;
    uint8_t* const first;
    int32_t* const offset;  // [rows][groups]

   private:
    // Returns what codes of 0 yield.
    int32_t prepare(const int8_t* a, int64_t k, uint8_t* out) const {
      Reg sum = zero();
      const auto add_codes = [&](const void* codes, int64_t at) __attribute__((always_inline)) {
        const Reg x = load(static_cast<const uint8_t*>(codes));
        const Reg m = magnitude(x), f = sign_flip(x);
        store(reinterpret_cast<int32_t*>(out + at), m);
        store(reinterpret_cast<int32_t*>(out + pitch + at), f);
        sum = add(sum, sum_pairs(multiply_bytes(m, f), 1));
      };
      int64_t i = 0;
      for (; i + kRegBytes <= k; i += kRegBytes) add_codes(a + i, i);
      if (i < k) {
        int8_t last[kRegBytes] = {};
        __builtin_memcpy(last, a + i, static_cast<size_t>(k - i));
        add_codes(last, i);
      }
      int32_t lanes[kLanes], total = 0;
      store(lanes, sum);
      for (int32_t lane : lanes) total += lane;
      return total;
    }
  };

  template <int MR>
  static void tile(const Tile& t, const Operands& x, int panel, bool fetch) {
    sum_groups<MR, kRegs>(t, panel, [&](int64_t first, int64_t steps, Reg(&sum)[MR][kRegs]) {
      const uint8_t* w = t.w + panel * t.panel_stride;
      add_steps(w + first * kVectorBytes, fetch ? ahead_of(t, panel) - w : 0,
                reinterpret_cast<const int8_t*>(x.first) + first * 4, x.pitch, steps, sum);
    });
  }

  // A function of its own, as above.
  template <int MR>
  static LOWBIT_NOINLINE void add_steps(const uint8_t* w, ptrdiff_t ahead, const int8_t* a,
                                        ptrdiff_t pitch, int64_t steps, Reg (&sum)[MR][kRegs]) {
    Reg acc[MR][kRegs];
    LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int i = 0; i < kRegs; ++i)
        acc[r][i] = sum[r][i];
    for (int64_t s = 0; s < steps; ++s, w += kVectorBytes, a += 4) {
      __builtin_prefetch(w + ahead);
      Reg u[kRegs];
      LOWBIT_UNROLL for (int i = 0; i < kRegs; ++i) u[i] = load(w + i * kRegBytes);
      LOWBIT_UNROLL for (int r = 0; r < MR; ++r) {
        const Reg m = broadcast(a + r * 2 * pitch), f = broadcast(a + (r * 2 + 1) * pitch);
        LOWBIT_UNROLL for (int i = 0; i < kRegs; ++i)
            accumulate(acc[r][i], sum_pairs(multiply_bytes(m, bit_xor(u[i], f)), 1));
      }
    }
    LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int i = 0; i < kRegs; ++i)
        sum[r][i] = acc[r][i];
  }
};

constexpr int64_t room(int64_t k) {
  const int64_t decoded = k * kPanel, operands = Dot<8, 0>::room(k);
  return decoded > operands ? decoded : operands;
}

// The kernels' instructions: 8 bits, then products up to the depth that 16 bits allow.
template <int B>
double probe_dot(int64_t iterations) {
  Reg acc[kChains], u = bytes(1), a = bytes(1);
  opaque(u), opaque(a);
  LOWBIT_UNROLL for (int i = 0; i < kChains; ++i) acc[i] = zero();
  double products = 0;
  for (int64_t n = 0; n < iterations; ++n) {
    if constexpr (B == 8) {
      LOWBIT_UNROLL for (int i = 0; i < kChains; ++i) {
        opaque(u);
        accumulate(acc[i], sum_pairs(multiply_bytes(a, bit_xor(u, a)), 1));
      }
      products += kChains;
    } else {
      constexpr int kDepth = Dot<B, 0>::kDepth;
      Reg part[kChains];
      LOWBIT_UNROLL for (int i = 0; i < kChains; ++i) opaque(u), part[i] = multiply_bytes(u, a);
      for (int d = 1; d < kDepth; ++d) LOWBIT_UNROLL for (int i = 0; i < kChains; ++i) {
          opaque(u);
          accumulate_shorts(part[i], multiply_bytes(u, a));
        }
      LOWBIT_UNROLL for (int i = 0; i < kChains; ++i) accumulate(acc[i], sum_pairs(part[i], 1));
      products += kChains * kDepth;
    }
  }
  LOWBIT_UNROLL for (int i = 0; i < kChains; ++i) opaque(acc[i]);
  return products * kRegBytes;
}
