// AArch64 as it began, without dot products (Cortex-A53, A57, A72: Raspberry Pi 3 and 4).
#define LOWBIT_KERNEL_NAME neon
#if !defined(__ARM_NEON) || !defined(__aarch64__)
#error "compile this file with the flags of its row in isas.inc"
#endif
#define LOWBIT_DOT_SOURCE "long_dot.inl"
#include "neon.inl"

// acc += the products of the low, the high eight bytes
inline void multiply_low(int16x8_t& acc, int8x16_t u, int8x16_t a) {
  asm("smlal %0.8h, %1.8b, %2.8b" : "+w"(acc) : "w"(u), "w"(a));
}
inline void multiply_high(int16x8_t& acc, int8x16_t u, int8x16_t a) {
  asm("smlal2 %0.8h, %1.16b, %2.16b" : "+w"(acc) : "w"(u), "w"(a));
}
// acc[lane] += the sum of two shorts
inline void add_pairs(Reg& acc, int16x8_t v) { asm("sadalp %0.4s, %1.8h" : "+w"(acc) : "w"(v)); }

// Of any operands: for depthwise convolutions and sums of codes.
template <int B>
inline Reg dot(Reg acc, Reg u, Reg a) {
  const int8x16_t codes = B == 8 ? centred(u) : signed_bytes(u), x = signed_bytes(a);
  const int16x8_t low = vmull_s8(vget_low_s8(codes), vget_low_s8(x)),
                  high = vmull_high_s8(codes, x);
  // Two products of 4-bit codes fit 16 bits; those of -128 and -128 would not.
  if constexpr (B < 8) return vpadalq_s16(acc, vpaddq_s16(low, high));
  acc = add(acc, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
  return add(acc, shift_left<7>(vpaddlq_s16(vpaddlq_s8(x))));
}

#include "microkernel.inl"
#include "rows.inl"
#include "table.inl"
