// The vocabulary of 256-bit x86, but for dot and the shape of a tile: AVX2 with FMA and F16C,
// Haswell and later. A 64-byte vector is two registers.
#include <immintrin.h>

#include "begin.inl"

using Reg = __m256i;
constexpr int kRegs = 2;

inline Reg zero() { return _mm256_setzero_si256(); }
inline Reg load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Reg*>(p)); }
inline void store(int32_t* p, Reg v) { _mm256_storeu_si256(reinterpret_cast<Reg*>(p), v); }
inline Reg bytes(int x) { return _mm256_set1_epi8(static_cast<char>(x)); }
inline Reg broadcast(const int8_t* p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return _mm256_set1_epi32(x);
}
inline void opaque(Reg& v) { asm volatile("" : "+x"(v)); }
using FloatReg = __m256;
inline FloatReg to_float(Reg v) { return _mm256_cvtepi32_ps(v); }
inline FloatReg float_load(const float* p) { return _mm256_loadu_ps(p); }
// Exact, and subnormals are not flushed whatever the mode.
inline FloatReg half_load(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void float_store(float* p, FloatReg v) { _mm256_storeu_ps(p, v); }
inline FloatReg float_splat(float x) { return _mm256_set1_ps(x); }
inline FloatReg float_broadcast(const float* p) { return _mm256_broadcast_ss(p); }
inline FloatReg multiply(FloatReg a, FloatReg b) { return _mm256_mul_ps(a, b); }
inline FloatReg fmadd(FloatReg a, FloatReg b, FloatReg c) { return _mm256_fmadd_ps(a, b, c); }
inline FloatReg float_add(FloatReg a, FloatReg b) { return _mm256_add_ps(a, b); }
inline FloatReg float_max(FloatReg a, FloatReg b) { return _mm256_max_ps(a, b); }
inline FloatReg float_min(FloatReg a, FloatReg b) { return _mm256_min_ps(a, b); }
inline FloatReg float_quads(const float* p, ptrdiff_t stride) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + stride), 1);
}
inline FloatReg zip_low(FloatReg a, FloatReg b) { return _mm256_unpacklo_ps(a, b); }
inline FloatReg zip_high(FloatReg a, FloatReg b) { return _mm256_unpackhi_ps(a, b); }
inline FloatReg pair_low(FloatReg a, FloatReg b) {
  return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
}
inline FloatReg pair_high(FloatReg a, FloatReg b) {
  return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
}
inline FloatReg magnitude(FloatReg v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
inline uint32_t negative(FloatReg v) {
  return static_cast<uint32_t>(
      _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NGE_UQ)));
}
inline Reg nearest(FloatReg v) { return _mm256_cvtps_epi32(v); }
inline void store_codes(int8_t* p, Reg v) {
  const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(shorts, shorts));
}
inline Reg load_codes(const int8_t* p) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline void opaque_float(FloatReg& v) { asm volatile("" : "+x"(v)); }

template <uint64_t kByte>
alignas(32) constexpr uint64_t kBytes[4] = {
    kByte * 0x0101010101010101u, kByte * 0x0101010101010101u, kByte * 0x0101010101010101u,
    kByte * 0x0101010101010101u};

template <int B, int P, int S, bool Tight>
inline Reg unpack(Reg v) {
  if constexpr (B < 8) {
    if constexpr (B * P > S) v = _mm256_srli_epi16(v, B * P - S);
    if constexpr (B * P < S) v = _mm256_slli_epi16(v, S - B * P);
    constexpr uint64_t kMask = ((1u << B) - 1) << S;
    if constexpr (Tight)
      asm("vpand %1, %0, %0" : "+x"(v) : "m"(kBytes<kMask>));
    else
      v = _mm256_and_si256(v, bytes(kMask));
  }
  return v;
}

inline Reg add(Reg a, Reg b) { return _mm256_add_epi32(a, b); }
inline Reg sub(Reg a, Reg b) { return _mm256_sub_epi32(a, b); }
template <int N>
inline Reg shift_left(Reg v) {
  return _mm256_slli_epi32(v, N);
}
template <int N>
inline Reg shift_right(Reg v) {
  return _mm256_srai_epi32(v, N);
}
inline Reg bit_xor(Reg a, Reg b) { return _mm256_xor_si256(a, b); }
inline Reg bit_and(Reg a, Reg b) { return _mm256_and_si256(a, b); }
inline Reg add_bytes(Reg a, Reg b) { return _mm256_add_epi8(a, b); }

inline Reg popcount_bytes(Reg v) {
  const Reg table =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const Reg low = _mm256_set1_epi8(0x0f);
  return _mm256_add_epi8(
      _mm256_shuffle_epi8(table, _mm256_and_si256(v, low)),
      _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), low)));
}
// a + b + c, bit by bit: returns the sums, `carry` counts twice.
inline Reg carry_save(Reg a, Reg b, Reg c, Reg& carry) {
  const Reg u = _mm256_xor_si256(a, b);
  carry = _mm256_or_si256(_mm256_and_si256(a, b), _mm256_and_si256(u, c));
  return _mm256_xor_si256(u, c);
}

inline void interleave(const int8_t* t0, const int8_t* t1, const int8_t* t2, const int8_t* t3,
                       Reg (&out)[2]) {
  const auto get = [](const int8_t* t) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(t));
  };
  const __m128i a = get(t0), b = get(t1), c = get(t2), d = get(t3);
  const __m128i ab0 = _mm_unpacklo_epi8(a, b), ab1 = _mm_unpackhi_epi8(a, b);
  const __m128i cd0 = _mm_unpacklo_epi8(c, d), cd1 = _mm_unpackhi_epi8(c, d);
  out[0] = _mm256_set_m128i(_mm_unpackhi_epi16(ab0, cd0), _mm_unpacklo_epi16(ab0, cd0));
  out[1] = _mm256_set_m128i(_mm_unpackhi_epi16(ab1, cd1), _mm_unpacklo_epi16(ab1, cd1));
}

inline Reg load16(const int8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Reg shuffle(Reg v, Reg control) { return _mm256_shuffle_epi8(v, control); }
