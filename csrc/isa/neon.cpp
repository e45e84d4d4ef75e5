// AArch64 as it began, without dot products (Cortex-A53, A57, A72: Raspberry Pi 3 and 4).
#define LOWBIT_KERNEL_NAME neon
#if !defined(__ARM_NEON) || !defined(__aarch64__)
#error "compile this file with the flags of its row in isas.inc"
#endif
#define LOWBIT_LONG_DOT
#define LOWBIT_SIGNED_DOT
#include "neon.inl"

// The products of the low, the high eight bytes. Assembly: the low half of a register that stays is
// a register of its own to GCC 12.
inline int16x8_t products_low(int8x16_t u, int8x16_t a) {
  int16x8_t r;
  asm("smull %0.8h, %1.8b, %2.8b" : "=w"(r) : "w"(u), "w"(a));
  return r;
}
inline int16x8_t products_high(int8x16_t u, int8x16_t a) {
  int16x8_t r;
  asm("smull2 %0.8h, %1.16b, %2.16b" : "=w"(r) : "w"(u), "w"(a));
  return r;
}
// acc += these
inline void multiply_low(int16x8_t& acc, int8x16_t u, int8x16_t a) {
  asm("smlal %0.8h, %1.8b, %2.8b" : "+w"(acc) : "w"(u), "w"(a));
}
inline void multiply_high(int16x8_t& acc, int8x16_t u, int8x16_t a) {
  asm("smlal2 %0.8h, %1.16b, %2.16b" : "+w"(acc) : "w"(u), "w"(a));
}
// acc[lane] += the sum of two shorts
inline void accumulate_pairs(Reg& acc, int16x8_t v) {
  asm("sadalp %0.4s, %1.8h" : "+w"(acc) : "w"(v));
}

// acc[lane] += four products of signed bytes
inline Reg signed_dot(Reg acc, Reg a, Reg b) {
  const int8x16_t x = signed_bytes(a), y = signed_bytes(b);
  const int16x8_t low = vmull_s8(vget_low_s8(x), vget_low_s8(y)), high = vmull_high_s8(x, y);
  return add(acc, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
}

// Of any operands, for sums of codes.
template <int B>
inline Reg dot(Reg acc, Reg u, Reg a) {
  if constexpr (B < 8) {
    const int8x16_t x = signed_bytes(u), y = signed_bytes(a);
    const int16x8_t low = vmull_s8(vget_low_s8(x), vget_low_s8(y)), high = vmull_high_s8(x, y);
    return vpadalq_s16(acc, vpaddq_s16(low, high));
  }
  acc = signed_dot(acc, lanes_of(centred(u)), a);
  return add(acc, shift_left<7>(vpaddlq_s16(vpaddlq_s8(signed_bytes(a)))));
}

#include "microkernel.inl"
#include "rows.inl"
#include "table.inl"
