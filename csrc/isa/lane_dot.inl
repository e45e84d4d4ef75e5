// Dot products of four bytes with one lane of a register of activations: 16 k of a row are one
// load. Part of microkernel.inl, for NEON. The vocabulary that it asks for beside neon.inl's:
//
//   lane_dot<L>(acc, u, a)  acc[lane] += 4 products of the lane of u and lane L of a
//   signed_lane_dot<L>      the same of signed codes
//   kSignedCodes            its codes are signed: 8-bit ones have to be centred
//
// Tiles of 8 rows x 8 channels: 16 sums, 8 activations, 2 weights, and constants. A register of
// codes is unpacked for 8 products; as 4 x 16 or 6 x 16 it would be for 4 or 6.

#include "half_panels.inl"

constexpr int kDotRows = 8;

// The first `Count` lanes of four bytes from p on.
template <int Count>
LOWBIT_INLINE int8x16_t load_lanes(const int8_t* p) {
  if constexpr (Count == 4) return vld1q_s8(p);
  if constexpr (Count == 2) return vcombine_s8(vld1_s8(p), vdup_n_s8(0));
  return signed_bytes(broadcast(p));
}

// Sums of MR rows and V registers of channels, times 2^S. B: bits of a code; 0: unpacked to bytes,
// half a panel after the other.
template <int B, int S, int MR, int V>
struct LaneDot {
  static constexpr int P = B ? 8 / B : 1;
  static constexpr ptrdiff_t kStepBytes = B ? kVectorBytes : kHalf * 4;
  static constexpr int kUnit = P < 4 ? 4 / P : 1;  // steps of 16 k at least
  static constexpr bool kMinus = B == 1;           // bits are -1 or 0

  // A function of its own, whose sums are memory: the registers are the loop's alone.
  static LOWBIT_NOINLINE void add_steps(const uint8_t* w, ptrdiff_t ahead, const int8_t* a,
                                        ptrdiff_t pitch, int64_t steps, Reg (&sum)[MR][V]) {
    constexpr bool kGoesOn = S == 0 && !kMinus;  // products are added to the sums as they are
    Reg acc[MR][V];
    LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int v = 0; v < V; ++v) acc[r][v] =
        kGoesOn ? sum[r][v] : zero();
    for (; steps >= kUnit; steps -= kUnit, w += kUnit * kStepBytes, a += kUnit * P * 4) {
      if constexpr (B > 0)
        LOWBIT_UNROLL for (int s = 0; s < kUnit; ++s)
            __builtin_prefetch(w + ahead + s * kStepBytes);
      unit<kUnit, 0>(acc, w, a, pitch);
    }
    if constexpr (kUnit > 1)
      for (; steps > 0; --steps, w += kStepBytes, a += P * 4) unit<1, 0>(acc, w, a, pitch);
    LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int v = 0; v < V; ++v) {
      const Reg total = shift_left<S>(acc[r][v]);
      sum[r][v] = kGoesOn ? total : kMinus ? sub(sum[r][v], total) : add(sum[r][v], total);
    }
  }

 private:
  // Four lanes of k at a time.
  template <int Steps, int First>
  static LOWBIT_INLINE void unit(Reg (&acc)[MR][V], const uint8_t* w, const int8_t* a,
                                 ptrdiff_t pitch) {
    constexpr int kLanesLeft = Steps * P - First, kNow = kLanesLeft < 4 ? kLanesLeft : 4;
    int8x16_t x[MR];
    LOWBIT_UNROLL for (int r = 0; r < MR; ++r) x[r] = load_lanes<kNow>(a + r * pitch + 4 * First);
    lanes<First, 0, kNow>(acc, w, x);
    if constexpr (First + kNow < Steps * P) unit<Steps, First + kNow>(acc, w, a, pitch);
  }

  template <int First, int L, int Count>
  static LOWBIT_INLINE void lanes(Reg (&acc)[MR][V], const uint8_t* w, const int8x16_t (&x)[MR]) {
    constexpr int kStep = (First + L) / P, kField = (First + L) % P;
    LOWBIT_UNROLL for (int v = 0; v < V; ++v) {
      Reg u = load(w + kStep * kStepBytes + v * kRegBytes);
      if constexpr (B == 8 && kSignedCodes) u = lanes_of(centred(u));
      if constexpr (kMinus)
        u = minus_bit<kField>(u);
      else if constexpr (B > 0 && B < 8)
        u = unpack<B, kField, 0, false>(u);
      LOWBIT_UNROLL for (int r = 0; r < MR; ++r) acc[r][v] =
          kMinus ? signed_lane_dot<L>(acc[r][v], u, x[r]) : lane_dot<L>(acc[r][v], u, x[r]);
    }
    if constexpr (L + 1 < Count) lanes<First, L + 1, Count>(acc, w, x);
  }
};
