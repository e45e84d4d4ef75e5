// AVX2 with FMA and F16C: Haswell, Zen and later.
#define LOWBIT_KERNEL_NAME avx2
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile this file with the flags of its row in isas.inc"
#endif
#define LOWBIT_INT16_SUMS
#define LOWBIT_CARRY_SAVE
#define LOWBIT_WIDE_COLUMNS
#include "avx2.inl"

constexpr int kMr = 48, kPanels = 4, kTallMr = kMr, kTallPanels = kPanels;  // cut up further

inline Reg multiply_bytes(Reg u, Reg a) { return _mm256_maddubs_epi16(u, a); }
inline Reg sum_pairs(Reg v, int x) {
  return _mm256_madd_epi16(v, _mm256_set1_epi16(static_cast<short>(x)));
}
inline void accumulate(Reg& acc, Reg v) { asm("vpaddd %1, %0, %0" : "+x"(acc) : "x"(v)); }
inline void accumulate_shorts(Reg& acc, Reg v) { asm("vpaddw %1, %0, %0" : "+x"(acc) : "x"(v)); }
inline Reg magnitude(Reg a) { return _mm256_abs_epi8(a); }
inline Reg sign_flip(Reg a) {
  return _mm256_xor_si256(_mm256_cmpgt_epi8(_mm256_setzero_si256(), a), _mm256_set1_epi8(-128));
}

// For sums of codes.
template <int B>
inline Reg dot(Reg acc, Reg u, Reg a) {
  static_assert(2 * ((1 << B) - 1) * 128 <= 32767, "vpmaddubsw would saturate");
  return _mm256_add_epi32(acc, sum_pairs(multiply_bytes(u, a), 1));
}
inline void widen(Reg v, Reg& even, Reg& odd) {
  even = _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8);
  odd = _mm256_srai_epi16(v, 8);
}
inline Reg dot_shorts(Reg acc, Reg a, Reg b) {
  accumulate(acc, _mm256_madd_epi16(a, b));  // in this order: GCC 12 would spill many products
  return acc;
}

#include "microkernel.inl"
#include "rows.inl"
#include "table.inl"
