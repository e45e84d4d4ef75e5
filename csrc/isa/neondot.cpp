// AArch64 with the dot-product extension (Cortex-A55/A76 and later, Neoverse N1, Apple M1).
//
// sdot takes signed bytes: codes below 128 pass as they are; an 8-bit code c is c - 128 plus 128,
// and what is missing, 128 * sum(a), goes to the offset of a row.
#define LOWBIT_KERNEL_NAME neondot
#if !defined(__ARM_FEATURE_DOTPROD)
#error "compile this file with the flags of its row in isas.inc"
#endif
#define LOWBIT_LANE_DOT
#define LOWBIT_SIGNED_DOT
#include "neon.inl"

constexpr bool kSignedCodes = true;

// acc[lane] += the four products of u's lane and of lane L of a
template <int L>
inline Reg lane_dot(Reg acc, Reg u, int8x16_t a) {
  asm("sdot %0.4s, %1.16b, %2.4b[%3]" : "+w"(acc) : "w"(u), "w"(a), "i"(L));
  return acc;
}

template <int L>
inline Reg signed_lane_dot(Reg acc, Reg u, int8x16_t a) {
  return lane_dot<L>(acc, u, a);
}
// acc[lane] += four products of signed bytes
inline Reg signed_dot(Reg acc, Reg a, Reg b) {
  asm("sdot %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(a), "w"(b));
  return acc;
}

template <int B>
inline Reg dot(Reg acc, Reg u, Reg a) {
  if constexpr (B < 8) return vdotq_s32(acc, signed_bytes(u), signed_bytes(a));
  const Reg sum = vdotq_s32(zero(), vdupq_n_s8(1), signed_bytes(a));
  return add(vdotq_s32(acc, centred(u), signed_bytes(a)), shift_left<7>(sum));
}

#include "microkernel.inl"
#include "rows.inl"
#include "table.inl"
