// The integer GEMM microkernels, once, over the vocabulary that an ISA's file defines before it
// includes this one:
//
//   Reg                     a register of int32 lanes; kRegs of them make one 64-byte vector
//   FloatReg                the same of float32
//   kMr, kPanels            the tile where there are several: kMr rows x kPanels panels of 16
//   kTallMr, kTallPanels    a tall one, for few rows: weights are read once
//   kChainSums              registers that a tile of few rows may spend on chains of sums
//   kMaskInPlace            dot takes any byte as code, so a bit field need not be shifted down
//   zero() load(p) store(p, v) bytes(x) opaque(v)
//   broadcast(p)            4 bytes to every lane
//   unpack<B, P, S>(v)      bit field P (B bits wide) of every byte, moved to bit S
//   dot<B>(acc, u, a)       acc[lane] += sum of 4 products u8 * s8 (u < 2^B)
//   popcount_add(acc, v)    acc[lane] += bits set in the lane
//   bit_xor(a, b) bit_and(a, b) add(a, b) sub(a, b): the last two on lanes
//   shift_left<N>(v) shift_right<N>(v): lanes, arithmetic
//   interleave(t0..t3, out) 16 bytes of each of 4 taps to 16 lanes of 4 bytes
//   to_float(v) half_load(p) float_load(p) float_store(p, v) float_broadcast(p) float_splat(x)
//   multiply(a, b) fmadd(a, b, c) opaque_float(v)
//
// Everything is in an unnamed namespace: code compiled for one ISA must not be linked into
// another's. GCC keeps big accumulator arrays on the stack unless every loop over them is unrolled:
// hence the pragmas.

#define LOWBIT_UNROLL _Pragma("GCC unroll 16")
#define LOWBIT_INLINE inline __attribute__((always_inline))

constexpr int kNr = kPanels * kPanel;  // channels of a tile
constexpr int kRegBytes = kVectorBytes / kRegs;
constexpr int kLanes = kRegBytes / 4;

#include "epilogue.inl"

// --- what both kernels share ---------------------------------------------------------------------

// The vectors of step s of NP panels; ahead of them, those of `fetch` panels from `ahead` on.
template <int NP>
LOWBIT_INLINE void load_panels(const uint8_t* w, ptrdiff_t stride, const uint8_t* ahead, int fetch,
                               int64_t s, Reg (&x)[NP * kRegs]) {
  LOWBIT_UNROLL for (int p = 0; p < NP; ++p) if (p < fetch)
      __builtin_prefetch(ahead + p * stride + s * kVectorBytes);
  LOWBIT_UNROLL for (int p = 0; p < NP; ++p) LOWBIT_UNROLL for (int i = 0; i < kRegs; ++i)
      x[p * kRegs + i] = load(w + p * stride + s * kVectorBytes + i * kRegBytes);
}

template <int MR, int V>
LOWBIT_INLINE void clear(Reg (&sums)[MR][V]) {
  LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int v = 0; v < V; ++v) sums[r][v] =
      zero();
}

// --- dot -----------------------------------------------------------------------------------------

// The sums of V registers of channels for MR rows, each in C chains: with few rows the latency of
// `dot` asks for more of them than there are registers of output. Step u of every U adds its bit
// field p to chain (u * P + p) % C. Where there is a chain for each field, and the ISA allows it,
// a field stays in place and its chain's sum is shifted down at the end.
template <int B, int S, int MR, int V, int C>
struct Chains {
  static constexpr int P = 8 / B, U = C > P ? C / P : 1;
  static constexpr bool kInPlace = kMaskInPlace && B < 8 && C >= P;
  static constexpr int kCodeBits = kInPlace ? 8 : B;

  Reg sums[C][MR][V];

  LOWBIT_INLINE Chains() { LOWBIT_UNROLL for (int c = 0; c < C; ++c) clear(sums[c]); }

  template <int Step, int Field = 0>
  LOWBIT_INLINE void add_step(const Reg (&x)[V], const int8_t* a, ptrdiff_t pitch) {
    constexpr int c = (Step * P + Field) % C;
    Reg u[V];
    LOWBIT_UNROLL for (int v = 0; v < V; ++v) {
      if constexpr (kInPlace)
        u[v] = bit_and(x[v], bytes(((1 << B) - 1) << (B * Field)));
      else
        u[v] = unpack<B, Field, S>(x[v]);
    }
    LOWBIT_UNROLL for (int r = 0; r < MR; ++r) {
      const Reg av = broadcast(a + r * pitch + 4 * Field);
      LOWBIT_UNROLL for (int v = 0; v < V; ++v) sums[c][r][v] =
          dot<kCodeBits>(sums[c][r][v], u[v], av);
    }
    if constexpr (Field + 1 < P) add_step<Step, Field + 1>(x, a, pitch);
  }

  template <int First = 0>
  LOWBIT_INLINE Reg total(int r, int v) const {
    Reg sum = sums[First][r][v];
    if constexpr (kInPlace) sum = shift_left<S>(shift_right<B*(First % P)>(sum));
    if constexpr (First + 1 < C) sum = add(sum, total<First + 1>(r, v));
    return sum;
  }
};

constexpr int power_of_two(int most) { return most >= 8 ? 8 : most >= 4 ? 4 : most >= 2 ? 2 : 1; }

template <int B, int S>
struct Dot {
  template <int MR, int NP>
  static void panels(const Tile& t, int panel) {
    constexpr int V = NP * kRegs;
    using Sums = Chains<B, S, MR, V, power_of_two(kChainSums / (MR * V))>;
    sum_groups<MR, V>(t, panel, [&](int64_t first, int64_t steps, Reg(&out)[MR][V]) {
      const int8_t* a = t.codes;
      const uint8_t *w = t.w + panel * t.panel_stride, *ahead = t.ahead + panel * t.panel_stride;
      const ptrdiff_t pitch = t.pitch, stride = t.panel_stride;
      const int64_t end = first + steps;
      const int fetch = t.fetch;
      Sums sums;
      const auto step = [&](int64_t s, auto index) __attribute__((always_inline)) {
        Reg x[V];
        load_panels<NP>(w, stride, ahead, fetch, s, x);
        sums.template add_step<decltype(index)::value>(x, a + s * (32 / B), pitch);
      };
      int64_t s = first;
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
      LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int v = 0; v < V; ++v)
          out[r][v] = add(out[r][v], sums.total(r, v));
    });
  }
};

// --- xnor: bits that differ ----------------------------------------------------------------------

template <bool Masked>
struct Xnor {
  template <int MR, int NP>
  static void panels(const Tile& t, int panel) {
    constexpr int V = NP * kRegs;
    sum_groups<MR, V>(t, panel, [&](int64_t first, int64_t steps, Reg(&out)[MR][V]) {
      const uint32_t *bits = t.bits, *mask = t.mask;
      const uint8_t *w = t.w + panel * t.panel_stride, *ahead = t.ahead + panel * t.panel_stride;
      const ptrdiff_t pitch = t.pitch, stride = t.panel_stride;
      const int fetch = t.fetch;
      Reg count[MR][V];
      clear(count);
      for (int64_t s = first; s < first + steps; ++s) {
        Reg x[V];
        load_panels<NP>(w, stride, ahead, fetch, s, x);
        LOWBIT_UNROLL for (int r = 0; r < MR; ++r) {
          const Reg a = broadcast(reinterpret_cast<const int8_t*>(bits + r * pitch + s));
          LOWBIT_UNROLL for (int v = 0; v < V; ++v) {
            Reg d = bit_xor(x[v], a);
            if constexpr (Masked)
              d = bit_and(d, broadcast(reinterpret_cast<const int8_t*>(mask + r * pitch + s)));
            count[r][v] = popcount_add(count[r][v], d);
          }
        }
      }
      LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int v = 0; v < V; ++v)
          out[r][v] = add(out[r][v], shift_left<1>(count[r][v]));
    });
  }
};

// --- any tile ------------------------------------------------------------------------------------

// call(IntConstant<rows>) for Low <= rows <= High.
template <int Low, int High, class Call>
LOWBIT_INLINE void with_rows(int rows, Call call) {
  if constexpr (Low < High) {
    if (rows < High) return with_rows<Low, High - 1>(rows, call);
  }
  call(IntConstant<High>{});
}

// The fewest rows of one of several tiles: more rows than kTallMr, shared evenly among tiles of
// kMr.
constexpr int kFewest = (kTallMr + 1) / ((kTallMr + kMr) / kMr);

// So few rows wait for memory: they take one panel after the other, in the order of the memory.
constexpr int kStreamRows = 2;

template <class Op>
void run(const Tile& t) {
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

void xnor_any(const Tile& t) { return t.mask ? run<Xnor<true>>(t) : run<Xnor<false>>(t); }

// lanes[i] = q[4i] + .. + q[4i + 3], for n codes and zeros up to a multiple of 64.
inline void sum_quads(const int8_t* q, int64_t n, int32_t* lanes) {
  const auto add = [&](const int8_t* from, int64_t at) {
    for (int i = 0; i < kRegs; ++i)
      store(lanes + at / 4 + i * kLanes,
            dot<1>(zero(), bytes(1), load(reinterpret_cast<const uint8_t*>(from) + i * kRegBytes)));
  };
  int64_t i = 0;
  for (; i + kVectorBytes <= n; i += kVectorBytes) add(q + i, i);
  if (i == n) return;
  int8_t last[kVectorBytes] = {};
  __builtin_memcpy(last, q + i, static_cast<size_t>(n - i));
  add(last, i);
}

// Groups are multiples of 32, or all there is.
void sum_codes_of_groups(const int8_t* q, int64_t n, int64_t group, int32_t* out) {
  constexpr int64_t kBlock = 4096;
  int32_t lanes[kBlock / 4];
  for (int64_t first = 0; first < n; first += group, ++out) {
    const int64_t end = first + group < n ? first + group : n;
    int32_t s = 0;
    for (int64_t at = first; at < end; at += kBlock) {
      const int64_t count = end - at < kBlock ? end - at : kBlock;
      sum_quads(q + at, count, lanes);
      for (int64_t i = 0; i < (count + 3) / 4; ++i) s += lanes[i];
    }
    *out = s;
  }
}

#include "depthwise.inl"
#include "probes.inl"
