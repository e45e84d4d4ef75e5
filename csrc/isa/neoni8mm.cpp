// AArch64 with the matrix-multiply extension (Neoverse V1 and N2, Cortex-A510 and later, Apple M2).
//
// usmmla and usdot take unsigned codes times signed activations, as they are.
#define LOWBIT_KERNEL_NAME neoni8mm
#if !defined(__ARM_FEATURE_DOTPROD) || !defined(__ARM_FEATURE_MATMUL_INT8)
#error "compile this file with the flags of its row in isas.inc"
#endif
#define LOWBIT_MATRIX_DOT
#define LOWBIT_SIGNED_DOT
#include "neon.inl"

constexpr bool kSignedCodes = false;

// acc[lane] += the four products of u's lane and of lane L of a
template <int L>
inline Reg lane_dot(Reg acc, Reg u, int8x16_t a) {
  asm("usdot %0.4s, %1.16b, %2.4b[%3]" : "+w"(acc) : "w"(u), "w"(a), "i"(L));
  return acc;
}

template <int L>
inline Reg signed_lane_dot(Reg acc, Reg u, int8x16_t a) {
  asm("sdot %0.4s, %1.16b, %2.4b[%3]" : "+w"(acc) : "w"(u), "w"(a), "i"(L));
  return acc;
}

// acc[2i + j] += the eight products of half i of u and half j of a
inline Reg matrix_dot(Reg acc, Reg u, int8x16_t a) {
  asm("usmmla %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(u), "w"(a));
  return acc;
}
inline Reg signed_matrix_dot(Reg acc, Reg u, int8x16_t a) {
  asm("smmla %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(u), "w"(a));
  return acc;
}

// acc[lane] += four products of signed bytes
inline Reg signed_dot(Reg acc, Reg a, Reg b) {
  asm("sdot %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(a), "w"(b));
  return acc;
}

template <int B>
inline Reg dot(Reg acc, Reg u, Reg a) {
  return vusdotq_s32(acc, unsigned_bytes(u), signed_bytes(a));
}

#include "microkernel.inl"
#include "rows.inl"
#include "table.inl"
