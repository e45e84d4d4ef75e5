// xnor where an instruction counts the bits of bytes: counts are added as bytes, and pass to int32
// before they overflow. Part of microkernel.inl, for NEON.
//
// Tiles of 4 rows x 16 channels: 16 counts, 4 weights, and for each row its bits (and mask) in
// every lane: 13 operations for 4 registers of 128 bits, of which 12 cannot be less.

constexpr int kXnorRows = 4;
// Counts are unsigned bytes, of at most 8 a word.
constexpr int kMaxWords = 31;
static_assert(kMaxWords * 8 <= 255, "a byte would overflow");

template <bool Masked>
struct Xnor {
  static void run(const Tile& t) {
    for (int p = 0; p < t.panels; ++p)
      over_rows(t, kXnorRows, [&](const Tile& part, int rows) {
        with_rows<1, kXnorRows>(rows, [&](auto mr) { tile<decltype(mr)::value>(part, p); });
      });
  }

 private:
  template <int MR>
  static void tile(const Tile& t, int panel) {
    sum_groups<MR, kRegs>(t, panel, [&](int64_t first, int64_t steps, Reg(&sum)[MR][kRegs]) {
      const uint8_t* w = t.w + panel * t.panel_stride;
      add_steps(w + first * kVectorBytes, ahead_of(t, panel) - w, t.bits + first,
                Masked ? t.mask + first : nullptr, t.pitch, steps, sum);
    });
  }

  // A function of its own, whose sums are memory: the registers are the loop's alone.
  template <int MR>
  static LOWBIT_NOINLINE void add_steps(const uint8_t* w, ptrdiff_t ahead, const uint32_t* bits,
                                        const uint32_t* mask, ptrdiff_t pitch, int64_t steps,
                                        Reg (&sum)[MR][kRegs]) {
    while (steps > 0) {
      const int64_t now = steps < kMaxWords ? steps : kMaxWords;
      Reg count[MR][kRegs];
      clear(count);
      for (int64_t s = 0; s < now; ++s, w += kVectorBytes, ++bits) {
        __builtin_prefetch(w + ahead);
        Reg x[kRegs];
        LOWBIT_UNROLL for (int v = 0; v < kRegs; ++v) x[v] = load(w + v * kRegBytes);
        LOWBIT_UNROLL for (int r = 0; r < MR; ++r) {
          const Reg a = lanes(bits + r * pitch);
          LOWBIT_UNROLL for (int v = 0; v < kRegs; ++v) {
            Reg d = bit_xor(x[v], a);
            if constexpr (Masked) d = bit_and(d, lanes(mask + r * pitch));
            accumulate_bytes(count[r][v], lanes_of(vcntq_u8(unsigned_bytes(d))));
          }
        }
        if constexpr (Masked) ++mask;
      }
      steps -= now;
      // An agreement counts twice in the sum.
      LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int v = 0; v < kRegs; ++v) {
        const uint16x8_t pairs = vshlq_n_u16(vpaddlq_u8(unsigned_bytes(count[r][v])), 1);
        sum[r][v] = vreinterpretq_s32_u32(vpadalq_u16(vreinterpretq_u32_s32(sum[r][v]), pairs));
      }
    }
  }

  static LOWBIT_INLINE Reg lanes(const uint32_t* p) {
    return broadcast(reinterpret_cast<const int8_t*>(p));
  }
};

void xnor_any(const Tile& t) { return t.mask ? Xnor<true>::run(t) : Xnor<false>::run(t); }

double probe_xnor(int64_t iterations) {
  Reg acc[kChains], u = bytes(1), a = zero();
  opaque(u), opaque(a);
  LOWBIT_UNROLL for (int i = 0; i < kChains; ++i) acc[i] = zero();
  for (int64_t n = 0; n < iterations; ++n) LOWBIT_UNROLL for (int i = 0; i < kChains; ++i) {
      opaque(u);
      accumulate_bytes(acc[i], lanes_of(vcntq_u8(unsigned_bytes(bit_xor(u, a)))));
      opaque(acc[i]);
    }
  return static_cast<double>(iterations) * kChains * kRegBytes * 8;
}
