// AVX-512-VNNI without VPOPCNTDQ (Cascade Lake): bits are counted by table.
#define LOWBIT_KERNEL_NAME avx512vnni
#if !defined(__AVX512VNNI__) || !defined(__AVX512BW__)
#error "compile this file with the flags of its row in isas.inc"
#endif
#define LOWBIT_CARRY_SAVE
#include "avx512.inl"

inline Reg popcount_bytes(Reg v) {
  const Reg table =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const Reg low = _mm512_set1_epi8(0x0f);
  return _mm512_add_epi8(
      _mm512_shuffle_epi8(table, _mm512_and_si512(v, low)),
      _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(v, 4), low)));
}
inline Reg add_bytes(Reg a, Reg b) { return _mm512_add_epi8(a, b); }
inline Reg carry_save(Reg a, Reg b, Reg c, Reg& carry) {
  carry = _mm512_ternarylogic_epi32(a, b, c, 0xe8);  // majority
  return _mm512_ternarylogic_epi32(a, b, c, 0x96);   // parity
}

#include "microkernel.inl"
#include "rows.inl"
#include "table.inl"
