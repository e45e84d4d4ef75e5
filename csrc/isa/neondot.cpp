// AArch64 with the dot-product extension (Cortex-A55/A76 and later, Neoverse, Apple). Four
// registers a vector.
//
// sdot takes signed bytes: codes below 128 pass as they are; an 8-bit code c is c - 128 plus 128,
// and the constant comes back as 128 * sum(a), one more dot product with ones that the rows of a
// tile share.
#define LOWBIT_KERNEL_NAME neondot
#if !defined(__ARM_FEATURE_DOTPROD)
#error "compile this file with the flags of its row in isas.inc"
#endif
#include <arm_neon.h>

#include "begin.inl"

using Reg = int32x4_t;
constexpr int kRegs = 4, kMr = 4, kPanels = 1, kTallMr = kMr, kTallPanels = 1;
constexpr int kChainSums = 16, kTightSums = 0;
constexpr bool kMaskInPlace = false;  // sdot: codes below 128

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
inline void opaque_float(FloatReg& v) { asm volatile("" : "+w"(v)); }

template <int B, int P, int S, bool>
inline Reg unpack(Reg v) {
  uint8x16_t u = vreinterpretq_u8_s32(v);
  if constexpr (B < 8) {
    if constexpr (B * P > S) u = vshrq_n_u8(u, B * P - S);
    if constexpr (B * P < S) u = vshlq_n_u8(u, S - B * P);
    constexpr bool kTop = B * (P + 1) == 8 && S == 0;  // nothing is left above or below
    if constexpr (!kTop) u = vandq_u8(u, vdupq_n_u8(((1 << B) - 1) << S));
  }
  return vreinterpretq_s32_u8(u);
}

template <int B>
inline Reg dot(Reg acc, Reg u, Reg a) {
  const int8x16_t as = vreinterpretq_s8_s32(a);
  if constexpr (B == 8) {
    const int8x16_t centred =
        vreinterpretq_s8_u8(veorq_u8(vreinterpretq_u8_s32(u), vdupq_n_u8(0x80)));
    const Reg sum = vdotq_s32(zero(), vdupq_n_s8(1), as);
    return vaddq_s32(vdotq_s32(acc, centred, as), vshlq_n_s32(sum, 7));
  } else {
    return vdotq_s32(acc, vreinterpretq_s8_s32(u), as);
  }
}

inline Reg add(Reg a, Reg b) { return vaddq_s32(a, b); }
inline Reg sub(Reg a, Reg b) { return vsubq_s32(a, b); }
template <int N>
inline Reg shift_left(Reg v) {
  return vshlq_n_s32(v, N);
}
template <int N>
inline Reg shift_right(Reg v) {
  if constexpr (N > 0) v = vshrq_n_s32(v, N);
  return v;
}
inline Reg bit_xor(Reg a, Reg b) { return veorq_s32(a, b); }
inline Reg bit_and(Reg a, Reg b) { return vandq_s32(a, b); }
inline Reg popcount_add(Reg acc, Reg v) {
  return vdotq_s32(acc, vreinterpretq_s8_u8(vcntq_u8(vreinterpretq_u8_s32(v))), vdupq_n_s8(1));
}

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

inline Reg load16(const int8_t* p) { return vreinterpretq_s32_s8(vld1q_s8(p)); }
inline Reg shuffle(Reg v, Reg control) {
  return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(v), vreinterpretq_u8_s32(control)));
}

#include "microkernel.inl"
#include "rows.inl"
#include "table.inl"
