// The vocabulary of AArch64's NEON, but for dot: 32 registers of 16 bytes, four to a 64-byte
// vector.
#include <arm_neon.h>

#include "begin.inl"

#define LOWBIT_BYTE_COUNTS

using Reg = int32x4_t;
// Tiles are cut up further, by lane_dot.inl, matrix_dot.inl or long_dot.inl.
constexpr int kGroupSums = 0;
constexpr int kRegs = 4, kMr = 48, kPanels = 4, kTallMr = kMr, kTallPanels = kPanels;

inline Reg zero() { return vdupq_n_s32(0); }
inline Reg load(const uint8_t* p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
inline void store(int32_t* p, Reg v) { vst1q_s32(p, v); }
inline Reg bytes(int x) { return vreinterpretq_s32_s8(vdupq_n_s8(static_cast<int8_t>(x))); }
inline Reg broadcast(const int8_t* p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return vdupq_n_s32(x);
}
inline void opaque(Reg& v) { asm volatile("" : "+w"(v)); }
using FloatReg = float32x4_t;
inline FloatReg to_float(Reg v) { return vcvtq_f32_s32(v); }
inline FloatReg float_load(const float* p) { return vld1q_f32(p); }
inline FloatReg half_load(const uint16_t* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}
inline void float_store(float* p, FloatReg v) { vst1q_f32(p, v); }
inline FloatReg float_splat(float x) { return vdupq_n_f32(x); }
inline FloatReg float_broadcast(const float* p) { return vld1q_dup_f32(p); }
inline FloatReg multiply(FloatReg a, FloatReg b) { return vmulq_f32(a, b); }
inline FloatReg fmadd(FloatReg a, FloatReg b, FloatReg c) { return vfmaq_f32(c, a, b); }
inline FloatReg float_add(FloatReg a, FloatReg b) { return vaddq_f32(a, b); }
inline FloatReg float_max(FloatReg a, FloatReg b) { return vmaxnmq_f32(a, b); }
inline FloatReg float_min(FloatReg a, FloatReg b) { return vminnmq_f32(a, b); }
inline FloatReg float_quads(const float* p, ptrdiff_t) { return vld1q_f32(p); }
inline FloatReg zip_low(FloatReg a, FloatReg b) { return vzip1q_f32(a, b); }
inline FloatReg zip_high(FloatReg a, FloatReg b) { return vzip2q_f32(a, b); }
inline FloatReg pair_low(FloatReg a, FloatReg b) {
  return vreinterpretq_f32_f64(vzip1q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
}
inline FloatReg pair_high(FloatReg a, FloatReg b) {
  return vreinterpretq_f32_f64(vzip2q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
}
inline FloatReg magnitude(FloatReg v) { return vabsq_f32(v); }
inline uint32_t negative(FloatReg v) {
  const uint32x4_t bits = {1, 2, 4, 8};
  return vaddvq_u32(vbicq_u32(bits, vcgezq_f32(v)));
}
inline Reg nearest(FloatReg v) { return vcvtnq_s32_f32(v); }
inline void store_codes(int8_t* p, Reg v) {
  const int16x4_t shorts = vqmovn_s32(v);
  const int8x8_t narrow = vqmovn_s16(vcombine_s16(shorts, shorts));
  const int32_t four = vget_lane_s32(vreinterpret_s32_s8(narrow), 0);
  __builtin_memcpy(p, &four, 4);
}
inline Reg load_codes(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)))));
}
inline void opaque_float(FloatReg& v) { asm volatile("" : "+w"(v)); }

inline int8x16_t signed_bytes(Reg v) { return vreinterpretq_s8_s32(v); }
inline uint8x16_t unsigned_bytes(Reg v) { return vreinterpretq_u8_s32(v); }
inline Reg lanes_of(int8x16_t v) { return vreinterpretq_s32_s8(v); }
inline Reg lanes_of(uint8x16_t v) { return vreinterpretq_s32_u8(v); }

template <int B, int P, int S, bool>
inline Reg unpack(Reg v) {
  uint8x16_t u = unsigned_bytes(v);
  if constexpr (B < 8) {
    if constexpr (B * P > S) u = vshrq_n_u8(u, B * P - S);
    if constexpr (B * P < S) u = vshlq_n_u8(u, S - B * P);
    constexpr bool kTop = B * (P + 1) == 8 && S == 0;  // nothing is left above or below
    if constexpr (!kTop) u = vandq_u8(u, vdupq_n_u8(((1 << B) - 1) << S));
  }
  return lanes_of(u);
}

// -1 where bit P of a byte is set, else 0: one operation, where a bit as 0 or 1 takes two.
template <int P>
inline Reg minus_bit(Reg v) {
  if constexpr (P == 7) return lanes_of(vcltzq_s8(signed_bytes(v)));
  return lanes_of(vtstq_u8(unsigned_bytes(v), vdupq_n_u8(1 << P)));
}

// c - 128 of every byte, as a signed one.
inline int8x16_t centred(Reg u) {
  return signed_bytes(lanes_of(veorq_u8(unsigned_bytes(u), vdupq_n_u8(0x80))));
}

inline Reg add(Reg a, Reg b) { return vaddq_s32(a, b); }
inline Reg sub(Reg a, Reg b) { return vsubq_s32(a, b); }
template <int N>
inline Reg shift_left(Reg v) {
  return vshlq_n_s32(v, N);
}
// acc += v on bytes. Assembly: around intrinsics that accumulate, GCC 12 copies registers, and
// spills.
inline void accumulate_bytes(Reg& acc, Reg v) {
  asm("add %0.16b, %0.16b, %1.16b" : "+w"(acc) : "w"(v));
}
inline Reg bit_xor(Reg a, Reg b) { return veorq_s32(a, b); }
inline Reg bit_and(Reg a, Reg b) { return vandq_s32(a, b); }

inline void interleave(const int8_t* t0, const int8_t* t1, const int8_t* t2, const int8_t* t3,
                       Reg (&out)[4]) {
  const int8x16x2_t ab = vzipq_s8(vld1q_s8(t0), vld1q_s8(t1));
  const int8x16x2_t cd = vzipq_s8(vld1q_s8(t2), vld1q_s8(t3));
  for (int i = 0; i < 2; ++i) {
    const int16x8x2_t z =
        vzipq_s16(vreinterpretq_s16_s8(ab.val[i]), vreinterpretq_s16_s8(cd.val[i]));
    out[2 * i] = vreinterpretq_s32_s16(z.val[0]);
    out[2 * i + 1] = vreinterpretq_s32_s16(z.val[1]);
  }
}

inline Reg load16(const int8_t* p) { return lanes_of(vld1q_s8(p)); }
inline Reg shuffle(Reg v, Reg control) {
  return lanes_of(vqtbl1q_u8(unsigned_bytes(v), unsigned_bytes(control)));
}
