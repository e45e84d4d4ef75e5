// Dot products that accumulate in int32 at once, rows x panels in registers. Part of
// microkernel.inl. The vocabulary that they ask for:
//
//   kChainSums              registers that a tile of few rows may spend on chains of sums
//   kMaskInPlace            dot takes any byte as code, so a bit field need not be shifted down
//   kTightSums              so many leave no register for constants, nor for weights from one bit
//                           field to the next; 0: registers are plenty

// The vectors of step s of NP panels; ahead of them, those of `fetch` panels from `ahead` on.
template <int NP>
LOWBIT_INLINE void load_panels(const uint8_t* w, ptrdiff_t stride, const uint8_t* ahead, int fetch,
                               int64_t s, Reg (&x)[NP * kRegs]) {
  LOWBIT_UNROLL for (int p = 0; p < NP; ++p) if (p < fetch)
      __builtin_prefetch(ahead + p * stride + s * kVectorBytes);
  LOWBIT_UNROLL for (int p = 0; p < NP; ++p) LOWBIT_UNROLL for (int i = 0; i < kRegs; ++i)
      x[p * kRegs + i] = load(w + p * stride + s * kVectorBytes + i * kRegBytes);
}

// The fewest rows of one of several tiles: more rows than kTallMr, shared evenly among tiles of
// kMr.
constexpr int kFewest = (kTallMr + 1) / ((kTallMr + kMr) / kMr);

// So few rows wait for memory: they take one panel after the other, in the order of the memory.
constexpr int kStreamRows = 2;

template <class Op>
void run_tile(const Tile& t) {
  if (!t.tall && t.panels == kPanels)
    return with_rows<kFewest, kMr>(
        t.rows, [&](auto mr) { Op::template panels<decltype(mr)::value, kPanels>(t, 0); });
  with_rows<1, kTallMr>(t.rows, [&](auto mr) {
    constexpr int kRows = decltype(mr)::value;
    int p = 0;
    if constexpr (kRows > kStreamRows)
      for (; p + kTallPanels <= t.panels; p += kTallPanels)
        Op::template panels<kRows, kTallPanels>(t, p);
    if constexpr (kRows <= kStreamRows || kTallPanels > 1)
      for (; p < t.panels; ++p) Op::template panels<kRows, 1>(t, p);
  });
}

// The sums of V registers of channels for MR rows, each in C chains: with few rows the latency of
// `dot` asks for more of them than there are registers of output. Step u of every U adds its bit
// field p to chain (u * P + p) % C. Where the ISA allows it, as many fields as there are chains
// stay in place, and a chain's sum is shifted down at the end.
template <int B, int S, int MR, int V, int C>
struct Chains {
  static constexpr int P = 8 / B, U = C > P ? C / P : 1;
  static constexpr bool kInPlace = kMaskInPlace && B < 8 && C > 1;
  static constexpr int kPlaces = C < P ? C : P;
  static constexpr int kCodeBits = kInPlace ? 8 : B;
  static constexpr bool kTight = kTightSums && C * MR * V >= kTightSums;

  Reg sums[C][MR][V];

  // The first chain starts at `offset`, but where its sum is shifted at the end.
  explicit LOWBIT_INLINE Chains(const Reg (&offset)[MR][V]) {
    LOWBIT_UNROLL for (int c = 0; c < C; ++c) clear(sums[c]);
    if constexpr (!kInPlace)
      LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int v = 0; v < V; ++v)
          sums[0][r][v] = offset[r][v];
  }

  LOWBIT_INLINE void total(Reg (&out)[MR][V]) const {
    LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int v = 0; v < V; ++v) out[r][v] =
        kInPlace ? add(out[r][v], chain<0>(r, v)) : chain<0>(r, v);
  }

  template <int Step, int Field = 0, class Load>
  LOWBIT_INLINE void add_step(const Reg (&x)[V], Load load_again, const int8_t* a,
                              ptrdiff_t pitch) {
    constexpr int c = (Step * P + Field) % C;
    constexpr int kBit = kInPlace ? Field % kPlaces * B : S;
    Reg u[V];
    LOWBIT_UNROLL for (int v = 0; v < V; ++v) u[v] = unpack<B, Field, kBit, kTight>(x[v]);
    LOWBIT_UNROLL for (int r = 0; r < MR; ++r) {
      const Reg av = broadcast(a + r * pitch + 4 * Field);
      LOWBIT_UNROLL for (int v = 0; v < V; ++v) sums[c][r][v] =
          dot<kCodeBits>(sums[c][r][v], u[v], av);
    }
    if constexpr (Field + 1 < P && kTight) {
      Reg y[V];
      asm volatile("" ::: "memory");
      load_again(y);
      add_step<Step, Field + 1>(y, load_again, a, pitch);
    } else if constexpr (Field + 1 < P) {
      add_step<Step, Field + 1>(x, load_again, a, pitch);
    }
  }

  // The sum of chains `First` and behind.
  template <int First>
  LOWBIT_INLINE Reg chain(int r, int v) const {
    Reg sum = sums[First][r][v];
    if constexpr (kInPlace) sum = shift_left<S>(shift_right<B*(First % kPlaces)>(sum));
    if constexpr (First + 1 < C) sum = add(sum, chain<First + 1>(r, v));
    return sum;
  }
};

constexpr int power_of_two(int most) { return most >= 8 ? 8 : most >= 4 ? 4 : most >= 2 ? 2 : 1; }

// Chains of a group that is combined in registers: more cost more to add up than they save.
constexpr int kGroupChains = 4;

template <int B, int S>
struct Dot {
  static void run(const Tile& t) { run_tile<Dot>(t); }

  // Adds the products of so many steps to sums.
  template <int MR, int NP, int C>
  struct Loop {
    static constexpr int V = NP * kRegs;
    using Sums = Chains<B, S, MR, V, C>;
    const Tile& t;
    const int panel;

    LOWBIT_INLINE void operator()(int64_t first, int64_t steps, Reg (&out)[MR][V]) const {
      const int8_t* a = t.codes;
      const uint8_t *w = t.w + panel * t.panel_stride, *ahead = t.ahead + panel * t.panel_stride;
      const ptrdiff_t pitch = t.pitch, stride = t.panel_stride;
      const ptrdiff_t* segment = t.segments;
      const int fetch = t.fetch;
      Sums sums(out);
      const auto step = [&](int64_t s, auto index) __attribute__((always_inline)) {
        Reg x[V];
        load_panels<NP>(w, stride, ahead, fetch, s, x);
        sums.template add_step<decltype(index)::value>(
            x, [&](Reg(&y)[V]) { load_panels<NP>(w, stride, ahead, 0, s, y); }, a + s * (32 / B),
            pitch);
      };
      int64_t s = first, end = first + steps;
      // Rows in pieces have no groups: `first` is 0.
      if (segment) a += *segment, end = t.segment_steps;
      for (;;) {
        for (; s + Sums::U <= end; s += Sums::U) {
          step(s, IntConstant<0>{});
          if constexpr (Sums::U > 1) step(s + 1, IntConstant<1>{});
          if constexpr (Sums::U > 2) step(s + 2, IntConstant<2>{}), step(s + 3, IntConstant<3>{});
          if constexpr (Sums::U > 4) {
            step(s + 4, IntConstant<4>{}), step(s + 5, IntConstant<5>{});
            step(s + 6, IntConstant<6>{}), step(s + 7, IntConstant<7>{});
          }
        }
        if constexpr (Sums::U > 1)
          for (; s < end; ++s) step(s, IntConstant<0>{});
        if (!segment || s >= steps) break;
        a = t.codes + *++segment - s * (32 / B);
        end += t.segment_steps;
      }
      sums.total(out);
    }
  };

  template <int MR, int NP>
  static void panels(const Tile& t, int panel) {
    constexpr int V = NP * kRegs, C = power_of_two(kChainSums / (MR * V));
    constexpr int kFew = C < kGroupChains ? C : kGroupChains;
    sum_groups<MR, V>(t, panel, Loop<MR, NP, C>{t, panel}, Loop<MR, NP, kFew>{t, panel});
  }
};

#define LOWBIT_CENTRED_DOT

// Signed 8-bit weights and activations as the unsigned factor: what the 128 add is a constant of
// the channel, and no row's sum is needed. The rest is as Dot.
struct CentredDot {
  template <int MR, int NP>
  static void panels(const Tile& t, int panel) {
    constexpr int V = NP * kRegs, C = power_of_two(kChainSums / (MR * V));
    const int8_t* a = t.codes;
    const uint8_t *w = t.w + panel * t.panel_stride, *ahead = t.ahead + panel * t.panel_stride;
    const ptrdiff_t pitch = t.pitch, stride = t.panel_stride;
    const int64_t steps = t.steps;
    const int fetch = t.fetch;
    const Reg flip = bytes(0x80);
    const auto seed = reinterpret_cast<const uint8_t*>(t.seed + panel * kPanel);
    Reg sum[C][MR][V];
    LOWBIT_UNROLL for (int v = 0; v < V; ++v) LOWBIT_UNROLL for (int r = 0; r < MR; ++r)
        sum[0][r][v] = load(seed + v * kRegBytes);
    LOWBIT_UNROLL for (int c = 1; c < C; ++c) clear(sum[c]);
    const auto step = [&](int64_t s, auto chain) __attribute__((always_inline)) {
      Reg x[V];
      load_panels<NP>(w, stride, ahead, fetch, s, x);
      LOWBIT_UNROLL for (int r = 0; r < MR; ++r) {
        const Reg av = bit_xor(broadcast(a + r * pitch + s * 4), flip);
        LOWBIT_UNROLL for (int v = 0; v < V; ++v) {
          Reg& acc = sum[decltype(chain)::value][r][v];
          acc = dot<8>(acc, av, x[v]);
        }
      }
    };
    int64_t s = 0;
    for (; s + C <= steps; s += C) {
      step(s, IntConstant<0>{});
      if constexpr (C > 1) step(s + 1, IntConstant<1>{});
      if constexpr (C > 2) step(s + 2, IntConstant<2>{}), step(s + 3, IntConstant<3>{});
      if constexpr (C > 4) {
        step(s + 4, IntConstant<4>{}), step(s + 5, IntConstant<5>{});
        step(s + 6, IntConstant<6>{}), step(s + 7, IntConstant<7>{});
      }
    }
    if constexpr (C > 1)
      for (; s < steps; ++s) step(s, IntConstant<0>{});
    LOWBIT_UNROLL for (int c = 1; c < C; ++c) LOWBIT_UNROLL for (int r = 0; r < MR; ++r)
        LOWBIT_UNROLL for (int v = 0; v < V; ++v) sum[0][r][v] = add(sum[0][r][v], sum[c][r][v]);
    finish_codes<MR, V>(t, panel, [&](int r, int v) { return to_float(sum[0][r][v]); });
  }
};

void dot_centred(const Tile& t) { run_tile<CentredDot>(t); }

template <int B>
double probe_dot(int64_t iterations) {
  Reg acc[kChains], u = bytes(1), a = bytes(1);
  opaque(u), opaque(a);
  LOWBIT_UNROLL for (int i = 0; i < kChains; ++i) acc[i] = zero();
  for (int64_t n = 0; n < iterations; ++n) LOWBIT_UNROLL for (int i = 0; i < kChains; ++i) {
      acc[i] = dot<B>(acc[i], u, a);
      opaque(acc[i]);
    }
  return static_cast<double>(iterations) * kChains * kRegBytes;
}

#define LOWBIT_SEGMENTS
constexpr int64_t room(int64_t) { return 0; }
