// Dot products that accumulate in int32 at once, rows x panels in registers. Part of
// microkernel.inl. The vocabulary that they ask for:
//
//   kChainSums              registers that a tile of few rows may spend on chains of sums
//   kMaskInPlace            dot takes any byte as code, so a bit field need not be shifted down
//   kTightSums              so many leave no register for constants, nor for weights from one bit
//                           field to the next; 0: registers are plenty

// The vectors of NP panels, step by step, and what is prefetched meanwhile, a line for each: of
// other panels at the same step or, with Tile::in_order, of the memory behind these.
template <int NP>
struct Panels {
  const uint8_t *w, *ahead;
  ptrdiff_t stride, ahead_stride, ahead_step;
  int fetch;

  LOWBIT_INLINE Panels(const Tile& t, int panel) : Panels(t, panel, t.fetch) {}

  LOWBIT_INLINE Panels(const Tile& t, int panel, int lines)
      : w(t.w + panel * t.panel_stride),
        ahead(t.ahead + panel * t.panel_stride),
        stride(t.panel_stride),
        ahead_stride(t.panel_stride),
        ahead_step(kVectorBytes),
        fetch(lines) {
    if constexpr (NP > 1 && NP == kTallPanels) {
      constexpr ptrdiff_t kLeast = 8192;  // nearer lines would come late
      if (!t.in_order) return;
      ahead = w + (NP * stride > kLeast ? NP * stride : kLeast);
      ahead_stride = kVectorBytes;
      ahead_step = NP * kVectorBytes;
    }
  }

  LOWBIT_INLINE void load_step(int64_t s, Reg (&x)[NP * kRegs]) const {
    LOWBIT_UNROLL for (int p = 0; p < NP; ++p) if (p < fetch)
        __builtin_prefetch(ahead + p * ahead_stride + s * ahead_step);
    load_again(s, x);
  }

  LOWBIT_INLINE void load_again(int64_t s, Reg (&x)[NP * kRegs]) const {
    LOWBIT_UNROLL for (int p = 0; p < NP; ++p) LOWBIT_UNROLL for (int i = 0; i < kRegs; ++i)
        x[p * kRegs + i] = load(w + p * stride + s * kVectorBytes + i * kRegBytes);
  }
};

// The fewest rows of one of several tiles: more rows than kTallMr, shared evenly among tiles of
// kMr.
constexpr int kFewest = (kTallMr + 1) / ((kTallMr + kMr) / kMr);

// So few rows wait for memory: they take one panel after the other, in its order. Unless a row has
// so many bit fields to be loaded for a vector of weights that panels had better share it, where
// the tile is read in order all the same.
constexpr int kStreamRows = 2, kSharedFields = 4;

template <class Op>
void run_tile(const Tile& t) {
  if (!t.tall && t.panels == kPanels)
    return with_rows<kFewest, kMr>(
        t.rows, [&](auto mr) { Op::template panels<decltype(mr)::value, kPanels>(t, 0); });
  with_rows<1, kTallMr>(t.rows, [&](auto mr) {
    constexpr int kRows = decltype(mr)::value;
    constexpr bool kStream = kRows <= kStreamRows;
    int p = 0;
    if constexpr (!kStream || kRows * Op::kFields >= kSharedFields)
      if (!kStream || t.in_order)
        for (; p + kTallPanels <= t.panels; p += kTallPanels)
          Op::template panels<kRows, kTallPanels>(t, p);
    if constexpr (kStream || kTallPanels > 1)
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
    if constexpr (kInPlace) {
      constexpr int kDown = B * (First % kPlaces) - S;  // what is shifted out is 0
      if constexpr (kDown > 0) sum = shift_right<kDown>(sum);
      if constexpr (kDown < 0) sum = shift_left<-kDown>(sum);
    }
    if constexpr (First + 1 < C) sum = add(sum, chain<First + 1>(r, v));
    return sum;
  }
};

constexpr int power_of_two(int most) { return most >= 8 ? 8 : most >= 4 ? 4 : most >= 2 ? 2 : 1; }

// Chains of a group that is combined in registers: more cost more to add up than they save.
constexpr int kGroupChains = 4;

#define LOWBIT_SEGMENTS
constexpr bool kSegments = kRegs * kPanels > 1;  // scalar code for it would be 200 KB
// What im2col.cpp relies on: tiles of a line that is at most a ninth longer in whole ones.
static_assert(!kSegments || kMr <= 9, "rows in pieces come in tiles of kMr or one less");

template <int B, int S>
struct Dot {
  static constexpr int kFields = 8 / B;  // loaded of a row for each vector of weights

  static void run(const Tile& t) { run_tile<Dot>(t); }

  // Adds the products of so many steps to sums. Pieces: of rows in pieces (Tile::segments); in a
  // loop for both GCC 12 keeps addresses on the stack (W2 lost 5 %).
  template <int MR, int NP, int C, bool Pieces = false>
  struct Loop {
    static constexpr int V = NP * kRegs;
    using Sums = Chains<B, S, MR, V, C>;
    const Tile& t;
    const int panel;

    LOWBIT_INLINE void operator()(int64_t first, int64_t steps, Reg (&out)[MR][V]) const {
      const Panels<NP> panels(t, panel);
      const ptrdiff_t pitch = t.pitch;
      Sums sums(out);
      const auto run = [&](const int8_t* codes, int64_t s, int64_t end)
          __attribute__((always_inline)) {
        const auto step = [&](int64_t at, auto index) __attribute__((always_inline)) {
          Reg x[V];
          panels.load_step(at, x);
          sums.template add_step<decltype(index)::value>(
              x, [&](Reg(&y)[V]) { panels.load_again(at, y); }, codes + at * (32 / B), pitch);
        };
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
      };
      if constexpr (Pieces) {
        // Rows in pieces have no groups: `first` is 0.
        const ptrdiff_t* segment = t.segments;
        for (int64_t s = 0; s < steps; s += t.segment_steps)
          run(t.codes + *segment++ - s * (32 / B), s, s + t.segment_steps);
      } else {
        run(t.codes, first, first + steps);
      }
      sums.total(out);
    }
  };

  // The same of a whole group of Steps steps, without a loop.
  template <int MR, int NP, int Steps>
  struct WholeGroup {
    static constexpr int V = NP * kRegs, kWanted = MR > kStreamRows || B > 2 ? 2 : 4;
    static constexpr int kRoom = (kGroupSums > 4 ? kGroupSums : 4) / (MR * V);
    using Sums = Chains<B, S, MR, V, power_of_two(kRoom < kWanted ? kRoom : kWanted)>;
    const Tile& t;
    const Panels<NP> panels;
    const ptrdiff_t pitch;

    LOWBIT_INLINE WholeGroup(const Tile& tile, int panel)
        : t(tile),
          panels(tile, panel, MR <= kStreamRows ? NP : tile.fetch),  // so few rows always fetch
          pitch(tile.pitch) {}

    LOWBIT_INLINE void operator()(int64_t first, Reg (&out)[MR][V]) const {
      Sums sums(out);
      step<0>(sums, t.codes + first * (32 / B), first);
      sums.total(out);
    }

    template <int I>
    LOWBIT_INLINE void step(Sums& sums, const int8_t* a, int64_t first) const {
      Reg x[V];
      panels.load_step(first + I, x);
      sums.template add_step<I % Sums::U>(
          x, [&](Reg(&y)[V]) { panels.load_again(first + I, y); }, a + I * (32 / B), pitch);
      if constexpr (I + 1 < Steps) step<I + 1>(sums, a, first);
    }
  };

  // A last group that is shorter than the rest: once for all that combine.
  template <int MR, int NP>
  static LOWBIT_NOINLINE void short_group(const Tile& t, int panel, int64_t first, int64_t steps,
                                          Reg (&sum)[MR][NP * kRegs]) {
    Loop<MR, NP, 1>{t, panel}(first, steps, sum);
  }

  template <int MR, int NP, class Group>
  static LOWBIT_INLINE void combine(const Tile& t, int panel, Group group) {
    combine_groups<MR, NP * kRegs>(t, panel, group,
                                   [&](int64_t first, int64_t steps, Reg(&sum)[MR][NP * kRegs]) {
                                     short_group<MR, NP>(t, panel, first, steps, sum);
                                   });
  }

  // Groups combined in registers; the usual ones, in tiles that are usual for them, without a loop.
  template <int MR, int NP>
  static LOWBIT_INLINE void in_registers(const Tile& t, int panel) {
    constexpr int kDepth = 32 / B, V = NP * kRegs;
    constexpr int kMost = power_of_two(kChainSums / (MR * V));
    constexpr int kFew = kMost < kGroupChains ? kMost : kGroupChains;
    const int64_t k = t.group_steps * kDepth;
    if (k == 32) return combine<MR, NP>(t, panel, WholeGroup<MR, NP, 32 / kDepth>(t, panel));
    if constexpr (MR <= kStreamRows)
      if (k == 128) return combine<MR, NP>(t, panel, WholeGroup<MR, NP, 128 / kDepth>(t, panel));
    const Loop<MR, NP, kFew> loop{t, panel};
    combine<MR, NP>(t, panel,
                    [&](int64_t first, Reg(&sum)[MR][V]) { loop(first, t.group_steps, sum); });
  }

  template <int MR, int NP>
  static void panels(const Tile& t, int panel) {
    constexpr int V = NP * kRegs, C = power_of_two(kChainSums / (MR * V));
    // A panel alone of more rows is rare: the last one of an odd number.
    if constexpr (MR * V <= kGroupSums && (MR <= kStreamRows || NP == kTallPanels)) {
      if (t.group_scale && !t.sums && t.planes == 1) return in_registers<MR, NP>(t, panel);
    }
    if constexpr (kSegments && MR >= kMr - 1 && MR <= kMr && (NP == kPanels || NP == kTallPanels))
      if (t.segments) return sum_pieces<MR, V>(t, panel, Loop<MR, NP, C, true>{t, panel});
    sum_groups<MR, V>(t, panel, Loop<MR, NP, C>{t, panel});
  }
};

#define LOWBIT_CENTRED_DOT

// Signed 8-bit weights and activations as the unsigned factor: what the 128 add is a constant of
// the channel, and no row's sum is needed. The rest is as Dot.
struct CentredDot {
  static constexpr int kFields = 1;

  template <int MR, int NP>
  static void panels(const Tile& t, int panel) {
    constexpr int V = NP * kRegs, C = power_of_two(kChainSums / (MR * V));
    const int8_t* a = t.codes;
    const Panels<NP> panels(t, panel);
    const ptrdiff_t pitch = t.pitch;
    const int64_t steps = t.steps;
    const Reg flip = bytes(0x80);
    if (!t.requantize) fetch_output<MR, V>(t, panel);
    const auto seed = reinterpret_cast<const uint8_t*>(t.seed + panel * kPanel);
    Reg sum[C][MR][V];
    LOWBIT_UNROLL for (int v = 0; v < V; ++v) LOWBIT_UNROLL for (int r = 0; r < MR; ++r)
        sum[0][r][v] = load(seed + v * kRegBytes);
    LOWBIT_UNROLL for (int c = 1; c < C; ++c) clear(sum[c]);
    const auto step = [&](int64_t s, auto chain) __attribute__((always_inline)) {
      Reg x[V];
      panels.load_step(s, x);
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
    const auto value = [&](int r, int v) { return to_float(sum[0][r][v]); };
    if (t.requantize) return finish_codes<MR, V>(t, panel, value);
    finish_tile<MR, V>(t, panel, value);
  }
};

void dot_centred(const Tile& t) { run_tile<CentredDot>(t); }

#define LOWBIT_ROW_DOT

// 8-bit codes and rows with a bias of their own: as Dot, which stores the sums of a tile before it
// ends such rows. Asked for there, it cost all tiles of few steps 3 %.
struct RowDot {
  template <int MR, int NP>
  static void panels(const Tile& t) {
    constexpr int V = NP * kRegs, C = power_of_two(kChainSums / (MR * V));
    fetch_output<MR, V>(t, 0);
    Reg sum[MR][V];
    start_at_offset(t, 0, sum);
    Dot<8, 0>::Loop<MR, NP, C>{t, 0}(0, t.steps, sum);
    finish_tile<MR, V, true>(t, 0, [&](int r, int v) { return to_float(sum[r][v]); });
  }

  static void run(const Tile& t) {
    if (!kSegments || t.tall || t.panels != kPanels) return Dot<8, 0>::run(t);
    if constexpr (kSegments)
      with_rows<kFewest, kMr>(t.rows, [&](auto mr) { panels<decltype(mr)::value, kPanels>(t); });
  }
};

void dot_rows(const Tile& t) { RowDot::run(t); }

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

constexpr int64_t room(int64_t) { return 0; }
