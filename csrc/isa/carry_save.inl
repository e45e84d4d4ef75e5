// xnor where bits are counted by table: carry-save adders (Harley and Seal) first make one word of
// four. Part of microkernel.inl. The vocabulary that it asks for:
//
//   popcount_bytes(v)           bits set in every byte
//   add_bytes(a, b)
//   carry_save(a, b, c, carry)  a + b + c, bit by bit: returns the sums; `carry` counts twice
//
// A word takes 6.5 operations in place of 8 (with three-way logic 3.5). A tile is small, since
// operands are few beside operations.

constexpr int kSavedSteps = 4;
// Rows that hide each other's latency.
constexpr int kSavedRows = kRegs == 1 ? 4 : 2;
// Counts are signed bytes, of at most 8 a word.
constexpr int kMaxWords = 15;
static_assert(kMaxWords * 8 <= 127 && 8 + 2 * 8 <= 127, "a byte would overflow");
// Fewer steps are not worth the words that carry-save adders leave behind.
constexpr int64_t kLeastSavedSteps = 16;

template <bool Masked>
struct CarrySave {
  static void run(const Tile& t) {
    for (int p = 0; p < t.panels; ++p)
      for (int r = 0; r < t.rows; r += kSavedRows) {
        const int count = t.rows - r < kSavedRows ? t.rows - r : kSavedRows;
        with_rows<1, kSavedRows>(
            count, [&](auto mr) { rows<decltype(mr)::value>(rows_of(t, r, count), p, r == 0); });
      }
  }

 private:
  template <int MR>
  static void rows(const Tile& t, int panel, bool fetch) {
    sum_groups<MR, kRegs>(t, panel, [&](int64_t first, int64_t steps, Reg(&sum)[MR][kRegs]) {
      const Words words{t.w + panel * t.panel_stride, t.bits, t.mask, t.pitch};
      const uint8_t* ahead = ahead_of(t, panel);
      int64_t s = first;
      const int64_t end = first + steps;
      if (steps >= kLeastSavedSteps) {
        Reg ones[MR][kRegs], twos[MR][kRegs];
        clear(ones), clear(twos);
        while (s + kSavedSteps <= end) {
          Reg fours[MR][kRegs];
          clear(fours);
          const int64_t some = s + kMaxWords * kSavedSteps, stop = some < end ? some : end;
          for (; s + kSavedSteps <= stop; s += kSavedSteps) {
            if (fetch)
              LOWBIT_UNROLL for (int i = 0; i < kSavedSteps; ++i)
                  __builtin_prefetch(ahead + (s + i) * kVectorBytes);
            LOWBIT_UNROLL for (int r = 0; r < MR; ++r)
                LOWBIT_UNROLL for (int i = 0; i < kRegs; ++i) {
              Reg a, b, c;
              ones[r][i] = carry_save(words.at(s, r, i), words.at(s + 1, r, i), ones[r][i], a);
              ones[r][i] = carry_save(words.at(s + 2, r, i), words.at(s + 3, r, i), ones[r][i], b);
              twos[r][i] = carry_save(a, b, twos[r][i], c);
              fours[r][i] = add_bytes(fours[r][i], popcount_bytes(c));
            }
          }
          add_counts<4>(sum, fours);
        }
        Reg rest[MR][kRegs];
        LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int i = 0; i < kRegs; ++i) {
          const Reg two = popcount_bytes(twos[r][i]);
          rest[r][i] = add_bytes(popcount_bytes(ones[r][i]), add_bytes(two, two));
        }
        add_counts<1>(sum, rest);
      }
      while (s < end) {
        Reg counts[MR][kRegs];
        clear(counts);
        const int64_t some = s + kMaxWords, stop = some < end ? some : end;
        for (; s < stop; ++s)
          LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int i = 0; i < kRegs; ++i)
              counts[r][i] = add_bytes(counts[r][i], popcount_bytes(words.at(s, r, i)));
        add_counts<1>(sum, counts);
      }
    });
  }

  // An agreement counts twice in the sum.
  template <int Each, int MR>
  static LOWBIT_INLINE void add_counts(Reg (&sum)[MR][kRegs], const Reg (&counts)[MR][kRegs]) {
    LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int i = 0; i < kRegs; ++i)
        sum[r][i] = dot<4>(sum[r][i], bytes(2 * Each), counts[r][i]);
  }

  // Where the bits of a row and of a panel differ.
  struct Words {
    const uint8_t* w;
    const uint32_t *bits, *mask;
    ptrdiff_t pitch;

    LOWBIT_INLINE Reg at(int64_t s, int r, int i) const {
      Reg d = bit_xor(load(w + s * kVectorBytes + i * kRegBytes), lanes(bits + r * pitch + s));
      if constexpr (Masked) d = bit_and(d, lanes(mask + r * pitch + s));
      return d;
    }
    static LOWBIT_INLINE Reg lanes(const uint32_t* p) {
      return broadcast(reinterpret_cast<const int8_t*>(p));
    }
  };
};

void xnor_any(const Tile& t) { return t.mask ? CarrySave<true>::run(t) : CarrySave<false>::run(t); }

double probe_xnor(int64_t iterations) {
  constexpr int kStates = 2;
  Reg ones[kStates], twos[kStates], fours[kStates], w = bytes(1), x = bytes(1);
  opaque(x);
  LOWBIT_UNROLL for (int i = 0; i < kStates; ++i) ones[i] = twos[i] = fours[i] = zero();
  const auto word = [&]() __attribute__((always_inline)) {
    opaque(w);
    return bit_xor(w, x);
  };
  for (int64_t n = 0; n < iterations; ++n) LOWBIT_UNROLL for (int i = 0; i < kStates; ++i) {
      Reg a, b, c;
      const Reg w0 = word(), w1 = word(), w2 = word(), w3 = word();
      ones[i] = carry_save(w0, w1, ones[i], a);
      ones[i] = carry_save(w2, w3, ones[i], b);
      twos[i] = carry_save(a, b, twos[i], c);
      fours[i] = add_bytes(fours[i], popcount_bytes(c));
      opaque(ones[i]), opaque(twos[i]), opaque(fours[i]);
    }
  return static_cast<double>(iterations) * kStates * kSavedSteps * kRegBytes * 8;
}
