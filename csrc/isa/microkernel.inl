// The integer GEMM microkernels, once, over the vocabulary that an ISA's file defines before it
// includes this one:
//
//   Reg                     a register of int32 lanes; kRegs of them make one 64-byte vector
//   FloatReg                the same of float32
//   kMr, kPanels            the largest tile: kMr rows x kPanels panels of 16 channels
//   kStreamSums             registers that a streaming kernel may spend on sums
//   kMaskInPlace            dot takes any byte as code, so a bit field need not be shifted down
//   zero() load(p) store(p, v) bytes(x) opaque(v)
//   broadcast(p)            4 bytes to every lane
//   unpack<B, P, S>(v)      bit field P (B bits wide) of every byte, moved to bit S
//   dot<B>(acc, u, a)       acc[lane] += sum of 4 products u8 * s8 (u < 2^B)
//   popcount_add(acc, v)    acc[lane] += bits set in the lane
//   bit_xor(a, b) bit_and(a, b) add(a, b) sub(a, b): the last two on lanes
//   shift_left<N>(v) shift_right<N>(v): lanes, arithmetic
//   interleave(t0..t3, out) 16 bytes of each of 4 taps to 16 lanes of 4 bytes
//   to_float(v) float_load(p) float_store(p, v) float_broadcast(p) float_splat(x) multiply(a, b)
//   fmadd(a, b, c) opaque_float(v)
//
// Everything is in an unnamed namespace: code compiled for one ISA must not be linked into
// another's. GCC keeps big accumulator arrays on the stack unless every loop over them is unrolled:
// hence the pragmas.

#define LOWBIT_UNROLL _Pragma("GCC unroll 16")
#define LOWBIT_INLINE inline __attribute__((always_inline))

constexpr int kNr = kPanels * kPanel;  // channels of a tile
constexpr int kRegBytes = kVectorBytes / kRegs;
constexpr int kLanes = kRegBytes / 4;

// How far ahead a streaming kernel prefetches; measured, see ../README.md.
constexpr int kPrefetchSteps = 32;

#include "epilogue.inl"

// --- dot: rows x panels in registers

template <int B, int S, int P, int MR, int V>
LOWBIT_INLINE void dot_planes(Reg (&acc)[MR][V], const Reg (&x)[V], const int8_t* a,
                              ptrdiff_t pitch) {
  Reg u[V];
  LOWBIT_UNROLL for (int v = 0; v < V; ++v) u[v] = unpack<B, P, S>(x[v]);
  LOWBIT_UNROLL for (int r = 0; r < MR; ++r) {
    const Reg av = broadcast(a + r * pitch + 4 * P);
    LOWBIT_UNROLL for (int v = 0; v < V; ++v) acc[r][v] = dot<B>(acc[r][v], u[v], av);
  }
  if constexpr (P + 1 < 8 / B) dot_planes<B, S, P + 1>(acc, x, a, pitch);
}

// The vectors of step s of NP panels. Two of the next panels are fetched at the same pace.
template <int NP>
LOWBIT_INLINE void load_panels(const uint8_t* w, const uint8_t* next, ptrdiff_t stride, int64_t s,
                               Reg (&x)[NP * kRegs]) {
  if (next) {
    __builtin_prefetch(next + s * kVectorBytes, 0, 2);
    __builtin_prefetch(next + stride + s * kVectorBytes, 0, 2);
  }
  LOWBIT_UNROLL for (int p = 0; p < NP; ++p) LOWBIT_UNROLL for (int i = 0; i < kRegs; ++i)
      x[p * kRegs + i] = load(w + p * stride + s * kVectorBytes + i * kRegBytes);
}

template <int B, int S>
struct Dot {
  template <int MR>
  static void tile(const Tile& t) {
    constexpr int V = kPanels * kRegs;
    sum_groups<MR, V>(t, 0, [&](int64_t first, int64_t steps, Reg(&acc)[MR][V]) {
      const int8_t* a = t.codes;
      const uint8_t *w = t.w, *next = t.next;
      const ptrdiff_t pitch = t.pitch, stride = t.panel_stride;
      for (int64_t s = first; s < first + steps; ++s) {
        Reg x[V];
        load_panels<kPanels>(w, next, stride, s, x);
        dot_planes<B, S, 0>(acc, x, a + s * (32 / B), pitch);
      }
    });
  }

  // One panel, of which the memory is read once, in order. The latency of `dot` asks for more
  // chains of sums than there are rows: one for each bit field (left in place, and its sum shifted
  // down at the end, where the ISA has it so), and for some steps.
  template <int MR>
  static void stream(const Tile& t, int panel) {
    constexpr int P = 8 / B, kBudget = kStreamSums / (MR * kRegs);
    constexpr bool kInPlace = kMaskInPlace && B < 8 && kBudget >= P;
    constexpr int C = kBudget >= 8 ? 8 : kBudget >= 4 ? 4 : kBudget >= 2 ? 2 : 1;  // chains
    constexpr int U = C > P ? C / P : 1;                                           // steps at once
    sum_groups<MR, kRegs>(t, panel, [&](int64_t first, int64_t steps, Reg(&sum)[MR][kRegs]) {
      const int8_t* a = t.codes;
      const uint8_t* w = t.w + panel * t.panel_stride;
      const ptrdiff_t pitch = t.pitch;
      Reg acc[MR][C][kRegs];
      LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int c = 0; c < C; ++c)
          LOWBIT_UNROLL for (int i = 0; i < kRegs; ++i) acc[r][c][i] = zero();
      const auto step = [&](int64_t s, int chain) __attribute__((always_inline)) {
        stream_planes<B, S, 0, kInPlace>(acc, w + s * kVectorBytes, a + s * (32 / B), pitch, chain);
      };
      int64_t s = first;
      for (; s + U <= first + steps; s += U) {
        __builtin_prefetch(w + (s + kPrefetchSteps) * kVectorBytes);
        LOWBIT_UNROLL for (int u = 1; u < U; ++u)
            __builtin_prefetch(w + (s + u + kPrefetchSteps) * kVectorBytes);
        LOWBIT_UNROLL for (int u = 0; u < U; ++u) step(s + u, u * P);
      }
      for (; s < first + steps; ++s) step(s, 0);
      LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int i = 0; i < kRegs; ++i)
          sum[r][i] = add(sum[r][i], chains<B, S, kInPlace, C, 0>(acc[r], i));
    });
  }

 private:
  template <int B1, int S1, int P, bool kInPlace, int MR, int C>
  static LOWBIT_INLINE void stream_planes(Reg (&acc)[MR][C][kRegs], const uint8_t* w,
                                          const int8_t* a, ptrdiff_t pitch, int chain) {
    Reg u[kRegs];
    LOWBIT_UNROLL for (int i = 0; i < kRegs; ++i) {
      const Reg x = load(w + i * kRegBytes);
      if constexpr (kInPlace)
        u[i] = bit_and(x, bytes(((1 << B1) - 1) << (B1 * P)));
      else
        u[i] = unpack<B1, P, S1>(x);
    }
    const int c = (chain + P) % C;
    LOWBIT_UNROLL for (int r = 0; r < MR; ++r) {
      const Reg av = broadcast(a + r * pitch + 4 * P);
      LOWBIT_UNROLL for (int i = 0; i < kRegs; ++i) acc[r][c][i] =
          dot < kInPlace ? 8 : B1 > (acc[r][c][i], u[i], av);
    }
    if constexpr (P + 1 < 8 / B1) stream_planes<B1, S1, P + 1, kInPlace>(acc, w, a, pitch, chain);
  }

  // The sum of all chains from C0 on.
  template <int B1, int S1, bool kInPlace, int C, int C0>
  static LOWBIT_INLINE Reg chains(const Reg (&acc)[C][kRegs], int i) {
    Reg v = acc[C0][i];
    if constexpr (kInPlace) v = shift_left<S1>(shift_right<B1*(C0 % (8 / B1))>(v));
    if constexpr (C0 + 1 < C) v = add(v, chains<B1, S1, kInPlace, C, C0 + 1>(acc, i));
    return v;
  }
};

// --- xnor: bits differ ---------------------------------------------------------------------------

template <bool Masked>
struct Xnor {
  template <int MR>
  static void tile(const Tile& t) {
    constexpr int V = kPanels * kRegs;
    sum_groups<MR, V>(t, 0, [&](int64_t first, int64_t steps, Reg(&sum)[MR][V]) {
      const uint32_t *bits = t.bits, *mask = t.mask;
      const uint8_t *w = t.w, *next = t.next;
      const ptrdiff_t pitch = t.pitch, stride = t.panel_stride;
      Reg acc[MR][V];
      LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int v = 0; v < V; ++v)
          acc[r][v] = zero();
      for (int64_t s = first; s < first + steps; ++s) {
        Reg x[V];
        load_panels<kPanels>(w, next, stride, s, x);
        count(acc, x, bits + s, mask + s, pitch);
      }
      twice(acc, sum);
    });
  }

  template <int MR>
  static void stream(const Tile& t, int panel) {
    sum_groups<MR, kRegs>(t, panel, [&](int64_t first, int64_t steps, Reg(&sum)[MR][kRegs]) {
      const uint32_t *bits = t.bits, *mask = t.mask;
      const uint8_t* w = t.w + panel * t.panel_stride;
      const ptrdiff_t pitch = t.pitch;
      Reg acc[MR][kRegs];
      LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int i = 0; i < kRegs; ++i)
          acc[r][i] = zero();
      for (int64_t s = first; s < first + steps; ++s) {
        Reg x[kRegs];
        __builtin_prefetch(w + (s + kPrefetchSteps) * kVectorBytes);
        load_panels<1>(w, nullptr, 0, s, x);
        count(acc, x, bits + s, mask + s, pitch);
      }
      twice(acc, sum);
    });
  }

 private:
  template <int MR, int V>
  static LOWBIT_INLINE void count(Reg (&acc)[MR][V], const Reg (&x)[V], const uint32_t* bits,
                                  const uint32_t* mask, ptrdiff_t pitch) {
    LOWBIT_UNROLL for (int r = 0; r < MR; ++r) {
      const Reg av = broadcast(reinterpret_cast<const int8_t*>(bits + r * pitch));
      LOWBIT_UNROLL for (int v = 0; v < V; ++v) {
        Reg d = bit_xor(x[v], av);
        if constexpr (Masked)
          d = bit_and(d, broadcast(reinterpret_cast<const int8_t*>(mask + r * pitch)));
        acc[r][v] = popcount_add(acc[r][v], d);
      }
    }
  }

  template <int MR, int V>
  static LOWBIT_INLINE void twice(const Reg (&acc)[MR][V], Reg (&sum)[MR][V]) {
    LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int v = 0; v < V; ++v) sum[r][v] =
        add(sum[r][v], shift_left<1>(acc[r][v]));
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

template <class Op>
void run(const Tile& t) {
  if (!t.stream && t.panels == kPanels && t.rows >= kMr / 2)
    return with_rows<kMr / 2, kMr>(t.rows,
                                   [&](auto mr) { Op::template tile<decltype(mr)::value>(t); });
  for (int p = 0; p < t.panels; ++p)
    with_rows<1, kMr>(t.rows, [&](auto mr) { Op::template stream<decltype(mr)::value>(t, p); });
}

void xnor_any(const Tile& t) { return t.mask ? run<Xnor<true>>(t) : run<Xnor<false>>(t); }

int32_t sum_codes(const int8_t* q, int64_t n) {
  Reg acc = zero();
  int64_t i = 0;
  for (; i + kRegBytes <= n; i += kRegBytes)
    acc = dot<1>(acc, bytes(1), load(reinterpret_cast<const uint8_t*>(q + i)));
  int32_t lanes[kLanes], s = 0;
  store(lanes, acc);
  for (int32_t lane : lanes) s += lane;
  for (; i < n; ++i) s += q[i];
  return s;
}

#include "depthwise.inl"
#include "probes.inl"
