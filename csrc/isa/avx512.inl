// The vocabulary of AVX-512-VNNI, but for popcount_add. A 64-byte vector is one register; vpdpbusd
// is dot.
#include <immintrin.h>

#include "begin.inl"

using Reg = __m512i;
// 24 accumulators + 4 (2) weights + 1 activation
constexpr int kRegs = 1, kMr = 6, kPanels = 4, kTallMr = 12, kTallPanels = 2;
constexpr int kChainSums = 16, kTightSums = 0, kGroupSums = 12;
constexpr bool kMaskInPlace = true;

inline Reg zero() { return _mm512_setzero_si512(); }
inline Reg load(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline void store(int32_t* p, Reg v) { _mm512_storeu_si512(p, v); }
inline Reg bytes(int x) { return _mm512_set1_epi8(static_cast<char>(x)); }
inline Reg broadcast(const int8_t* p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}
inline void opaque(Reg& v) { asm volatile("" : "+v"(v)); }
using FloatReg = __m512;
inline FloatReg to_float(Reg v) { return _mm512_cvtepi32_ps(v); }
inline FloatReg float_load(const float* p) { return _mm512_loadu_ps(p); }
// Exact, and subnormals are not flushed whatever the mode.
inline FloatReg half_load(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void float_store(float* p, FloatReg v) { _mm512_storeu_ps(p, v); }
inline FloatReg float_splat(float x) { return _mm512_set1_ps(x); }
inline FloatReg float_broadcast(const float* p) { return _mm512_set1_ps(*p); }
inline FloatReg multiply(FloatReg a, FloatReg b) { return _mm512_mul_ps(a, b); }
inline FloatReg fmadd(FloatReg a, FloatReg b, FloatReg c) { return _mm512_fmadd_ps(a, b, c); }
inline FloatReg float_add(FloatReg a, FloatReg b) { return _mm512_add_ps(a, b); }
inline FloatReg float_max(FloatReg a, FloatReg b) { return _mm512_max_ps(a, b); }
inline FloatReg float_min(FloatReg a, FloatReg b) { return _mm512_min_ps(a, b); }
inline FloatReg float_quads(const float* p, ptrdiff_t stride) {
  const __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
  const __m512 low = _mm512_insertf32x4(v, _mm_loadu_ps(p + stride), 1);
  const __m512 most = _mm512_insertf32x4(low, _mm_loadu_ps(p + 2 * stride), 2);
  return _mm512_insertf32x4(most, _mm_loadu_ps(p + 3 * stride), 3);
}
inline FloatReg zip_low(FloatReg a, FloatReg b) { return _mm512_unpacklo_ps(a, b); }
inline FloatReg zip_high(FloatReg a, FloatReg b) { return _mm512_unpackhi_ps(a, b); }
inline FloatReg pair_low(FloatReg a, FloatReg b) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
inline FloatReg pair_high(FloatReg a, FloatReg b) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
inline FloatReg magnitude(FloatReg v) { return _mm512_abs_ps(v); }
inline uint32_t negative(FloatReg v) {
  return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NGE_UQ);
}
inline Reg nearest(FloatReg v) { return _mm512_cvtps_epi32(v); }
inline void store_codes(int8_t* p, Reg v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(v));
}
inline Reg load_codes(const int8_t* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void opaque_float(FloatReg& v) { asm volatile("" : "+v"(v)); }

template <int B, int P, int S, bool>
inline Reg unpack(Reg v) {
  if constexpr (B < 8) {
    // A 16-bit shift brings in the neighbour's bits: every field is masked.
    if constexpr (B * P > S) v = _mm512_srli_epi16(v, B * P - S);
    if constexpr (B * P < S) v = _mm512_slli_epi16(v, S - B * P);
    v = _mm512_and_si512(v, _mm512_set1_epi8(((1 << B) - 1) << S));
  }
  return v;
}

// Assembly for the two that accumulate: where it sees the intrinsics, GCC 12 copies accumulators
// back and forth and spills a third of a tile.
inline void accumulate(Reg& acc, Reg v) { asm("vpaddd %1, %0, %0" : "+v"(acc) : "v"(v)); }

template <int B>
inline Reg dot(Reg acc, Reg u, Reg a) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u), "v"(a));
  return acc;
}

inline Reg add(Reg a, Reg b) { return _mm512_add_epi32(a, b); }
inline Reg sub(Reg a, Reg b) { return _mm512_sub_epi32(a, b); }
template <int N>
inline Reg shift_left(Reg v) {
  return _mm512_slli_epi32(v, N);
}
template <int N>
inline Reg shift_right(Reg v) {
  return _mm512_srai_epi32(v, N);
}
inline Reg bit_xor(Reg a, Reg b) { return _mm512_xor_si512(a, b); }
inline Reg bit_and(Reg a, Reg b) { return _mm512_and_si512(a, b); }

// The dwords that a quarter's windows lie in, then their bytes.
#define LOWBIT_WINDOWS
struct Windows {
  Reg dwords, places;

  explicit Windows(int stride) {
    const auto of_quarters = [](int quarter, int lane) __attribute__((always_inline)) {
      return _mm512_add_epi32(
          _mm512_mullo_epi32(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
                             _mm512_set1_epi32(quarter)),
          _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3),
                             _mm512_set1_epi32(lane)));
    };
    dwords = of_quarters(stride, 1);
    places = _mm512_add_epi32(of_quarters(0, stride * 0x01010101), _mm512_set1_epi32(0x03020100));
  }
  Reg operator()(Reg row) const {
    return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(dwords, row), places);
  }
};

// Dword 4t + q holds channels 4q..4q+3 of tap t: gather the dwords of a q in one 128-bit lane,
// transpose 4 x 4 bytes.
inline void interleave(const int8_t* t0, const int8_t* t1, const int8_t* t2, const int8_t* t3,
                       Reg (&out)[1]) {
  const auto get = [](const int8_t* t) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(t));
  };
  Reg v = _mm512_inserti32x4(_mm512_castsi128_si512(get(t0)), get(t1), 1);
  v = _mm512_inserti32x4(_mm512_inserti32x4(v, get(t2), 2), get(t3), 3);
  v = _mm512_permutexvar_epi32(
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), v);
  out[0] = _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2,
                                                                       6, 10, 14, 3, 7, 11, 15)));
}

inline Reg load16(const int8_t* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Reg shuffle(Reg v, Reg control) { return _mm512_shuffle_epi8(v, control); }
